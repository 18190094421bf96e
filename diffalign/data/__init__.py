"""Pairs, images, readers, checks and the latent cache."""
