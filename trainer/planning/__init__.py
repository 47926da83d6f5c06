"""Turns an experiment into a plan: batch layout, memory, schedules, and the error message when nothing fits."""
