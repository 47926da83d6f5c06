"""Benchmarks of pruning."""
