"""Capture: find the regions of a model, and make of each a joint graph of forward and backward that can be run."""
