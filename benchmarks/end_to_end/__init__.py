"""Whole training runs of ours beside those of peers, step by step in turn."""
