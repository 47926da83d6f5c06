"""The training loop and everything around it: experiment tree, data, models, precision, checkpoints, metrics, report.

Importing this package imports nothing heavy, so that `train.py --help` and configuration errors appear at once.
"""

__version__ = "0.1.0"
