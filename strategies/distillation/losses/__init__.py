"""Losses of distillation, as sums over tokens, and the models as these losses see them."""
