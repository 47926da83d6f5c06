"""Scripts that load and measure exported files in a process of their own, without importing this project."""
