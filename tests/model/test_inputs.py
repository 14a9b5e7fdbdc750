"""Streaming block by block is the model: what flows is what flows in transformers, and what cannot be streamed is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtipcli.errors import QtipError
from qtipcli.model.inputs import AfterBlocks, BlockInput, capture_first_inputs, run_block, through_block
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource

from .tiny_models import CONFIGS, FUSED, plain_model, token_rows

Checkpoint = Callable[[str], Path]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def plain_hidden_states(directory: Path, rows: Tensor) -> list[Tensor]:
    """The oracle: what enters the first block and what leaves each, in one ordinary forward of transformers' model.

    The last of `output_hidden_states` is behind the final norm, so what leaves the last block is taken by a hook.
    """
    model = plain_model(directory)
    last: list[Tensor] = []
    decoder = model.get_decoder()
    blocks = next(module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    blocks[-1].register_forward_hook(lambda _module, _args, output: last.append(first(output)))
    hidden_states = model(input_ids=rows, output_hidden_states=True, use_cache=False).hidden_states
    return [*hidden_states[:-1], *last]


@pytest.mark.parametrize("label", CONFIGS)
def test_streamed_hidden_states_are_those_of_the_model(checkpoint: Checkpoint, label: str) -> None:
    rows = token_rows()
    expected = plain_hidden_states(checkpoint(label), rows)
    skeleton = Skeleton(ModelSource.open(checkpoint(label)))
    (one_input,) = capture_first_inputs(skeleton, rows, batch_rows=len(rows))
    assert not any(not parameter.is_meta for parameter in skeleton.model.parameters())
    assert torch.equal(one_input.hidden, expected[0])
    for index in range(len(skeleton.blocks)):
        skeleton.materialize(index)
        one_input.hidden = run_block(skeleton, index, one_input)
        skeleton.release(index)
        if label in FUSED:  # the same products, summed over the experts in another order
            torch.testing.assert_close(one_input.hidden, expected[index + 1], rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(one_input.hidden, expected[index + 1]), f"block {index}"  # the same operations in one order


@pytest.mark.parametrize("label", CONFIGS)
def test_norm_and_head_behind_the_last_block_give_the_models_logits(checkpoint: Checkpoint, label: str) -> None:
    """gpt2's and llama's heads are tied to the embedding; the others have one of their own."""
    rows = token_rows()
    skeleton = Skeleton(ModelSource.open(checkpoint(label)))
    skeleton.materialize_outer(head=True)
    last = plain_hidden_states(checkpoint(label), rows)[-1]
    with torch.no_grad():
        expected = plain_model(checkpoint(label))(input_ids=rows, use_cache=False).logits
    assert torch.equal(AfterBlocks(skeleton, rows[:1]).logits(rows, last), expected)
    skeleton.release_outer()
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert skeleton.model.get_output_embeddings().weight.is_meta


def test_gradients_flow_through_a_block(checkpoint: Checkpoint) -> None:
    skeleton = Skeleton(ModelSource.open(checkpoint("llama")))
    (one_input,) = capture_first_inputs(skeleton, token_rows())
    skeleton.materialize(0)
    hidden = one_input.hidden.clone().requires_grad_(True)
    after = through_block(skeleton, 0, hidden, one_input.calls[0])
    assert torch.equal(after, run_block(skeleton, 0, one_input))
    after.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_batches_hold_all_rows_in_order(checkpoint: Checkpoint) -> None:
    rows = token_rows(5)
    skeleton = Skeleton(ModelSource.open(checkpoint("gemma3_text")))
    inputs = capture_first_inputs(skeleton, rows, batch_rows=2)
    assert [len(each.hidden) for each in inputs] == [2, 2, 1]
    expected = plain_hidden_states(checkpoint("gemma3_text"), rows)
    assert torch.equal(torch.cat([each.hidden for each in inputs]), expected[0])
    for index in range(len(skeleton.blocks)):
        skeleton.materialize(index)
        for each in inputs:
            each.hidden = run_block(skeleton, index, each)
        skeleton.release(index)
    # A product of 2 x 12 rows may be summed in another order than one of 5 x 12: float32 rounding, not exact.
    torch.testing.assert_close(torch.cat([each.hidden for each in inputs]), expected[-1], rtol=1e-4, atol=1e-5)


def test_blocks_of_different_kinds_get_their_own_masks_and_tables_and_batches_share_them(checkpoint: Checkpoint) -> None:
    skeleton = Skeleton(ModelSource.open(checkpoint("gemma3_text")))
    one, other = capture_first_inputs(skeleton, token_rows(4), batch_rows=2)
    sliding, full, sliding_again = (call.kwargs for call in one.calls)
    mask = sliding["attention_mask"]
    assert mask is not None
    assert mask is sliding_again["attention_mask"]
    assert mask is other.calls[0].kwargs["attention_mask"]
    assert mask is not full["attention_mask"]
    assert sliding["position_embeddings"][0] is other.calls[2].kwargs["position_embeddings"][0]
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


# ---- toy models: what a chain of blocks may and may not be -----------------------------------------------------------------


class ToyBlock(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.returns = returns

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Any:
        if self.returns == "in place":
            return hidden_states.add_(self.linear(hidden_states))
        after = hidden_states + self.linear(hidden_states)
        return {"tuple": (after, None), "dict": {"hidden": after}}.get(self.returns, after)


class ToyModel(nn.Module):
    """Three blocks in a chain, or with one of the `twists` that make it something else."""

    def __init__(self, twist: str = "", returns: str = "tensor") -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 4)
        self.layers = nn.ModuleList(ToyBlock(returns) for _ in range(3))
        self.twist = twist
        self.base_model = None

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        assert not use_cache
        hidden = self.embedding(input_ids)
        start = hidden
        layers = {"reversed": self.layers[::-1], "skipped": self.layers[:2], "twice": [*self.layers, self.layers[0]]}
        for index, block in enumerate(layers.get(self.twist, self.layers)):
            if self.twist == "scaled" and index == 2:
                hidden = hidden * 0.5
            if self.twist == "scaled in place" and index == 2:
                hidden.mul_(0.5)
            if self.twist == "view":
                hidden = hidden[:, : hidden.shape[1]]
            extra = {"other block": hidden.sum(), "embedding": start, "weights": block.linear.weight.sum()}.get(self.twist)
            hidden = first(block(hidden, extra=extra) if self.twist != "keyword" else block(hidden_states=hidden))


class ToySkeleton:
    """What `inputs` uses of a Skeleton, around a toy model whose blocks' weights go to meta and back."""

    def __init__(self, model: ToyModel) -> None:
        self.device = torch.device("cpu")
        self.blocks = [(f"layers.{index}", block) for index, block in enumerate(model.layers)]
        self.model = SimpleNamespace(base_model=model)
        self._kept = [{name: value.clone() for name, value in block.state_dict().items()} for block in model.layers]
        for index in range(len(self.blocks)):
            self.release(index)

    def materialize(self, index: int) -> nn.Module:
        block = self.blocks[index][1].to_empty(device="cpu")
        block.load_state_dict(self._kept[index])
        return block

    def release(self, index: int) -> None:
        self.blocks[index][1].to("meta")

    def materialize_outer(self) -> None: ...

    def release_outer(self) -> None: ...


def stream(model: ToyModel, rows: Tensor) -> Tensor:
    skeleton = ToySkeleton(model)
    (one_input,) = capture_first_inputs(skeleton, rows)  # type: ignore[arg-type]
    for index in range(len(skeleton.blocks)):
        skeleton.materialize(index)
        one_input.hidden = run_block(skeleton, index, one_input)  # type: ignore[arg-type]
    return one_input.hidden


@pytest.mark.parametrize(
    ("twist", "returns"),
    [("", "tensor"), ("", "tuple"), ("", "in place"), ("view", "tensor"), ("keyword", "tensor"), ("embedding", "tensor")],
)
def test_a_chain_is_streamed_however_it_is_written(twist: str, returns: str) -> None:
    torch.manual_seed(0)
    model = ToyModel(twist, returns)
    expected = model.embedding(token_rows()).detach()
    for block in model.layers:
        with torch.no_grad():
            expected = expected + block.linear(expected)  # the oracle: the definition of the toy
    assert torch.equal(stream(model, token_rows()), expected)


@pytest.mark.parametrize(
    ("twist", "fact"),
    [
        ("reversed", "does not run its blocks once each in order: call 0 is of block 2"),
        ("skipped", "calls 2 of its 3 blocks"),
        ("twice", "call 3 is of block 0"),
        ("scaled", "changes the hidden states between blocks 1 and 2"),
        ("scaled in place", "changes the hidden states between blocks 1 and 2"),
        ("other block", "hands block 1 something that depends on its blocks"),
        ("weights", "hands block 0 something that depends on its blocks"),
    ],
)
def test_what_is_not_a_chain_is_refused(twist: str, fact: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(QtipError, match="cannot be streamed") as caught:
        stream(ToyModel(twist), token_rows())
    assert fact in caught.value.message


def test_blocks_that_return_neither_a_tensor_nor_a_tuple_are_refused() -> None:
    with pytest.raises(QtipError, match="returns dict"):
        stream(ToyModel(returns="dict"), token_rows())


def test_running_a_block_leaves_its_input_alone() -> None:
    skeleton = ToySkeleton(ToyModel(returns="in place"))
    (one_input,) = capture_first_inputs(skeleton, token_rows())  # type: ignore[arg-type]
    before = BlockInput(one_input.hidden.clone(), one_input.calls)
    skeleton.materialize(0)
    once = run_block(skeleton, 0, one_input)  # type: ignore[arg-type]
    assert torch.equal(one_input.hidden, before.hidden)
    assert torch.equal(run_block(skeleton, 0, one_input), once)  # type: ignore[arg-type]
