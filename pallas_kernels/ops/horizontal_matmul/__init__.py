"""Products of one input with several packed weights, side by side in one kernel."""
