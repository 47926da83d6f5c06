"""Price: time and memory of operations, of the options for each block, and of everything outside the blocks."""
