"""What differs between model families: load, encode, LoRA targets, save."""
