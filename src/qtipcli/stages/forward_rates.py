"""Owns the measurement of what a window of text takes in a whole model, plain or packed, and of comparing logits.

One block of each kind is run, of made-up weights, as evaluation runs it. A head is measured on a part of its vocabulary, with
which it grows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtipcli.data.windows import Windows
from qtipcli.model.imagined import Imagined
from qtipcli.model.inputs import BlockInput, capture_first_inputs, run_block
from qtipcli.nn.embedding import TrellisHead
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.transform import Transform
from qtipcli.stages import evaluate, rates
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.own_process import growth_bytes
from qtipcli.stages.rates import LARGEST_HEAD, PROBE_TOKENS
from qtipcli.stages.timing import elapsed, mean_elapsed

FORWARD_SECONDS = 6.0
"""Spent on passes of all models and contexts, of ten in all."""

HEAD_SECONDS = 0.3
"""Spent on a head, and on comparing logits."""

PASSES = 4
"""Through a block, at least, that time is the mean of: what else the machine does strikes some of them."""

HEAP_WINDOWS = 6
"""Windows after which the holes that logits leave in the heap grow no more: tried with 1 to 15."""

HEAP_TENSOR = 32 << 20
"""Below this size the C library may serve a tensor from its heap (M_MMAP_THRESHOLD in mallopt(3))."""

CHUNKS = 16
"""Parts of a window's logits that a comparison is measured on: the last may be short."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What one window takes in a whole model.

    seconds: of all blocks and the head. peak: most bytes that are alive in a block beside its weights and what it is given.
    tokens: that were measured with. block: seconds of the blocks alone.
    """

    seconds: float
    peak: int
    tokens: int
    block: float


def measure_forward(skeleton: Imagined, rows: int, context: int, allowed: float = FORWARD_SECONDS) -> Forward:
    """Of `rows` windows of `context` tokens that go through together; in about `allowed` seconds.

    Fewer tokens are measured with where that would take longer, and what they take is taken to grow with the tokens.
    """
    kinds = rates.alike(skeleton)
    wanted = rows * context
    seconds, peak, tokens = 0.0, 0, wanted
    share = allowed / len(kinds) / 2
    for indices in kinds:
        block = _Block(skeleton, indices[0], 1, min(PROBE_TOKENS, context))
        block.run()  # the first pass starts threads and loads code
        probe = elapsed(block.run, skeleton.device)
        affordable = int(share / PASSES / max(probe, 1e-6) * block.tokens)
        block.leave()
        if affordable >= context:
            block = _Block(skeleton, indices[0], min(rows, max(1, affordable // context)), context)
        else:
            block = _Block(skeleton, indices[0], 1, max(min(PROBE_TOKENS, context), affordable))
        with LiveBytes() as live:
            block.run()
        seconds += len(indices) * mean_elapsed(block.run, skeleton.device, share) * wanted / block.tokens
        peak = max(peak, int(live.peak * wanted / block.tokens))
        tokens = min(tokens, block.tokens)
        block.leave()
    return Forward(seconds + head_seconds(skeleton) * wanted, peak, tokens, seconds)


class _Block:
    """One block and some random tokens on their way into it."""

    def __init__(self, skeleton: Imagined, index: int, rows: int, context: int) -> None:
        self.skeleton, self.index, self.tokens = skeleton, index, rows * context
        vocabulary = skeleton.model.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(0))
        self.input: BlockInput = capture_first_inputs(skeleton, tokens, rows)[0]
        skeleton.materialize(index)

    @torch.no_grad()
    def run(self) -> None:
        run_block(self.skeleton, self.index, self.input)

    def leave(self) -> None:
        self.skeleton.release(self.index)


def head_seconds(skeleton: Imagined) -> float:
    """Seconds a token of the model's head, plain or packed."""
    head = head_part(skeleton)
    x = torch.ones(PROBE_TOKENS, head.in_features, device=skeleton.device, dtype=skeleton.dtype)
    with torch.no_grad():
        head(x)
        share = vocabulary_of(skeleton) / head.out_features
        return mean_elapsed(lambda: head(x), skeleton.device, HEAD_SECONDS) / PROBE_TOKENS * share


def head_part(skeleton: Imagined) -> nn.Linear | TrellisLinear:
    """The head with at most LARGEST_HEAD of its rows, of made-up weights."""
    head = skeleton.model.get_output_embeddings()
    placed = {"device": skeleton.device, "dtype": skeleton.dtype}
    if isinstance(head, TrellisLinear | TrellisHead):
        rows = min(head.layout.out_features, LARGEST_HEAD)
        layout = replace(head.layout, out_features=rows, transform_out=Transform("block"), embedding=False)
        part = TrellisLinear(layout, **placed)
        part.trellis.random_(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
        return part
    weight = head.weight
    part = nn.Linear(weight.shape[1], min(len(weight), LARGEST_HEAD), bias=False, **placed)
    return part.requires_grad_(False)


def vocabulary_of(skeleton: Imagined) -> int:
    """Logits of a token."""
    head = skeleton.model.get_output_embeddings()
    return head.layout.out_features if isinstance(head, TrellisLinear | TrellisHead) else len(head.weight)


def width_of(skeleton: Imagined) -> int:
    """Values of a token's hidden states."""
    return skeleton.model.get_input_embeddings().embedding_dim


class RandomLogits(evaluate.Logits):
    """Logits of so many positions, made when they are asked for."""

    dtype = "float32"

    def __init__(self, positions: int, vocabulary: int, device: torch.device) -> None:
        self._shape, self._device = (positions + 1, vocabulary), device

    def logits(self, index: int) -> Tensor:
        return torch.full(self._shape, 0.5, device=self._device)[:-1]


def comparison(context: int, vocabulary: int, models: int, device: torch.device) -> tuple[float, int]:
    """(seconds, most bytes) of one window's logits of `models` models, 1 to 3, and of comparing them.

    Logits that the C library serves from its heap leave holes there: some windows of them are gone through. Larger ones are
    counted.
    """
    in_heap = device.type == "cpu" and context * vocabulary * torch.float32.itemsize < HEAP_TENSOR
    positions = context - 1 if in_heap else min(context - 1, CHUNKS * max(1, evaluate.CHUNK_LOGITS // vocabulary))
    windows = HEAP_WINDOWS if in_heap else 1
    tokens = torch.zeros(windows, positions + 1, dtype=torch.int64)
    rows = Windows(tokens, "random", windows, None, "none", "")
    own, *others = (RandomLogits(positions, vocabulary, device) for _ in range(models))

    def compare() -> None:
        evaluate.predict(own, rows, *others)

    grown = growth_bytes(compare) if in_heap else 0
    with LiveBytes() as live:
        compare()
    missing = models * (context - 1 - positions) * vocabulary * torch.float32.itemsize
    seconds = mean_elapsed(compare, device, HEAD_SECONDS) * (context - 1) / positions / windows
    return seconds, max(grown, live.peak) + missing
