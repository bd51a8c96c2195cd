"""What kernels of one compiler share, whatever the operation."""
