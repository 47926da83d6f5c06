"""The teacher's side of distillation: live or cached targets, and matching its vocabulary and text to the student's."""
