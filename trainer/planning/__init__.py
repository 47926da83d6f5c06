"""From an experiment to a plan: batches, bytes and schedules, and what is said where none fits."""
