"""Owns the measurement of what a token takes where scales are trained: in one block of each kind, and in the head.

A block's linears are exchanged for packed layers of random walks, whose scales are trained as the stages train them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtipcli.config import TuningSettings
from qtipcli.model.imagined import Imagined
from qtipcli.model.inputs import BlockInput, capture_first_inputs, through_block
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.stages import distill, rates
from qtipcli.stages.forward_rates import head_part, vocabulary_of
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.rates import PROBE_TOKENS
from qtipcli.stages.timing import elapsed, mean_elapsed
from qtipcli.tune.descent import Descent
from qtipcli.tune.linear import TunedLinear
from qtipcli.tune.parameters import Rates, Trained

TUNING_SECONDS = 3.0
"""Spent on passes of blocks that are trained, of ten in all."""

HEAD_SECONDS = 0.5
"""Spent on the head with its loss."""

PASSES = 4
"""Steps of a block, at least, that fit into the time."""


@dataclass(frozen=True, slots=True)
class TuningText:
    """Text that scales are trained on: rows windows of context tokens and heldout more, epochs times, batch windows in a step,
    of which piece go through together.
    """

    rows: int
    heldout: int
    context: int
    epochs: int
    batch: int
    piece: int

    @property
    def tokens(self) -> int:
        """All, held out or not."""
        return (self.rows + self.heldout) * self.context

    @property
    def at_once(self) -> int:
        """Tokens of a piece."""
        return self.piece * self.context

    @property
    def steps(self) -> int:
        """In all epochs."""
        return self.epochs * -(-self.rows // self.batch)


@dataclass(frozen=True, slots=True)
class Bytes:
    """What grows with the tokens, and what does not."""

    fixed: float
    token: float

    def of(self, tokens: int) -> int:
        """For so many tokens at once."""
        return int(self.fixed + self.token * tokens)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What training takes, of a whole model or of one block.

    Seconds: exchange, of decoding all layers; forward, step: of one token in all blocks, without gradients, and there and back
    with its part of Adam. packed: of one token in all blocks with packed layers.
    kept: bytes of a forward pass that wait for the way back, in all blocks. block: most at once in one block, there and back.
    walks: bytes of the packed layers of the block with the most.
    """

    exchange: float
    forward: float
    step: float
    packed: float
    kept: Bytes
    block: Bytes
    walks: int
    tokens: int


def measure_tuning(
    skeleton: Imagined,
    layouts: Mapping[str, PackedLayout],
    settings: TuningSettings,
    rows: int,
    context: int,
    *,
    decoded: bool = True,
    autocast: bool = False,
    packed: bool = False,
    allowed: float = TUNING_SECONDS,
) -> Tuning:
    """Of `rows` windows of `context` tokens at once, in about `allowed` seconds, of random tokens.

    layouts: full name -> layout of every packed layer. decoded: whether layers are held decoded. autocast: as EndTuning has it.
    packed: measure passes of packed layers, too.
    """
    alike = rates.alike(skeleton)
    asked = _Asked(settings, rows, context, decoded, autocast, packed, allowed / len(alike))
    found = [(len(indices), _measure_kind(skeleton, indices[0], layouts, asked)) for indices in alike]

    def total(name: str) -> float:
        return sum(count * getattr(each, name) for count, each in found)

    return Tuning(
        exchange=total("exchange"),
        forward=total("forward"),
        step=total("step"),
        packed=total("packed"),
        kept=Bytes(*(sum(count * getattr(each.kept, part) for count, each in found) for part in ("fixed", "token"))),
        block=max((each.block for _, each in found), key=lambda each: each.of(rows * context)),
        walks=max(each.walks for _, each in found),
        tokens=min(each.tokens for _, each in found),
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `measure_tuning` was asked for. allowed: seconds for one kind of block."""

    settings: TuningSettings
    rows: int
    context: int
    decoded: bool
    autocast: bool
    packed: bool
    allowed: float


def _measure_kind(skeleton: Imagined, index: int, layouts: Mapping[str, PackedLayout], asked: _Asked) -> Tuning:
    """Of one block of a kind."""
    device = skeleton.device
    block = _Block(skeleton, index, layouts, asked)
    try:
        packed = 0.0
        if asked.packed:
            block.take(1, PROBE_TOKENS)
            block.forward()
            packed = mean_elapsed(block.forward, device, asked.allowed / 4) / block.tokens
        exchange = elapsed(block.decode, device) if asked.decoded else block.unfreeze()
        bytes_ = [block.count(tokens) for tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS)]
        probe = elapsed(block.step, device)
        affordable = int(asked.allowed / 2 / PASSES / max(probe, 1e-6) * block.tokens)
        if affordable >= asked.context:
            block.take(min(asked.rows, affordable // asked.context), asked.context)
        else:
            block.take(1, max(PROBE_TOKENS, affordable))
        block.step()
        return Tuning(
            exchange=exchange,
            forward=mean_elapsed(block.forward, device, asked.allowed / 4) / block.tokens,
            step=mean_elapsed(block.step, device, asked.allowed / 2) / block.tokens,
            packed=packed,
            kept=_line(*(kept for kept, _ in bytes_)),
            block=_line(*(peak for _, peak in bytes_)),
            walks=sum(layout.stored_bits // 8 for layout in block.layouts.values()),
            tokens=block.tokens,
        )
    finally:
        block.leave()


def block_tuning_seconds(text: TuningText, tuning: Tuning, forward: float) -> float:
    """Of tuning all blocks. forward: seconds of one token in all original blocks."""
    heldout, train = text.heldout * text.context, text.rows * text.context
    student = ((1 + text.epochs) * heldout + heldout + train) * tuning.forward + text.epochs * train * tuning.step
    return (heldout + train) * forward + tuning.exchange + student


def tuned_bytes(parameters: int) -> int:
    """Bytes of so many parameters that are trained: masters and gradients, Adam's two moments, what is put aside for judging,
    all in float32, and the best state in float16.
    """
    return parameters * (5 * torch.float32.itemsize + torch.float16.itemsize)


def masters_bytes(layouts: Iterable[PackedLayout]) -> int:
    """Of the scales of these layers, if no two share one: at the most."""
    return tuned_bytes(sum(layout.in_features + layout.out_features for layout in layouts))


def _line(one: int, two: int) -> Bytes:
    """Through what PROBE_TOKENS take and what twice as many do."""
    token = max(0.0, (two - one) / PROBE_TOKENS)
    return Bytes(max(0.0, one - token * PROBE_TOKENS), token)


class _Block:
    """One block with packed layers in the place of its linears, and some random tokens on their way into it."""

    def __init__(self, skeleton: Imagined, index: int, layouts: Mapping[str, PackedLayout], asked: _Asked) -> None:
        self.skeleton, self.index, self.asked = skeleton, index, asked
        self.name, self.block = skeleton.blocks[index]
        stem = f"{self.name}."
        self.layouts = {name.removeprefix(stem): each for name, each in layouts.items() if name.startswith(stem)}
        self.linears = {path: self.block.get_submodule(path) for path in self.layouts}
        self.descent: Descent | None = None
        self.take(1, PROBE_TOKENS)
        for path, layout in self.layouts.items():
            layer = TrellisLinear(layout, device="cpu", dtype=torch.float32)
            layer.trellis.random_(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
            layer.scale_out.fill_(layout.in_features**-0.5)
            self.block.set_submodule(path, layer.to(skeleton.device))

    def take(self, rows: int, context: int) -> None:
        """Other tokens."""
        vocabulary = self.skeleton.model.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(0))
        own = [self.block.get_submodule(path) for path in self.layouts]
        for path, linear in self.linears.items():
            self.block.set_submodule(path, linear)
        self.input: BlockInput = capture_first_inputs(self.skeleton, tokens, rows)[0]
        self.skeleton.materialize(self.index)
        for path, layer in zip(self.layouts, own, strict=True):
            self.block.set_submodule(path, layer)
        self.tokens = rows * context
        self._train()

    def decode(self) -> None:
        """Hold the layers decoded."""
        for path in self.layouts:
            tuned = TunedLinear(self.block.get_submodule(path), self.asked.settings.lut_rate > 0)
            self.block.set_submodule(path, tuned)
        self._train()

    def unfreeze(self) -> float:
        """Train the packed layers as they are; takes no time."""
        for path in self.layouts:
            self.block.get_submodule(path).unfreeze()
        self._train()
        return 0.0

    def _train(self) -> None:
        if not any(isinstance(self.block.get_submodule(path), TunedLinear | TrellisLinear) for path in self.layouts):
            return
        settings = self.asked.settings
        vectors = {f"{self.name}.{name}": each.dtype for name, each in self.block.named_parameters() if each.ndim == 1}
        kinds = Rates(settings.learning_rate, settings.norm_rate, settings.lut_rate)
        self.descent = Descent(Trained(self.block, self.name, vectors, kinds), 10**6)

    @torch.no_grad()
    def forward(self) -> None:
        self._loss()

    def step(self) -> None:
        """There and back, and Adam's part."""

        def backward() -> float:
            loss = self._loss()
            loss.backward()
            return float(loss.detach())

        assert self.descent is not None, "a block is exchanged before it is trained"
        self.descent.take_step(backward)

    def _loss(self) -> Tensor:
        # What goes in asks for a gradient: in the middle of a model it does.
        device = self.skeleton.device
        hidden = self.input.hidden.to(device, copy=True).requires_grad_(torch.is_grad_enabled())
        with torch.autocast(device.type, torch.bfloat16, enabled=self.asked.autocast):
            output = through_block(self.skeleton, self.index, hidden.clone(), self.input.calls[self.index])
        return output.float().square().mean()

    def count(self, tokens: int) -> tuple[int, int]:
        """(bytes that wait for the way back, most bytes at once there and back), for so many tokens."""
        self.take(1, tokens)
        self.step()  # makes Adam's moments
        with LiveBytes() as waiting:
            loss = self._loss()
            kept = waiting.now
        del loss
        with LiveBytes() as live:
            self.step()
        return kept, live.peak

    def leave(self) -> None:
        for path, linear in self.linears.items():
            self.block.set_submodule(path, linear)
        self.block.requires_grad_(False)
        self.skeleton.release(self.index)


@dataclass(frozen=True, slots=True)
class Head:
    """What heads and loss take end to end. Seconds of one token: judge, of both models' logits and what is between them;
    step, the same there and back. judged, logit: most bytes at once of these two, for each logit.
    """

    judge: float
    step: float
    judged: float
    logit: float


def measure_head(skeleton: Imagined, autocast: bool = False) -> Head:
    """Of the model's head and the loss end to end, on a part of the vocabulary."""
    own, device = head_part(skeleton), skeleton.device
    hidden = torch.ones(1, PROBE_TOKENS + 1, own.in_features, device=device)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = own(hidden)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = own(x)
        return distill.divergence(logits, teacher)

    def there_and_back() -> None:
        loss(hidden.clone().requires_grad_(True)).backward()

    def there() -> None:
        with torch.no_grad():
            loss(hidden)

    there_and_back()
    share = vocabulary_of(skeleton) / own.out_features / PROBE_TOKENS
    seconds, peaks = [], []
    for call in (there, there_and_back):
        with LiveBytes() as live:
            call()
        peaks.append(live.peak / PROBE_TOKENS / own.out_features)
        seconds.append(mean_elapsed(call, device, HEAD_SECONDS / 2) * share)
    return Head(*seconds, *peaks)
