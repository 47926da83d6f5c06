"""Execute: a model whose blocks run by their schedules."""
