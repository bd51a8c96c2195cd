"""Facts about chips, and the tiles that were measured on them."""
