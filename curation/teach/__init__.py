"""Teachers: metric depth for accepted clips, on the grid of the training frames."""
