"""Trellis-coded weights: definitions, references, CPU kernels and the custom ops that choose between them.

Usable on its own: knows torch, numba and numpy, and nothing of `qtipcli`.
"""
