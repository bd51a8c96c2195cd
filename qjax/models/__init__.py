"""Wrapped models, a file for each framework."""
