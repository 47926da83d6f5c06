"""Optimizers, each from the best-kept implementation there is."""
