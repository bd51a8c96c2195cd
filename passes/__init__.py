"""Compiler: finds where parameters meet matmuls in a jaxpr, decides their format, rewrites the program."""
