"""What is rendered: places, a moving and dressed body, cameras, and takes of them, with exact truth."""
