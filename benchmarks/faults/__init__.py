"""Faults: real runs that are killed, stopped, starved and fed NaN, and what became of them, beside two peers."""
