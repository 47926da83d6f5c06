"""Distillation losses, as sums over tokens, and access to the tensors of a model that they need."""
