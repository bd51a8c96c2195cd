"""Products of float rows with packed weights."""
