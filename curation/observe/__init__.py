"""Measuring clips: one decode feeds shot measures, people and training frames. No code here judges."""
