"""Commands that measure, each printing a table and writing JSON with --json FILE."""
