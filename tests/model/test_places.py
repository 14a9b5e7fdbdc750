"""The place behind a linear where its output counts one to one. Oracle: the architectures' own source, written down here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtipcli.model.inputs import capture_first_inputs, run_block
from qtipcli.model.places import OUTPUT, find_places, look, signature
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource

from .tiny_models import CONTEXT, token_rows

Checkpoint = Callable[[str], Path]

LLAMA = {
    "self_attn.q_proj": None,
    "self_attn.k_proj": None,
    "self_attn.v_proj": None,
    "self_attn.o_proj": "post_attention_layernorm",
    "mlp.gate_proj": None,
    "mlp.up_proj": None,
    "mlp.down_proj": OUTPUT,
}
PLACES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    # Norms of queries and keys see them by heads, in another shape.
    "qwen3": LLAMA,
    # A norm stands between each output and what it is added to, which therefore does not move by the noise.
    "gemma3_text": dict.fromkeys(LLAMA),
    "olmo2": dict.fromkeys(LLAMA),
    # Attention and MLP are added to the same hidden states.
    "gpt_neox": {
        "attention.query_key_value": None,
        "attention.dense": OUTPUT,
        "mlp.dense_h_to_4h": None,
        "mlp.dense_4h_to_h": OUTPUT,
    },
    # Experts are given other tokens in each stream; the router is no linear.
    "mixtral": {name: place for name, place in LLAMA.items() if name.startswith("self_attn")},
}  # fmt: skip


def at_first_block(directory: Path) -> tuple[Skeleton, object]:
    skeleton = Skeleton(ModelSource.open(directory))
    (one_input,) = capture_first_inputs(skeleton, token_rows())
    skeleton.materialize(0)
    return skeleton, one_input


@pytest.mark.parametrize("label", PLACES)
def test_places_are_those_of_the_architecture(checkpoint: Checkpoint, label: str) -> None:
    skeleton, one_input = at_first_block(checkpoint(label))
    found = find_places(skeleton, 0, one_input)
    assert found == PLACES[label]


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_what_is_seen_moves_by_what_is_added_to_the_output(checkpoint: Checkpoint, name: str) -> None:
    skeleton, one_input = at_first_block(checkpoint("llama"))
    place = find_places(skeleton, 0, one_input)[name]
    inputs, before = look(skeleton, 0, one_input, [name], [place])
    linear = skeleton.blocks[0][1].get_submodule(name)
    change = 0.1 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(2))
    linear.weight.data = linear.weight.data + change
    _, after = look(skeleton, 0, one_input, [name], [place])
    (x_NI,) = inputs[name]
    assert x_NI.shape == (len(token_rows()) * CONTEXT, linear.in_features)
    torch.testing.assert_close(after[place] - before[place], x_NI @ change.T, rtol=1e-4, atol=1e-4)


def test_a_run_ends_once_all_is_seen(checkpoint: Checkpoint) -> None:
    skeleton, one_input = at_first_block(checkpoint("llama"))
    calls: list[str] = []
    for name in ("q_proj", "o_proj"):
        linear = skeleton.blocks[0][1].get_submodule(f"self_attn.{name}")
        linear.register_forward_hook(lambda *_, name=name: calls.append(name))
    look(skeleton, 0, one_input, ["self_attn.o_proj"], [])
    assert calls == ["q_proj"]
    look(skeleton, 0, one_input, ["self_attn.o_proj"], [], once=False)
    assert calls == ["q_proj", "q_proj", "o_proj"]


def test_looking_changes_nothing(checkpoint: Checkpoint) -> None:
    skeleton, one_input = at_first_block(checkpoint("llama"))
    before = run_block(skeleton, 0, one_input)
    look(skeleton, 0, one_input, ["self_attn.q_proj"], ["post_attention_layernorm"])
    assert torch.equal(run_block(skeleton, 0, one_input), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in skeleton.blocks[0][1].modules())


def test_blocks_that_compute_alike_have_one_signature(checkpoint: Checkpoint) -> None:
    blocks = [block for _, block in Skeleton(ModelSource.open(checkpoint("llama"))).blocks]
    assert signature(blocks[0]) == signature(blocks[1])
    assert signature(blocks[0]) != signature(blocks[0].mlp)
