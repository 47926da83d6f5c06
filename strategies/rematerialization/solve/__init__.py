"""Solve: which operations run again, and when, as plain data, with proven bounds."""
