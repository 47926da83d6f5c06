"""Solve: choose which operations to recompute and when, on plain data, with proven lower bounds."""
