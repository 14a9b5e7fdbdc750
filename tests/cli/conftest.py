"""The fixtures of stages/fixtures.py, for this folder."""

from stages.fixtures import calm, packed, qtip, quantize, text, three, tiny_model

__all__ = ["calm", "packed", "qtip", "quantize", "text", "three", "tiny_model"]
