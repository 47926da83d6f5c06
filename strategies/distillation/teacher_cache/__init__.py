"""A cache of teacher targets on disk, so that the teacher runs only once."""
