"""Optimizers for whole and sharded parameters: AdamW, 8-bit AdamW, LAMB, Adafactor and Muon."""
