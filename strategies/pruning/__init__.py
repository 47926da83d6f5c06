"""Makes a model smaller: weights, heads, channels and blocks that are left out, and blocks that are not always run."""
