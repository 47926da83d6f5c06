"""Clients of exported files: processes of their own, which import nothing of this project."""
