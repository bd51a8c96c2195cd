"""Products with a packed key-value cache."""
