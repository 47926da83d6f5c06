"""The `limbeck` console command, also as `python -m limbeck`."""

from __future__ import annotations

import sys


def main() -> int:
    """Do what was typed after `limbeck`. Returns the exit code."""
    from trainer.cli import limbeck

    return limbeck(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
