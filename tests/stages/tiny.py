"""Owns the tiny models that the stages' and the command line's tests take through the whole pipeline, and how they run qtip.

Two blocks of width 64, untrained, with the demo model's tokenizer: a whole run takes half a second once everything is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qtipcli.demo

DEMO_MODEL = Path(qtipcli.demo.__file__).parent / "model"
ROOT = Path(__file__).parents[2]
VOCABULARY = 3072
FAST_OPTIONS = ("--state-bits", "8", "--samples", "6", "--context", "32")
"""What every run of these tests says: a small trellis, little text."""

SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KINDS = {
    "llama": ("llama", SETTINGS | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", SETTINGS | {"tie_word_embeddings": False}),
}
"""An intermediate size that no tile divides in both; a tied head in one, biases and a head of its own in the other."""


def save_model(kind: str, directory: Path, changes: dict[str, Any] | None = None, **how: Any) -> Path:
    """A random float32 model of this kind with tokenizer. The same bytes on every call.

    changes: to its config. how: goes to save_pretrained.
    """
    name, settings = KINDS[kind][0], KINDS[kind][1] | (changes or {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory, **how)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / file, directory / file)
    return directory


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch sums in one order: jobs that are compared byte by byte must have run with as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_text(path: Path) -> Path:
    """A few hundred windows of Python."""
    path.write_text("".join(f"def function_{n}(x):\n    return x * {n} + {n % 7}\n\n" for n in range(400)))
    return path


def environment() -> dict[str, str]:
    """For subprocesses: the checkout importable, no hub, one OpenMP thread, so that a busy machine does not stall them."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "kernels", "tests"))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def snapshot(directory: Path) -> dict[str, str]:
    """Path below `directory` -> sha256, for every file."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def logits(directory: Path) -> torch.Tensor:
    """Of the model in `directory` as transformers loads it in float32, on fixed tokens; float32 [2, 24, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return logits_of(model)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """As `logits`, of a model in memory."""
    tokens = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits
