"""Techniques that make models fit in memory and make them small; each also works in a training script of your own."""
