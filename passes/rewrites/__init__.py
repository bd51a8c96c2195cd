"""Carrying decisions out: what is done to a program's equations."""
