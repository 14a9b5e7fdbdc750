"""Modules that hold packed weights: tensors in, tensors out. Knows nothing of files or of transformers."""
