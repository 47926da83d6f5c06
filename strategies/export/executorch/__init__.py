"""Export to a .pte program for ExecuTorch."""
