"""Tests of the rounding of matrices."""
