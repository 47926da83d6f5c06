"""Rematerialization: capture a region, price it, solve for what to keep, execute the schedule."""
