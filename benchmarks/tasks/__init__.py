"""Models judged on tasks."""
