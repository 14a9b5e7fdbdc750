"""One operator: `reference.py` by definition in torch, `cpu.py` its Numba twin, same names and contracts."""
