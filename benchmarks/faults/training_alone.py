"""train.py without what comes after training: no export is reloaded and compared, which takes longer than all of it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer import pipeline  # noqa: E402
from trainer.cli import train  # noqa: E402

if __name__ == "__main__":
    pipeline.compare = pipeline.write_report = lambda *_: None
    sys.exit(train(sys.argv[1:]))
