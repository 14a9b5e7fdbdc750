"""Hugging Face: the quantization config and quantizer that transformers loads a packed model with."""
