"""Owns block tuning: the two streams of activations through a model, and the training of one block between them.

The original stream is what the original blocks make of the text; the quantized stream is what the quantized, tuned blocks make
of it. A block is trained to answer the quantized stream as the original block answers the original one. Source: QuIP#
(arXiv 2402.04396), section 5, and QTIP (arXiv 2406.11235), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtipcli.config import BlockTuning
from qtipcli.errors import SettingsError
from qtipcli.job.processes import ALONE, Processes
from qtipcli.model.inputs import run_block, through_block
from qtipcli.model.skeleton import Skeleton
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.stages import streams
from qtipcli.stages.prefix import Prefix
from qtipcli.stages.progress import Watcher
from qtipcli.tune.activations import Activations
from qtipcli.tune.descent import Descent, order
from qtipcli.tune.linear import TunedLinear
from qtipcli.tune.parameters import Rates, Trained
from qtipcli.tune.share import share_of

MICRO_TOKENS = 4096
"""Tokens that go through a block with gradients at once; more rows to a step are taken one after the other."""


def packed_layer(layout: PackedLayout, tensors: Mapping[str, Tensor]) -> TrellisLinear:
    """A layer with these parts (`trellis`, `scale_in`, `scale_out`, `lut`, `bias`), on the CPU."""
    layer = TrellisLinear(layout, device="cpu", dtype=torch.float32)
    for part, tensor in tensors.items():
        if part != "weight":
            setattr(layer, part, nn.Parameter(tensor, requires_grad=False))
    return layer


class BlockTuner:
    """Carries both streams through the blocks, in order: each block is either tuned or, when that was done before, passed.

    Args:
        skeleton: the original model.
        tokens: int64 [rows, context]; the last `heldout` rows are never trained on.
        settings: of the training.
        directory: a run directory, where activations go that do not fit into `memory_gib` GiB.
        watcher: hears of each block.
        processes: those that share the rows; each carries its own rows through the blocks, and all end with the same tensors.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        heldout: int,
        settings: BlockTuning,
        directory: Path,
        watcher: Watcher,
        memory_gib: float = streams.DEFAULT_MEMORY_GIB,
        processes: Processes = ALONE,
    ) -> None:
        if not 0 < heldout < len(tokens):
            raise SettingsError(
                f"{heldout} held-out windows of {len(tokens)} leave none to train on", "give longer text or smaller --heldout"
            )
        self.skeleton, self.settings, self.watcher, self.processes = skeleton, settings, watcher, processes
        most_rows = MICRO_TOKENS // tokens.shape[1]
        self._share = share_of(tokens, heldout, settings.batch, most_rows, processes.rank, processes.world)
        self._heldout_rows = heldout
        self._row, self._directory, self._memory_gib = tokens[:1], directory, memory_gib
        names = (f"original-{processes.rank}", f"quantized-{processes.rank}")
        both, self._calls = streams.start(skeleton, self._share.pieces, names, directory, memory_gib, watcher)
        self.original, self.quantized = both

    @cached_property
    def prefix(self) -> Prefix:
        """Both streams as the next block gets them."""
        return Prefix(self.skeleton, self.original, self.quantized, self._calls, self._row, self._directory, self._memory_gib)

    def tune(
        self, index: int, layers: Mapping[str, TrellisLinear], others: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train block `index` and take both streams through it.

        layers: full name -> packed layer. others: full name -> tensor, where norms or biases differ from the original model's.
        dtypes: full name -> dtype on disk of the norms and biases that may be trained.
        Returns (full name -> tensor as stored, for everything that was trained; {"before", "after": held-out loss relative to
        the mean square of the target, "epoch": of the state kept, 0 for none}).
        """
        rates = Rates(self.settings.learning_rate, self.settings.norm_rate, self.settings.lut_rate)
        with self._quantized_block(index, layers, others, rates.luts > 0) as block:
            trained = Trained(block, self.skeleton.blocks[index][0], dtypes, rates)
            descent = Descent(trained, self.settings.epochs * len(self._share.steps), self.processes.sum_gradients)
            losses = self._descend(index, descent)
            trained.load(descent.best)
            self._forward(index, self.quantized, self.quantized)
        best = min(range(len(losses)), key=losses.__getitem__)
        report = {"before": losses[0], "after": losses[best], "epoch": best}
        self.watcher.row({"block": self.skeleton.blocks[index][0], **report})
        return descent.best, report

    def skip(self, index: int, layers: Mapping[str, TrellisLinear], others: Mapping[str, Tensor]) -> None:
        """Take both streams through block `index` as it was stored."""
        with self._quantized_block(index, layers, others, False):
            self._forward(index, self.quantized, self.quantized)

    def close(self) -> None:
        """Give files back."""
        for stream in (self.original, self.quantized):
            stream.close()

    def _descend(self, index: int, descent: Descent) -> list[float]:
        """Held-out losses: before, and after each epoch."""
        scale = self._target_power()
        losses = [descent.judge(lambda: self._heldout(index, scale))]
        for epoch in range(self.settings.epochs):
            for step in order(len(self._share.steps), self.settings.seed, epoch):
                self.processes.checkpoint()
                descent.take_step(lambda step=step: self._backward(index, step, scale))
            losses.append(descent.judge(lambda: self._heldout(index, scale)))
        return losses

    def _backward(self, index: int, step: int, scale: float) -> float:
        total = 0.0
        for piece in self._share.steps[step]:
            loss = self._loss(index, piece, scale) * (self._rows(piece) / self._share.rows[step])
            loss.backward()
            total += float(loss.detach())
        return self.processes.sum_numbers(total)[0]

    def _rows(self, piece: int) -> int:
        return len(self._share.pieces[piece])

    def _loss(self, index: int, piece: int, scale: float) -> Tensor:
        device = self.skeleton.device
        hidden = self.quantized.read(piece).to(device, copy=True)
        output = through_block(self.skeleton, index, hidden, self._calls[piece][index])
        target = self.original.read(piece).to(device)
        return (output.float() - target.float()).square().mean() / scale

    @torch.no_grad()
    def _heldout(self, index: int, scale: float) -> float:
        total = sum(float(self._loss(index, piece, scale)) * self._rows(piece) for piece in self._share.held)
        return self.processes.sum_numbers(total)[0] / self._heldout_rows

    def _target_power(self) -> float:
        """Mean square of the held-out targets."""
        total = sum(self.original.read(piece).double().square().mean().item() * self._rows(piece) for piece in self._share.held)
        return max(self.processes.sum_numbers(total)[0] / self._heldout_rows, 1e-30)

    def _forward(self, index: int, source: Activations, target: Activations) -> None:
        for piece in range(len(source)):
            target.write(piece, run_block(self.skeleton, index, streams.batch_at(source, self._calls, piece)))

    def _quantized_block(
        self, index: int, layers: Mapping[str, TrellisLinear], others: Mapping[str, Tensor], trains_lut: bool
    ) -> _Exchanged:
        """The original stream goes through the original block first; its answers are the targets."""
        self.skeleton.materialize(index)
        self._forward(index, self.original, self.original)
        return _Exchanged(self.skeleton, index, layers, others, trains_lut)


class _Exchanged:
    """A context in which a materialized block has packed layers in the place of its linears; after it the block is released."""

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        layers: Mapping[str, TrellisLinear],
        others: Mapping[str, Tensor],
        trains_lut: bool,
    ) -> None:
        self._skeleton, self._index = skeleton, index
        self._layers, self._others, self._trains_lut = layers, others, trains_lut
        self._linears: dict[str, nn.Module] = {}

    def __enter__(self) -> nn.Module:
        prefix, block = self._skeleton.blocks[self._index]
        for name, layer in self._layers.items():
            path = name.removeprefix(f"{prefix}.")
            linear = block.get_submodule(path)
            self._linears[path] = linear
            if linear.bias is not None:
                layer.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
            for leaf, parameter in list(linear.named_parameters(recurse=False)):
                setattr(linear, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
            bias = self._others.get(f"{name}.bias")
            if bias is not None:
                layer.bias = nn.Parameter(bias.float(), requires_grad=False)
            tuned = TunedLinear(layer.to(self._skeleton.device), self._trains_lut)
            block.set_submodule(path, tuned)
        for name, tensor in self._others.items():
            path, _, leaf = name.removeprefix(f"{prefix}.").rpartition(".")
            if name.removeprefix(f"{prefix}.") in dict(block.named_parameters()) and path not in self._linears:
                block.get_submodule(path).get_parameter(leaf).data = tensor.to(self._skeleton.device, self._skeleton.dtype)
        return block

    def __exit__(self, *failure: object) -> None:
        block = self._skeleton.blocks[self._index][1]
        block.requires_grad_(False)
        for path, linear in self._linears.items():
            block.set_submodule(path, linear)
        self._skeleton.release(self._index)
