"""Judging: applying a policy to measurements gives a verdict with every reason. No code here reads a pixel."""
