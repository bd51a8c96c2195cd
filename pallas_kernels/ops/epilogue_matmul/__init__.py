"""Products and what follows them (bias, activation, gated pair, residual), in one kernel."""
