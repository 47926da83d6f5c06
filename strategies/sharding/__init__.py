"""Engines that shard a student, its gradients and its optimizer over ranks: data parallelism, FSDP2 and ZeRO."""
