"""What the quantize stage hands to rounding: corrected weights, inputs behind rounded layers, and the outputs' Hessians.

Oracles: stand-ins that note what they are given; the shards of the calibrate stage; a second job that differs in one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtipcli.quant import matrix
from qtipcli.quant.output_side import OutputHessian
from stages.fixtures import Qtip

Handed = list[tuple[dict[str, torch.Tensor], torch.Tensor, Mapping[str, OutputHessian] | None]]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    """(weights, Hessian, Hessians of outputs) of each call of round_group, in order."""
    seen: Handed = []

    def spy(weights, hessian_II, specs, settings, luts, outputs, encode, consume):
        seen.append(({name: weight.clone() for name, weight in weights.items()}, hessian_II.clone(), outputs))
        return matrix.round_group(weights, hessian_II, specs, settings, luts, outputs, encode, consume)

    monkeypatch.setattr("qtipcli.stages.rounder.round_group", spy)
    return seen


@pytest.fixture
def corrections(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every corrected matrix, in order: the original less its first row, which no least-squares solution is."""
    made: list[torch.Tensor] = []

    def stand_in(weight_OI, seen, heldout):
        made.append(torch.cat([torch.zeros_like(weight_OI[:1]), weight_OI[1:]]))
        return made[-1], 0.25

    monkeypatch.setattr("qtipcli.stages.rounder.corrected", stand_in)
    return made


def test_what_is_rounded_is_what_was_corrected(
    quantize: Qtip, handed: Handed, corrections: list[torch.Tensor], tmp_path: Path
) -> None:
    assert quantize("--out", "out").status == 0
    weights = [weight for group, _, _ in handed for weight in group.values()]
    assert len(weights) == len(corrections) == 14
    assert all(torch.equal(rounded, made) for rounded, made in zip(weights, corrections, strict=True))


def test_without_a_quantized_prefix_nothing_is_corrected(quantize: Qtip, handed: Handed, tiny_model: Path) -> None:
    assert quantize("--out", "out", "--original-prefix", "--one-sided").status == 0
    original = load_file(tiny_model / "model.safetensors")
    for group, _, outputs in handed:
        assert outputs is None
        assert all(torch.equal(weight, original[f"{name}.weight"]) for name, weight in group.items())


def test_every_layer_is_rounded_under_its_own_outputs_hessian(quantize: Qtip, handed: Handed, tmp_path: Path) -> None:
    assert quantize("--out", "out", "--hessians", "hessians").status == 0
    stored = {}
    for index in range(2):
        stored |= load_file(tmp_path / "hessians" / f"outputs-0000{index}.safetensors")
    names = [name for group, _, outputs in handed for name in group if outputs is not None]
    assert sorted(names) == sorted(stored)
    for _, _, outputs in handed:
        assert all(torch.equal(output.hessian_OO, stored[name]) for name, output in outputs.items())


def test_a_layer_is_rounded_on_what_the_stored_ones_before_it_give(quantize: Qtip, handed: Handed, tmp_path: Path) -> None:
    """Two jobs that differ in one layer alone: what is called before it is given the same, what is called after it is not."""
    changed = "model.layers.0.self_attn.o_proj"
    assert quantize("--out", "one").status == 0
    assert quantize("--out", "other", "--layer", f"{changed}=4").status == 0
    assert len(handed) == 16
    differ = [
        next(iter(one[0])) for one, other in zip(handed[:8], handed[8:], strict=True) if not torch.equal(one[1], other[1])
    ]
    after = [
        "0.mlp.gate_proj",
        "0.mlp.down_proj",
        "1.self_attn.q_proj",
        "1.self_attn.o_proj",
        "1.mlp.gate_proj",
        "1.mlp.down_proj",
    ]
    assert differ == [f"model.layers.{name}" for name in after]
