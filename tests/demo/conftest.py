"""The shipped demo model and its tokenizer, loaded once for the tests of this folder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtipcli.demo

MODEL_DIRECTORY = Path(qtipcli.demo.__file__).parent / "model"


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    return MODEL_DIRECTORY


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)


@pytest.fixture(scope="session")
def demo_model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, local_files_only=True, dtype=torch.float32).eval()
