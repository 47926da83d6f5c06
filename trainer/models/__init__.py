"""Teacher and student models: how they are loaded or built, and the trial runs that check them before training."""
