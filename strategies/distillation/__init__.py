"""Losses through which a student learns from its teacher."""
