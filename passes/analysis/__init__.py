"""Facts about a program: where parameters meet products, what becomes of its caches."""
