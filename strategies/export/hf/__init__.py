"""Export to a folder that transformers loads."""
