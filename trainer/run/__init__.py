"""The run folder, and the output of a run: metrics, progress and the report."""
