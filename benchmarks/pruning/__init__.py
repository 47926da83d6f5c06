"""Structured and unstructured pruning beside peers."""
