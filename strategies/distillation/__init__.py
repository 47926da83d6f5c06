"""Knowledge distillation: losses against a teacher, different tokenizers, and teacher targets cached on disk."""
