"""The fixtures of stages/fixtures.py, for this folder."""

from stages.fixtures import calm, interrupted_at_once, own_packed, packed, qtip, quantize, talking, text, three, tiny_model

__all__ = ["calm", "interrupted_at_once", "own_packed", "packed", "qtip", "quantize", "talking", "text", "three", "tiny_model"]
