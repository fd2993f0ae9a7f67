"""Videos as files: opened within limits, indexed by presentation time, decoded, and copied without their metadata."""
