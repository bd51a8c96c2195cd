"""Products of integer codes."""
