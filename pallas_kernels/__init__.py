"""Runtime of a packed model: number formats, packed tensors and the operations that compute with them."""
