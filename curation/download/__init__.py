"""From a clip reference to a verified video file on this machine."""
