"""Rounding of matrices: tensors in, tensors out; no files, no models, no printing.

Dimension key of the package: O outputs, I inputs; P and J, the same padded to multiples of 16.
"""
