"""The training loop, and what runs around its steps: evaluation, checkpointing, memory and finiteness checks."""
