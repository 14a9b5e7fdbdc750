"""Measures the peak memory of an evaluation of a plain model, whole or block by block; prints one JSON object.

    PYTHONPATH=src:kernels:tests python -m stages.stream_memory MODEL [--stream]

MODEL is a directory, such as stages.tune_memory.save_random_model writes.
"""

from __future__ import annotations

import argparse
import json
import resource

import torch
from transformers import AutoConfig

from qtipcli.data.windows import Windows
from qtipcli.stages import blockwise, evaluate
from qtipcli.stages.progress import Silent


def run(model: str, stream: bool, rows: int, context: int) -> dict[str, float]:
    """The perplexity of random tokens, and the process's peak before the model was opened and at the end."""
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    tokens = torch.randint(0, vocabulary, (rows, context), generator=torch.Generator().manual_seed(0))
    windows = Windows(tokens, "random", rows, None, "none", "0" * 64)
    before = _peak()
    logits = blockwise.open_model(model, None, False, stream, Silent())(windows)
    predictions = evaluate.predict(logits, windows)
    result = evaluate.summarize(predictions, evaluate.protocol_of(windows, logits, None), None)
    return {"perplexity": result.perplexity, "before_MB": before, "peak_MB": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    asked = parser.parse_args()
    print(json.dumps(run(asked.model, asked.stream, asked.rows, asked.context)))
