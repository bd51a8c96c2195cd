"""Rows of a packed table."""
