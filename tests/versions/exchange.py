"""A packed model and its logits, written by one version of transformers and loaded by another.

PYTHONPATH=src:kernels:tests python -m versions.exchange write DIRECTORY
PYTHONPATH=src:kernels:tests python -m versions.exchange read DIRECTORY ...

`read` exits with 1 where a model does not load, or one bit of its logits differs from what the writer computed before it saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from hub import packed_llama
from hub.test_outer_reload import make as make_outer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

MODELS = {
    "linears": lambda: packed_llama.make()[0],
    "tied embedding": lambda: make_outer(tied=True),
    "embedding and head": lambda: make_outer(tied=False),
}


def write(directory: Path) -> None:
    """Each of MODELS in a directory of its own, in several shards, with the logits that it gave in memory."""
    for name, make in MODELS.items():
        model = make()
        home = directory / name
        model.save_pretrained(home, max_shard_size="20KB")
        save_file({"logits": packed_llama.logits(model)}, home / "logits.reference")


def differences(directory: Path) -> dict[str, str]:
    """Model -> what is wrong with it, for those of MODELS below `directory` that differ from what was written."""
    wrong = {}
    for name in MODELS:
        expected = load_file(directory / name / "logits.reference")["logits"]
        logits = packed_llama.logits(AutoModelForCausalLM.from_pretrained(directory / name))
        if not torch.equal(logits, expected):
            wrong[name] = f"logits differ by up to {(logits - expected).abs().max():.3g}"
    return wrong


def main(action: str, *directories: str) -> int:
    if action == "write":
        write(Path(directories[0]))
        return 0
    status = 0
    for directory in map(Path, directories):
        for name in MODELS.keys() & (wrong := differences(directory)).keys():
            print(f"{directory.name} -> {transformers.__version__}: {name}: {wrong[name]}")
        print(f"{directory.name} -> {transformers.__version__}: {len(MODELS) - len(wrong)} of {len(MODELS)} equal bit for bit")
        status = status or bool(wrong)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
