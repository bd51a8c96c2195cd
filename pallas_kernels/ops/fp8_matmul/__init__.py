"""Products of 8-bit floats."""
