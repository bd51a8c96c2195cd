"""Products of rows sorted by expert with packed experts."""
