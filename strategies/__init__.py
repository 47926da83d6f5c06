"""What makes a model fit and what makes it small. Each part is usable alone in somebody else's training script."""
