"""Built-in recipes, found by name."""
