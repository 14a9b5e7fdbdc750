"""Measures the peak memory of block tuning on a random Llama of 1 B parameters in bf16; prints one JSON object.

    PYTHONPATH=src:kernels:tests python -m stages.tune_memory --blocks 2

Any words are valid walks, so the packed layers are random: rounding a billion weights would take an hour and tell nothing.
Memory does not grow from block to block, so that a few blocks show the peak of all sixteen.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qtipcli.config import BlockTuning
from qtipcli.model.linears import find_linears
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.stages.progress import Silent
from qtipcli.stages.tune_blocks import BlockTuner
from qtipcli_kernels.spec import TrellisSpec

SETTINGS = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 15,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""Llama 3.2 1B's blocks: 1.04 B parameters with embedding and head."""


def save_random_model(directory: Path, settings: Mapping[str, int | bool] = SETTINGS) -> int:
    """Write the model, one shard a block so that this takes no memory itself; returns its parameters."""
    config = AutoConfig.for_model("llama", **settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        file = f"{'.'.join(name.split('.')[:3])}.safetensors" if ".layers." in name else f"{name}.safetensors"
        files.setdefault(file, {})[name] = tensor.shape
    weight_map = {}
    for file, shapes in files.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else 0.02 * torch.randn(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() for shapes in files.values() for shape in shapes.values())


def random_layers(skeleton: Skeleton, index: int) -> dict[str, TrellisLinear]:
    """Packed layers of the block's shapes, 2 bits, random walks, outputs of the size of the original's."""
    prefix, block = skeleton.blocks[index]
    layers = {}
    for name, linear in find_linears(block).items():
        layer = TrellisLinear(PackedLayout(linear.in_features, linear.out_features, TrellisSpec("1mad", 2)))
        layer.trellis.random_(-(2**31), 2**31 - 1)
        layer.scale_out.fill_(0.02)
        layers[f"{prefix}.{name}"] = layer
    return layers


def run(blocks: int, rows: int, context: int) -> dict[str, float]:
    """Tune the first `blocks` blocks on `rows` windows; the last is held out."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        parameters = save_random_model(model)
        before = _peak()
        skeleton = Skeleton(ModelSource.open(model))
        tokens = torch.randint(0, SETTINGS["vocab_size"], (rows, context))
        tuner = BlockTuner(skeleton, tokens, 1, BlockTuning(epochs=1), Path(folder), Silent(), memory_gib=1.0)
        for index in range(blocks):
            tuner.tune(index, random_layers(skeleton, index), {}, {})
        tuner.close()
    return {"parameters": parameters, "blocks": blocks, "context": context, "before_GB": before, "peak_GB": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--context", type=int, default=2048)
    asked = parser.parse_args()
    print(json.dumps(run(asked.blocks, asked.rows, asked.context)))
