"""Measuring clips: one decode feeds shots, people and training frames. Nothing in here judges."""
