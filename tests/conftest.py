"""What every test runs under: no network, uninitialized memory that shows, quiet libraries."""

import os

# Read at import by these libraries, so before anything else is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; tests share their cores

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined: without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def poisoned_empty():
    """torch.empty holds NaN (or the largest integer), so that a result that reads it cannot pass by luck."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
