"""One quantiser object for training and for export."""
