"""Sharding: losses and bytes under every engine, and the ledger beside the ZeRO paper's formulas."""
