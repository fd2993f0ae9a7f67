"""Downloads the video of a clip and verifies the file."""
