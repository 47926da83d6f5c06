"""Pruning beside peers, and what exits save."""
