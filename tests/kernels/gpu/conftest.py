"""Where the GPU kernels' tests run: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda" on NVIDIA and AMD GPUs; "cpu" means the interpreter (tests/conftest.py has asked for it)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def half_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes of 16 bits whose rounding is worth comparing: Triton's interpreter cuts bfloat16 where a GPU rounds it."""
    return (torch.float16,) if device == "cpu" else (torch.float16, torch.bfloat16)
