"""Execute: run a model whose blocks follow their recompute schedules."""
