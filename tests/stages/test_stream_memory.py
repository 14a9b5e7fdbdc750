"""The memory of an evaluation block by block. Oracle: the bytes of the model's parts, and the operating system's peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.tiny import environment
from stages.tune_memory import save_random_model

SETTINGS = {
    "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
BLOCK_MB = 4 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096) / 1e6
OUTER_MB = 4 * 2 * 8000 * 1024 / 1e6
OTHER_MB = 120
"""Logits in float64 and their softmax, hidden states, the file that is mapped while a tensor is read, the allocator's."""


def peak(model: Path, *options: str) -> dict[str, float]:
    command = [sys.executable, "-m", "stages.stream_memory", str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_block_by_block_takes_two_blocks_and_what_is_outside_of_them(tmp_path):
    save_random_model(tmp_path, SETTINGS)
    whole, streamed = peak(tmp_path), peak(tmp_path, "--stream")
    assert streamed["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)
    assert whole["peak_MB"] - whole["before_MB"] > 16 * BLOCK_MB
    assert streamed["peak_MB"] - streamed["before_MB"] < 2 * BLOCK_MB + OUTER_MB + OTHER_MB
