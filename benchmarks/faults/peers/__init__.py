"""Training scripts on other libraries, written as their own documentation shows, to be killed as ours are."""
