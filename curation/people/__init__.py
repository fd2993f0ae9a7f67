"""Finds people in frames: detector, tracker and their weights. Nothing in here judges."""
