"""Benchmarks of rematerialization: the solver on recorded graphs, and whole training steps."""
