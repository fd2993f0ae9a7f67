"""UniSH, the network: metric scenes, cameras and a moving SMPL body from video; and its self-check."""
