"""Where the GPU kernels' tests run: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda" on NVIDIA and AMD GPUs; "cpu" means the interpreter (tests/conftest.py has asked for it)."""
    return "cuda" if torch.cuda.is_available() else "cpu"
