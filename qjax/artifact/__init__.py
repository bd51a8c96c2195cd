"""Exported folders: programs and packed weights that serve without the model's code."""
