"""Every causal architecture that the installed transformers knows, through everything that a run does with it."""
