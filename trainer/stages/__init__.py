"""A student that is made in several stages: cut, trained, quantized, exported."""
