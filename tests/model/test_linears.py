"""Which linears a block has, which share an input, and the statistics of that input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qtipcli.errors import QtipError
from qtipcli.model.inputs import BlockCall, BlockInput, capture_first_inputs, run_block
from qtipcli.model.linears import (
    HessianRecorder,
    InputGroup,
    expert_place,
    find_linears,
    input_groups,
    left_exact,
    unsupported,
)
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource

from .tiny_models import plain_model, token_rows

Checkpoint = Callable[[str], Path]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_GROUPS = [QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)]

GROUPS = {
    "llama": LLAMA_GROUPS,
    "qwen2": LLAMA_GROUPS,
    "qwen3": LLAMA_GROUPS,
    "gemma3_text": LLAMA_GROUPS,
    "gemma3": LLAMA_GROUPS,
    "olmo2": LLAMA_GROUPS,
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    # attention and MLP in parallel, behind a norm each
    "gpt_neox": [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    # each expert gets tokens of its own; first what all experts start with
    "mixtral": [
        QKV,
        ("self_attn.o_proj",),
        *[(f"mlp.experts.{expert}.gate_up_proj",) for expert in range(4)],
        *[(f"mlp.experts.{expert}.down_proj",) for expert in range(4)],
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
}


def at_first_block(directory: Path, rows: Tensor, batch_rows: int = 8) -> tuple[Skeleton, list[BlockInput]]:
    skeleton = Skeleton(ModelSource.open(directory))
    inputs = capture_first_inputs(skeleton, rows, batch_rows)
    skeleton.materialize(0)
    return skeleton, inputs


def toy(block: nn.Module, hidden: Tensor) -> tuple[Skeleton, BlockInput]:
    """A block on its own, as the functions under test see it."""
    skeleton = SimpleNamespace(blocks=[("layers.0", block)], device=torch.device("cpu"))
    return skeleton, BlockInput(hidden, (BlockCall((), {}, None),))  # type: ignore[return-value]


@pytest.mark.parametrize("label", GROUPS)
def test_linears_with_one_input_form_a_group(checkpoint: Checkpoint, label: str) -> None:
    skeleton, (one_input,) = at_first_block(checkpoint(label), token_rows())
    groups = input_groups(skeleton, 0, one_input)
    assert [group.names for group in groups] == GROUPS[label]
    assert all(group.called for group in groups)
    linears = find_linears(skeleton.blocks[0][1])
    assert all(linears[name].in_features == group.in_features for group in groups for name in group.names)
    assert sorted(linears) == sorted(name for group in groups for name in group.names)


class Tricky(nn.Module):
    """Inputs that look alike: memory used again, memory overwritten, a view of another shape; and a linear never called."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("idle", "a", "b", "c", "d", "e", "f", "a_again"):
            self.add_module(name, nn.Linear(64, 64, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        self.a(input=hidden)
        self.b(hidden * 1)  # freed at once, so its memory is likely to be that of the next
        self.c(hidden * 2)
        buffer = hidden.clone()
        self.d(buffer)
        buffer.mul_(2)
        self.e(buffer)
        self.f(buffer)
        self.a_again(hidden)
        return hidden


def test_inputs_that_only_look_alike_are_told_apart() -> None:
    skeleton, one_input = toy(Tricky(), torch.randn(4, 8, 64))
    groups = input_groups(skeleton, 0, one_input)
    assert [group.names for group in groups] == [("a", "a_again"), ("b",), ("c",), ("d",), ("e", "f"), ("idle",)]
    assert [group.called for group in groups] == [True] * 5 + [False]


@torch.no_grad()
def plain_inputs(directory: Path, rows: Tensor, block: int) -> dict[str, Tensor]:
    """The oracle's inputs: what every linear of a block of transformers' own model is called with, [tokens, I]."""
    model = plain_model(directory)
    seen: dict[str, Tensor] = {}
    for name, linear in find_linears(model.model.layers[block]).items():
        linear.register_forward_pre_hook(lambda _module, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
    model(input_ids=rows, use_cache=False)
    return seen


def test_the_hessian_is_the_mean_of_x_x_transposed(checkpoint: Checkpoint) -> None:
    rows = token_rows(rows=96, context=32)  # 3,072 tokens: more than one chunk
    skeleton, (one_input,) = at_first_block(checkpoint("llama"), rows, batch_rows=96)
    one_input.hidden = run_block(skeleton, 0, one_input)
    skeleton.release(0)
    block = skeleton.materialize(1)
    groups = input_groups(skeleton, 1, one_input)
    with HessianRecorder(block, groups) as recorder:
        run_block(skeleton, 1, one_input)
    hessians = recorder.hessians()
    oracle = plain_inputs(checkpoint("llama"), rows, 1)
    assert list(hessians) == [group.names[0] for group in groups]
    for group in groups:
        hessian_II, tokens = hessians[group.names[0]]
        assert tokens == 96 * 32
        assert hessian_II.dtype == torch.float32
        for name in group.names:
            x_NI = oracle[name]
            exact_II = x_NI.double().T @ x_NI.double() / tokens
            plain_error = ((x_NI.T @ x_NI / tokens).double() - exact_II).norm()
            # No worse than twice plain torch in the same dtype, against float64.
            assert (hessian_II.double() - exact_II).norm() <= 2 * plain_error


def test_batches_add_up_and_the_sum_is_the_same_every_time(checkpoint: Checkpoint) -> None:
    skeleton, inputs = at_first_block(checkpoint("llama"), token_rows(5), batch_rows=2)
    groups = input_groups(skeleton, 0, inputs[0])

    def record() -> HessianRecorder:
        with HessianRecorder(skeleton.blocks[0][1], groups) as recorder:
            for each in inputs:
                run_block(skeleton, 0, each)
        return recorder

    one, other = record(), record()
    assert one.tokens == dict.fromkeys((group.names[0] for group in groups), 5 * 12)
    assert all(torch.equal(one.sums[name], other.sums[name]) for name in one.sums)
    oracle = plain_inputs(checkpoint("llama"), token_rows(5), 0)["mlp.down_proj"].double()
    # float32 rounding of another batch size; relative to the whole matrix
    error = (one.sums["mlp.down_proj"].double() - oracle.T @ oracle).norm() / (oracle.T @ oracle).norm()
    assert error < 1e-6


def test_nothing_is_recorded_outside_the_context() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recorder = HessianRecorder(block, [InputGroup(("0",), 8), InputGroup(("1",), 8, called=False)])
    block(torch.randn(3, 8))
    with recorder:
        block[0](torch.ones(3, 8))
    block(torch.randn(3, 8))
    hessians = recorder.hessians()
    assert torch.equal(hessians["0"][0], torch.ones(8, 8))
    assert hessians["0"][1] == 3
    assert torch.equal(hessians["1"][0], torch.zeros(8, 8))
    assert hessians["1"][1] == 0


def test_half_precision_inputs_are_summed_in_float32() -> None:
    linear = nn.Linear(4, 4).half()
    with HessianRecorder(nn.Sequential(linear), [InputGroup(("0",), 4)]) as recorder:
        linear(torch.full((300, 4), 300.0, dtype=torch.float16))
    assert torch.equal(recorder.hessians()["0"][0], torch.full((4, 4), 90_000.0))  # more than float16 holds


def test_an_input_that_is_not_finite_names_its_layer() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    with HessianRecorder(block, [InputGroup(("0",), 4)]) as recorder:
        block(torch.tensor([1.0, 2.0, float("inf"), 0.0]))
    with pytest.raises(QtipError, match="the input of 0 holds NaN or infinite values"):
        recorder.hessians()


@pytest.mark.parametrize("label", ["llama", "qwen2", "gemma3", "phi3", "gpt_neox"])
def test_dense_models_have_nothing_unsupported(checkpoint: Checkpoint, label: str) -> None:
    skeleton = Skeleton(ModelSource.open(checkpoint(label)))
    assert unsupported(skeleton.blocks[0][1]) == []  # also while the block is on meta


def test_weights_outside_of_linears_are_reported_with_their_share(checkpoint: Checkpoint) -> None:
    block = Skeleton(ModelSource.open(checkpoint("mixtral"))).blocks[0][1]
    found = dict(unsupported(block))
    assert sorted(found) == ["mlp.gate.weight"]
    total = sum(parameter.numel() for parameter in block.parameters())
    assert found["mlp.gate.weight"].startswith("[4, 32] in MixtralTopKRouter, not a torch.nn.Linear")
    assert f"{100 * 4 * 32 / total:.1f} % of the block" in found["mlp.gate.weight"]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)


class OldExperts(nn.Module):
    """As models had them before transformers 5, and those with their own code do: a router, and experts in a list."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(32, experts, bias=False)
        self.shared_gate = nn.Linear(32, 1)
        self.shared = nn.Linear(32, 32)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))


def test_routers_and_linears_smaller_than_a_tile_stay_exact() -> None:
    block = nn.ModuleDict({"mlp": OldExperts(20), "wide": nn.Linear(32, 20)})
    assert left_exact(block) == {"mlp.gate": "router of experts", "mlp.shared_gate": "smaller than a tile: 1 x 32"}
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert find_linears(block).keys() == names - left_exact(block).keys()


def test_places_in_experts_are_known_by_the_list_that_they_lie_in(checkpoint: Checkpoint) -> None:
    old = nn.ModuleDict({"mlp": OldExperts(3)})
    assert expert_place(old, "mlp.experts.2.down") == "mlp.experts.*.down"
    assert expert_place(old, "mlp.shared") is None
    block = Skeleton(ModelSource.open(checkpoint("gpt_oss"))).blocks[0][1]
    assert expert_place(block, "mlp.experts.0.gate_up_proj") == "mlp.experts.*.gate_up_proj"
    assert expert_place(block, "self_attn.q_proj") is None


def test_a_subclass_of_linear_is_not_taken_for_one(checkpoint: Checkpoint) -> None:
    block = Skeleton(ModelSource.open(checkpoint("llama4_text"))).blocks[0][1]
    router = block.get_submodule("feed_forward.router")
    assert isinstance(router, nn.Linear)  # its forward returns the scores of the chosen experts
    assert "feed_forward.router" not in find_linears(block)
    assert "feed_forward.router.weight" in dict(unsupported(block))
