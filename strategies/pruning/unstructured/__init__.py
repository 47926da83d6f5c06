"""Unstructured and N:M sparsity: which weights are zero, found once or during training, and kept so."""
