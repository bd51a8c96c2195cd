"""Checkpoints of packed variables."""
