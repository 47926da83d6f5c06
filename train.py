"""The one launchable: `accelerate launch train.py --config configs/quickstart.yaml optimizer.lr=1e-4`."""

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported, whose profiler warns in each run

from trainer.cli import train  # noqa: E402

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
