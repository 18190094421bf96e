"""Inference-time alignment: pictures that please a scorer, found by spending U-Net calls on search instead of training.

A search is a generator for one prompt: it asks for network outputs and for judged pictures, and `core.drive` answers
many prompts at once, in batches, and counts. What is sampled is a `core.World`: a diffusers pipeline
(`diffusion.DiffusionWorld`), or a toy in the tests. One file a search; importing this imports no torch.
"""
