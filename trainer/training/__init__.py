"""The loop, and what it does beside steps: evaluation, saving, checks of memory and of numbers."""
