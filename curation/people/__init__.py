"""People in pictures: detector, tracker and their weights. An instrument; nothing in here judges."""
