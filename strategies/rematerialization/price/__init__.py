"""Price: seconds and bytes of operations, of the ways to run a block, and of everything outside of blocks."""
