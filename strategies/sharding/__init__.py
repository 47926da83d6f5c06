"""A student, its gradients and its optimizer shared out over ranks: data parallelism, FSDP2, ZeRO."""
