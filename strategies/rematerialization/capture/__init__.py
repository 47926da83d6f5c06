"""Capture: find a model's repeated blocks (regions) and trace each into an executable joint forward-backward graph."""
