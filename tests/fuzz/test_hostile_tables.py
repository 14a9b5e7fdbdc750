"""Tables that lie: sizes that no model has, settings that contradict, modules that are not there or twice, tensors that are not
finite. The promises are those of docs/format.md, section 9."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.tensors import check_tensors
from qtipcli.model.source import ModelSource
from qtipcli.untrusted import refuse_impossible

INDEX = "model.safetensors.index.json"


# Sizes


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_hidden_layers": 1e12}},
        {"n_layer": 5000},
        {"head_dim": 10**10},
        {"num_local_experts": 10**8},
        {"hidden_size": 10**15},
        {"vocab_size": 10**12},
    ],
)
def test_sizes_that_no_model_has(fields: dict[str, Any], packed: Path, valid_directories: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="no model has more than"):
        refuse_impossible(fields, "x")
    source = Path(shutil.copytree(valid_directories / "source", tmp_path / "source"))
    for directory in (source, packed):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(CorruptError, match="no model has more than"):
        ModelSource.open(source)
    # In transformers' own hands, before it builds the model; in older ones it is transformers that fails.
    if "text_config" not in fields and "n_layer" not in fields and "num_local_experts" not in fields:
        with pytest.raises(QtipError, match="no model has more than"):
            AutoModelForCausalLM.from_pretrained(packed)


def test_the_largest_models_pass() -> None:
    refuse_impossible(
        {
            "num_hidden_layers": 126, "hidden_size": 16_384, "vocab_size": 262_144, "intermediate_size": 53_248,
            "n_routed_experts": 384, "kv_lora_rank": 512, "rope_theta": 10**11, "max_position_embeddings": 10**7,
        },
        "x",
    )  # fmt: skip


def test_tables_of_layers_that_no_kernel_reaches() -> None:
    for shape in ([10**15, 10**15], [10**400, 16], [2**31, 16]):
        with pytest.raises(QtipError, match="shape"):
            QtipConfig(**one_layer(shape))


def one_layer(shape: list[int], **settings: Any) -> dict[str, Any]:
    written = QtipConfig.from_layouts({}, {}).to_dict()
    return written | {"layers": {"a": {"shape": shape, **settings}}}


@pytest.mark.parametrize(
    "settings",
    [
        {"state_bits": 40}, {"bits_per_step": 0}, {"bits_per_step": 10**400}, {"weights_per_step": -1},
        {"code": ["hyb"]}, {"code": {}}, {"code": "__class__"},
        {"transform_in": "block-1" + "0" * 5000}, {"transform_in": ["full"]}, {"transform_out": "block-99999999999"},
    ],
)  # fmt: skip
def test_settings_that_contradict(settings: dict[str, Any]) -> None:
    with pytest.raises(QtipError, match="layer a in quantization_config"):
        QtipConfig(**one_layer([64, 64], **settings))


@pytest.mark.parametrize("bits", [10**400, float("inf"), float("nan"), True, None, "2", -1, [2]])
def test_rates_that_are_no_rates(bits: Any) -> None:
    with pytest.raises(QtipError, match="bits_per_weight"):
        QtipConfig(**QtipConfig.from_layouts({}, {}).to_dict() | {"bits_per_weight": bits})


@pytest.mark.parametrize("name", ["self", "__class__", "return_unused_kwargs_", "\ud800"])
def test_fields_with_odd_names(name: str) -> None:
    with pytest.raises(QtipError, match="unknown field"):
        QtipConfig(**QtipConfig.from_layouts({}, {}).to_dict() | {name: 1})


# Modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.base_model.layers.0.mlp.up_proj", "has no layer|are one module"),
        ("base_model.layers.0.mlp.up_proj", "are one module"),
        ("__class__", "has no layer"),
        ("", "not a linear"),
        ("model.layers.0.mlp.u._proj", "has no layer"),
        ("model.layers.0.mlp.up_proj.weight", "has no layer"),
        ("model.layers", "not a linear"),
        ("model.layers.0.mlp", "not a linear"),
        (".*", "has no layer"),
    ],
)
def test_layers_that_are_no_linears_or_twice_the_same(name: str, words: str, packed: Path) -> None:
    """The tensors are there under that name, so that nothing else is wrong."""
    config = json.loads((packed / "config.json").read_text())
    fields = QtipConfig(**config["quantization_config"])
    layouts = fields.layouts()
    original = "model.layers.0.mlp.up_proj"
    config["quantization_config"] = QtipConfig.from_layouts(layouts | {name: layouts[original]}, fields.not_converted).to_dict()
    (packed / "config.json").write_text(json.dumps(config))
    index = json.loads((packed / INDEX).read_text())
    extra = {}
    for file in packed.glob("*.safetensors"):
        extra |= {
            key.replace(original, name): value for key, value in load_file(file).items() if key.startswith(f"{original}.")
        }
    save_file(extra, packed / "extra.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (packed / INDEX).write_text(json.dumps(index))
    with pytest.raises(QtipError, match=words):
        AutoModelForCausalLM.from_pretrained(packed)


# Tensors


def test_a_tensor_in_two_files_is_refused(packed: Path) -> None:
    first = sorted(packed.glob("*.safetensors"))[0]
    shutil.copyfile(first, packed / "again.safetensors")
    with pytest.raises(CorruptError, match=r"is in .* and in"):
        check_tensors(
            QtipConfig(**json.loads((packed / "config.json").read_text())["quantization_config"]).layouts(),
            sorted(packed.glob("*.safetensors")),
        )


@pytest.mark.parametrize("part", ["scale_in", "scale_out", "lut"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scales_and_tables_that_are_not_finite(part: str, bad: float, packed: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"
    file = next(file for file in packed.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name].view(-1)[3] = bad
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CorruptError, match=re.escape(f"tensor {name}")):
        AutoModelForCausalLM.from_pretrained(packed)


def test_any_words_decode(packed: Path) -> None:
    """Every ring is a valid walk: a model with random words loads, and computes finite numbers."""
    generator = torch.Generator().manual_seed(0)
    for file in packed.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(".trellis"):
                tensors[name] = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator).to(torch.int32)
        save_file(tensors, file, {"format": "pt"})
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("ranks", [{"r": 10**12}, {"rank_pattern": {"q_proj": 10**12}}, {"rank_pattern": {"q_proj": "8"}}])
def test_an_adapter_of_a_rank_that_no_matrix_has(ranks: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from qtipcli.hub.lora import packed_lora

    with pytest.raises(QtipError, match="a LoRA of rank"):
        packed_lora(peft.LoraConfig(**ranks))
