"""Pruning: what removes weights, structures and depth from a model."""
