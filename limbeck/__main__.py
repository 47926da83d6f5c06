"""Entry point of the `limbeck` console command, also run by `python -m limbeck`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the `limbeck` command on `sys.argv` and return its exit code."""
    from trainer.cli import limbeck

    return limbeck(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
