"""Quantization-aware training and post-training quantization; one quantizer object serves training and export."""
