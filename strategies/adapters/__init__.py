"""Adapters: a few trained weights beside a frozen base, which may be held in fewer bits than it computes in."""
