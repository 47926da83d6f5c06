"""The data pipeline, from documents to batches: sources, encoding, packing, rows, and batch order."""
