"""Distillation between a teacher and a student with different tokenizers or vocabularies."""
