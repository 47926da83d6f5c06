"""The folder of a run, and what is written there and told while it runs and afterwards."""
