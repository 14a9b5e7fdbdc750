"""Rounding of matrices: tensors in, tensors out; no files, no models, no printing.

Dimension key of the package: O outputs, I inputs, padded to multiples of 16; B = 16, the columns of one block of a factorisation.
"""
