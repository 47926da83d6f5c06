"""Structured pruning: whole heads, channels, experts and layers go, and a plain configuration says what is left."""
