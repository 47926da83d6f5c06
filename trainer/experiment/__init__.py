"""Experiment configuration: one YAML file plus dotted overrides, read into a frozen, typed tree of nodes."""
