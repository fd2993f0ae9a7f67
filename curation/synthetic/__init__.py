"""An embedded world with exact ground truth: a body that dances in places, filmed, encoded and judged by geometry.

Nothing in here is real, and nothing in here pretends to be: it exists so that the system can be seen and tested without
network, GPU, licences or downloaded weights. This package never reads a real video.
"""
