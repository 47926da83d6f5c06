"""The ledger of bytes: what a run keeps in memory, part by part."""
