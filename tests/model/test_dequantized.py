"""FP8 and MXFP4 checkpoints read as what they stand for. Oracle: the formats' definitions, value by value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtipcli.errors import CorruptError, QtipError
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import SINGLE_FILE, ModelSource

from .test_source import Checkpoint, copy, edit_config  # noqa: F401, copy is a fixture

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"}


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(float8 values, scales): each block's largest magnitude becomes 448."""
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    values, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[place].abs().max() / 448
            values[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def fp8_copy(directory: Path) -> dict[str, Tensor]:
    """Store the linears of a checkpoint's blocks in FP8; returns what they stand for, by name."""
    tensors, expected = load_file(directory / SINGLE_FILE), {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            values, scales = to_fp8(weight.float(), (32, 48))
            tensors |= {name: values, f"{name}_scale_inv": scales}
            spread = torch.tensor(
                [[float(scales[i // 32, j // 48]) for j in range(weight.shape[1])] for i in range(len(weight))]
            )
            expected[name] = (values.float() * spread).to(torch.bfloat16)
    save_file(tensors, directory / SINGLE_FILE, {"format": "pt"})
    edit_config(directory, quantization_config=FP8)
    return expected


def test_fp8_blocks_are_values_times_their_scales(copy: Path) -> None:  # noqa: F811
    expected = fp8_copy(copy)
    source = ModelSource.open(copy)
    assert expected
    assert not any("scale" in name for name in source.tensor_names)
    assert not hasattr(source.config, "quantization_config")
    for name, weight in expected.items():
        assert source.shape(name) == tuple(weight.shape)
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), weight)
        assert torch.equal(source.read(name, 5), weight[5])
    skeleton = Skeleton(source)
    block = skeleton.materialize(0)
    name = f"{skeleton.blocks[0][0]}.mlp.up_proj.weight"
    assert torch.equal(block.mlp.up_proj.weight, expected[name].float())


@pytest.mark.parametrize("shape", [(1,), (), "rows"])
def test_one_scale_for_all_and_one_a_row(shape: object, copy: Path) -> None:  # noqa: F811
    tensors, name = load_file(copy / SINGLE_FILE), "model.layers.0.mlp.up_proj.weight"
    values = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(len(values), 1) if shape == "rows" else torch.tensor(0.37).reshape(shape)
    save_file(tensors | {name: values, f"{name}_scale": scales}, copy / SINGLE_FILE, {"format": "pt"})
    edit_config(copy, quantization_config={"quant_method": "fp8"})
    assert torch.equal(ModelSource.open(copy).read(name), (values.float() * scales).to(torch.bfloat16))


def test_scales_that_are_exponents(copy: Path) -> None:  # noqa: F811
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no E8M0")
    tensors, name = load_file(copy / SINGLE_FILE), "model.layers.0.mlp.up_proj.weight"
    values = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    exponents = torch.arange(120, 120 + len(values), dtype=torch.uint8).clamp(max=130).reshape(-1, 1)
    stored = exponents.view(torch.float8_e8m0fnu)
    save_file(tensors | {name: values, f"{name}_scale_inv": stored}, copy / SINGLE_FILE, {"format": "pt"})
    edit_config(copy, quantization_config={"quant_method": "fp8"})
    expected = values.float() * 2.0 ** (exponents.float() - 127)
    assert torch.equal(ModelSource.open(copy).read(name), expected.to(torch.bfloat16))


def test_mxfp4_is_read_by_its_definition(copy: Path) -> None:  # noqa: F811
    """gpt-oss's layout: [experts, outputs, inputs / 32, 16] bytes, lower half first; the model multiplies from the right."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(120, 131, (3, 6, 2), dtype=torch.uint8, generator=draw)
    tensors = load_file(copy / SINGLE_FILE)
    save_file(tensors | {"experts_blocks": blocks, "experts_scales": scales}, copy / SINGLE_FILE, {"format": "pt"})
    edit_config(copy, quantization_config={"quant_method": "mxfp4"})
    source = ModelSource.open(copy)
    found = source.read("experts")
    assert source.shape("experts") == tuple(found.shape) == (3, 64, 6)
    for expert in range(3):
        assert torch.equal(source.read("experts", expert), found[expert])
        for output in range(6):
            for column in range(64):
                byte = int(blocks[expert, output, column // 32, column % 32 // 2])
                bits = byte >> 4 if column % 2 else byte & 15
                exponent, mantissa = bits >> 1 & 3, bits & 1
                magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
                value = (-1.0 if bits & 8 else 1.0) * magnitude * 2.0 ** (int(scales[expert, output, column // 32]) - 127)
                assert float(found[expert, column, output]) == value


def test_scales_that_do_not_fit_are_damage(copy: Path) -> None:  # noqa: F811
    fp8_copy(copy)
    tensors, name = load_file(copy / SINGLE_FILE), "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(tensors | {name: torch.ones(7, 7)}, copy / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CorruptError, match=r"scales of model.layers.0.mlp.up_proj.weight are \[7, 7\]"):
        ModelSource.open(copy)


@pytest.mark.parametrize(
    ("values", "scales"),
    [((16,), (3,)), ((0, 16), (2, 2)), ((4, 4), (4,)), ((2, 4, 4), (3, 4, 1)), ((4, 4), (4, 0))],
)
def test_shapes_that_no_scales_have_are_damage(values: tuple[int, ...], scales: tuple[int, ...], copy: Path) -> None:  # noqa: F811
    tensors = load_file(copy / SINGLE_FILE) | {"w": torch.zeros(values).to(torch.float8_e4m3fn), "w_scale": torch.ones(scales)}
    save_file(tensors, copy / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CorruptError, match="the scales of w are"):
        ModelSource.open(copy)


def test_blocks_of_other_numbers_are_damage(copy: Path) -> None:  # noqa: F811
    tensors = load_file(copy / SINGLE_FILE) | {"w_blocks": torch.zeros(2, 4, 1, 16), "w_scales": torch.zeros(2, 4, 1)}
    save_file(tensors, copy / SINGLE_FILE, {"format": "pt"})
    edit_config(copy, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CorruptError, match="w_blocks is"):
        ModelSource.open(copy)


def test_fp8_without_scales_is_refused_by_name(copy: Path) -> None:  # noqa: F811
    fp8_copy(copy)
    tensors = load_file(copy / SINGLE_FILE)
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, copy / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(QtipError, match=r"up_proj\.weight is stored in FP8, and there is no"):
        ModelSource.open(copy)


def test_other_methods_are_still_refused(copy: Path) -> None:  # noqa: F811
    config = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtipError, match="already quantized"):
        ModelSource.open(copy)
