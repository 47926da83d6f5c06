"""The student as a transformers folder."""
