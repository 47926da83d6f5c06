"""Teachers and students with different tokenizers."""
