"""The loop and what it needs: experiment tree, data, models, precision, checkpoints, metrics, report.

Importing this package imports nothing heavy, so that `train.py --help` and configuration errors answer at once.
"""

__version__ = "0.1.0"
