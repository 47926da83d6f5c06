"""Pruning: weights, and whole structures of a model, that are taken out of it, and depths at which it may stop."""
