"""diffalign: align and distil text-to-image diffusion models."""
