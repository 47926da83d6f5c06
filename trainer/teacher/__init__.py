"""The teacher of a run: its targets, live or cached, and how student and teacher understand each other."""
