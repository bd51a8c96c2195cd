"""One call of a model through the passes: traced, decided, run, converted, calibrated."""
