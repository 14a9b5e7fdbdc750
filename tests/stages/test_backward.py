"""The Hessians of layers' outputs. Oracle: one ordinary backward pass of the whole model, with the same drawn tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtipcli.stages.backward import drawn_gradient
from stages.fixtures import Qtip
from stages.tiny import snapshot

COMMAND = ("--samples", "6", "--context", "32", "--two-sided", "--out", "hessians")


@pytest.fixture
def hessians(qtip: Qtip, tiny_model: Path, text: Path, tmp_path: Path) -> Path:
    assert qtip("calibrate", tiny_model, "--data", text, *COMMAND).status == 0
    return tmp_path / "hessians"


def test_they_are_those_of_a_whole_backward_pass(hessians: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    sums = dict.fromkeys(names, 0.0)

    def watch(name: str) -> None:
        def keep(gradient: torch.Tensor) -> None:
            rows = gradient.flatten(0, 1)
            sums[name] = sums[name] + rows.T @ rows

        model.get_submodule(name).register_forward_hook(lambda _, args, output: output.register_hook(keep) and None)

    for name in names:
        watch(name)
    tokens = load_file(hessians / "tokens.safetensors")["tokens"]
    for batch, rows in enumerate(tokens.split(1)):
        logits = model(input_ids=rows, use_cache=False).logits
        logits.backward(drawn_gradient(logits.detach(), batch))
    for name in names:
        shard = load_file(hessians / f"outputs-0000{name.split('.')[2]}.safetensors")
        torch.testing.assert_close(shard[name], sums[name] / tokens.numel(), rtol=1e-3, atol=1e-7)


def test_the_gradient_is_that_of_the_cross_entropy_of_tokens_drawn_from_the_predictions() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    found = drawn_gradient(logits.detach(), 0)
    drawn = found.argmin(-1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-6)
    many = drawn_gradient(logits.detach()[0, :1].expand(40_000, -1), 1).argmin(-1)
    share = torch.bincount(many, minlength=7) / len(many)
    # Five standard errors of a share of 40,000 draws.
    torch.testing.assert_close(share, torch.softmax(logits.detach()[0, 0], -1), rtol=0, atol=5 * 0.5 / 200)


def test_they_resume_to_the_same_bytes(hessians: Path, qtip: Qtip, tiny_model: Path, text: Path) -> None:
    oracle = snapshot(hessians)
    ledger = hessians / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    assert "outputs-00000" in lines[-1]  # the last block comes first
    ledger.write_text("".join(lines[:-1]))
    assert qtip("calibrate", tiny_model, "--data", text, *COMMAND).status == 0
    assert {name: digest for name, digest in snapshot(hessians).items() if "ledger" not in name} == {
        name: digest for name, digest in oracle.items() if "ledger" not in name
    }


def test_quantize_adds_them_where_it_needs_them(quantize: Qtip, hessians: Path, tmp_path: Path) -> None:
    outcome = quantize("--out", "out", "--hessians", "hessians", "--two-sided")
    assert outcome.status == 0, outcome.err
    plain = quantize("--out", "plain", "--hessians", "plain-hessians", "--one-sided")
    assert plain.status == 0
    assert not list((tmp_path / "plain-hessians").glob("outputs-*"))
    outcome = quantize("--out", "added", "--hessians", "plain-hessians", "--two-sided")
    assert outcome.status == 0, outcome.err
    assert snapshot(tmp_path / "added")["model.safetensors"] == snapshot(tmp_path / "out")["model.safetensors"]
    assert snapshot(tmp_path / "added")["model.safetensors"] != snapshot(tmp_path / "plain")["model.safetensors"]


def test_one_window_is_too_little(qtip: Qtip, tiny_model: Path, text: Path) -> None:
    outcome = qtip("calibrate", tiny_model, "--data", text, "--samples", "1", "--context", "32", "--two-sided")
    assert outcome.status == 1
    assert "one window of text leaves none to judge with" in outcome.err
    assert "--one-sided" in outcome.err
