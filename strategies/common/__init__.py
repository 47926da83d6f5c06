"""Utilities shared by several strategies."""
