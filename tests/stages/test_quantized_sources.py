"""A model that is stored in FP8 or MXFP4 goes through everything as the bfloat16 model does that it stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model.test_dequantized import fp8_copy
from model.test_source import edit_config
from safetensors.torch import load_file, save_file

from qtipcli.model.source import SINGLE_FILE, ModelSource

from . import families, tiny
from .fixtures import Qtip


def fp8_twins(directory: Path) -> tuple[Path, Path]:
    """The same model with its linears in FP8, and in bfloat16."""
    stored = tiny.save_model("qwen2", directory / "stored")
    plain = Path(shutil.copytree(stored, directory / "plain"))
    expected = fp8_copy(stored)
    save_file(load_file(plain / SINGLE_FILE) | expected, plain / SINGLE_FILE, {"format": "pt"})
    return stored, plain


def mxfp4_twins(directory: Path) -> tuple[Path, Path]:
    """gpt-oss with its experts in MXFP4, and in bfloat16."""
    plain = families.save("gpt-oss", directory / "plain", {"intermediate_size": 64})
    stored = Path(shutil.copytree(plain, directory / "stored"))
    tensors = load_file(stored / SINGLE_FILE)
    draw = torch.Generator().manual_seed(0)
    names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for name in names:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(120, 124, groups, dtype=torch.uint8, generator=draw)
    save_file(tensors, stored / SINGLE_FILE, {"format": "pt"})
    edit_config(stored, quantization_config={"quant_method": "mxfp4"})
    source = ModelSource.open(stored)
    assert names
    expected = {name: source.read(name) for name in names}
    save_file(load_file(plain / SINGLE_FILE) | expected, plain / SINGLE_FILE, {"format": "pt"})
    return stored, plain


@pytest.fixture(scope="module", params=[fp8_twins, mxfp4_twins])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model as it is stored, and plain."""
    return request.param(tmp_path_factory.mktemp("twins"))


def test_it_is_packed_to_the_same_bytes(twins: tuple[Path, Path], qtip: Qtip, text: Path, tmp_path: Path) -> None:
    packed, left = [], "model.layers.0.self_attn.o_proj"
    for model in twins:
        out = tmp_path / model.name
        options = ("--bits", 2, "--data", text, *tiny.FAST_OPTIONS, "--skip", left, "--out", out)
        assert qtip("quantize", model, *options).status == 0
        packed.append(load_file(out / SINGLE_FILE))
    assert packed[0].keys() == packed[1].keys()
    for name, tensor in packed[0].items():
        assert torch.equal(tensor, packed[1][name]), name
    # What was left is stored as what it stands for.
    assert torch.equal(packed[0][f"{left}.weight"], ModelSource.open(twins[0]).read(f"{left}.weight"))


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_it_is_what_a_packed_model_is_held_against(how: str, twins: tuple[Path, Path], qtip: Qtip, text: Path) -> None:
    """The distance of a model to the same model is nothing."""
    stored, plain = twins
    done = qtip("eval", plain, "--base", stored, "--data", text, "--context", 32, "--windows", 4, how, "--json")
    assert done.status == 0, done.err
    (row,) = json.loads(done.out)["rows"]
    assert row["perplexity"] == pytest.approx(row["base_perplexity"], rel=1e-6)
    assert abs(row["kl_mean"]) < 1e-6
