"""The documents, and the code that writes parts of them."""
