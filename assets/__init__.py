"""The tiny world: models, pairs and prompts small enough to ship."""
