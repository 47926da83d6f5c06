"""Processes: launched, joined, watched and stopped; what each of them holds."""
