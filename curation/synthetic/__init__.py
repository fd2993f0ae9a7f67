"""An embedded world with exact ground truth: a body that dances in places, filmed, encoded and judged by geometry.

Nothing here is real, and nothing pretends to be. It exists so that the system can be shown and tested without network,
GPU, licences or downloaded weights. This package never reads a real video.
"""
