"""Drawing bodies: a z-buffer and the SMPL-like body that comes with the package."""
