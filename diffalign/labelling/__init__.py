"""``diffalign pairs label``: people choose between two pictures of a prompt on a local page; pairs for training."""
