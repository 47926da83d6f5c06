"""Export of a student: write it, reload it in the target runtime, compare the logits, and issue a receipt."""
