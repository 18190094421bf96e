"""Methods that learn from what the model samples while it trains, and the preference models that judge it."""
