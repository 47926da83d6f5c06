"""Deep Compression's archive."""
