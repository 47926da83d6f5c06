"""One quantizer object for training and for export."""
