"""Judging: a policy applied to measurements gives a verdict with every reason. Nothing in here sees a pixel."""
