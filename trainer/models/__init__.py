"""Teacher and student as models: where they come from, how they are built, and trials of them before training."""
