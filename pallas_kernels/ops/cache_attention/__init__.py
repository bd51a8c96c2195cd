"""Attention on packed key-value caches."""
