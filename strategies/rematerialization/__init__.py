"""Rematerialization under a memory budget: capture regions, price operations, solve for what to recompute, execute."""
