"""Comparison of a quantized model with the float one."""
