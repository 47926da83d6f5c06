"""The one launchable: `accelerate launch train.py --config configs/quickstart.yaml optimizer.lr=1e-4`."""

import sys

from trainer.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
