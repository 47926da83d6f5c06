"""A teacher's targets on disk."""
