"""Sweeps: many runs of one experiment with other values, side by side on this machine, and a table of what came out."""
