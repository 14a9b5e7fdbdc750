"""Owns the rounding of one group of layers of a job: under what settings, and what the shard and the ledger keep of it."""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qtipcli.config import QuantizeSettings
from qtipcli.errors import SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.model.linears import find_linears
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import check_finite
from qtipcli.quant.batches import InBatches
from qtipcli.quant.correction import corrected
from qtipcli.quant.matrix import PackedMatrix, RoundingSettings, round_group
from qtipcli.quant.output_side import OutputHessian
from qtipcli.quant.scale import Encode
from qtipcli.quant.transform import Transform
from qtipcli.stages import backward, outer
from qtipcli.stages.few_tokens import FEW_TOKENS, Moments
from qtipcli.stages.output_hessians import StoredOutputs
from qtipcli.stages.progress import Watcher
from qtipcli.stages.rounding_rates import Group, rounding_bytes
from qtipcli.stages.spread import Parcel, rounding_cost
from qtipcli_kernels.codes import default_lut
from qtipcli_kernels.spec import TrellisSpec


class Rounder:
    """Rounds groups of layers of one model under one job's settings.

    Attributes:
        encode: what encodes tiles in this process.
        outer: the matrices outside the blocks that are packed, by name.
        now: what is being rounded, by full names.
    """

    def __init__(self, skeleton: Skeleton, settings: QuantizeSettings, calibration: RunDirectory, watcher: Watcher) -> None:
        refuse_unused_patterns(skeleton, settings)
        self.skeleton, self.settings, self.calibration, self.watcher = skeleton, settings, calibration, watcher
        self.outer = outer.plan(skeleton, settings)
        self.now: list[str] = [skeleton.source.name]
        self.encode = InBatches(self._note_smaller)
        self._luts: dict[TrellisSpec, torch.Tensor | None] = {}
        # Compiled once: an allocation has a pattern for each of what may be thousands of layers.
        self._overrides = [(re.compile(fnmatch.translate(pattern)), value) for pattern, value in settings.layers.items()]

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of the layers that the settings do not skip."""
        return [name for name in names if not _matches(name, self.settings.skip)]

    def cost(self, names: Sequence[str]) -> float:
        """Predicted operations of rounding a group; its weights need not be in memory."""
        cost = 0.0
        for name in self.chosen(names):
            linear, spec = self.skeleton.model.get_submodule(name), self._spec(name)
            # What is done once for a group is counted for each layer, which also has a product with I^2 O of its own.
            weights = linear.in_features * linear.out_features
            cost += rounding_cost(weights, linear.in_features, spec.state_bits, spec.weights_per_step)
        return cost

    def round_names(self, index: int, names: Sequence[str], ask: Callable[[], Moments], encode: Encode) -> Parcel:
        """The layers of one group of block `index`, materialized, as they are stored.

        ask: for what they are given, unless all are skipped. Nothing else is to hold it: it takes more than the layers.
        The parcel's report: "layers", "left" and the "seconds" that a layer took.
        """
        chosen = self.chosen(names)
        left = {name: "skipped by the settings" for name in names if name not in chosen}
        moments = ask() if chosen else None
        if moments is None or not moments.seen:
            left |= dict.fromkeys(chosen, "never called in calibration")
            return Parcel({}, {"layers": {}, "left": left, "seconds": 0.0})
        started, self.now = time.monotonic(), chosen
        linears = {name: self.skeleton.model.get_submodule(name) for name in chosen}
        weights = {name: linear.weight for name, linear in linears.items()}
        corrections: dict[str, float] = {}
        for name, weight in weights.items():
            check_finite(f"{name}.weight", weight)
            if name in moments.missing:
                weights[name], corrections[name] = corrected(weight, *moments.missing[name])
        tokens, share, hessian_II = moments.tokens, moments.share, moments.mixed()
        del moments
        packed = self.round(weights, hessian_II, self._outputs(index, chosen), encode)
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, Any] = {}
        for name, matrix in packed.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in self.stored(name, matrix).items()}
            layers[name] = self.report(name, matrix, linears[name], corrections.get(name, math.inf))
            layers[name] |= {"tokens": tokens, "shared_hessian": share} if share else {}
        return Parcel(tensors, {"layers": layers, "left": left, "seconds": (time.monotonic() - started) / len(chosen)})

    def round(
        self,
        weights: dict[str, torch.Tensor],
        hessian_II: torch.Tensor,
        outputs: Mapping[str, OutputHessian] | None,
        encode: Encode,
    ) -> dict[str, PackedMatrix]:
        """`quant.round_group` under the job's settings; it empties `weights` and writes over `hessian_II`."""
        settings = RoundingSettings(
            Transform.parse(self.settings.transform),
            self.settings.damping,
            self.settings.refit,
            scale=self.settings.scale,
            search=self.settings.search and self.settings.scale is None,
            fast=self.settings.fast,
            seed=self.settings.seed,
            transform_out=next((self.outer[name].transform_out for name in weights if name in self.outer), None),
        )
        specs = {name: self._spec(name) for name in weights}
        luts = {name: self._lut(spec) for name, spec in specs.items()}
        return round_group(weights, hessian_II, specs, settings, luts, outputs, encode, consume=True)

    def _outputs(self, index: int, names: list[str]) -> dict[str, OutputHessian] | None:
        """Hessians of the outputs of a group's layers; None where they are not asked for, or one had no gradients."""
        key = backward.output_key(index)
        if not self.settings.two_sided:
            return None
        layers = self.calibration.report(key)["layers"]
        if not all(name in layers for name in names):
            return None
        self.calibration.verify(key)
        return StoredOutputs(self.calibration, key, names, self.skeleton.device)

    def _note_smaller(self, tiles: int) -> None:
        self.watcher.note(f"{self.now[0]}: memory ran out, so that tiles are encoded {tiles} at a time from here on")

    def takes_now(self) -> int:
        """Bytes that rounding takes of what is being rounded."""
        linears = [self._linear(name) for name in self.now]
        group = Group(tuple(linear.out_features for linear in linears), linears[0].in_features)
        return rounding_bytes(group, self.settings, self._spec(self.now[0]), self.skeleton.device)

    def _linear(self, name: str) -> torch.nn.Linear:
        return self.outer[name].stand_in() if name in self.outer else self.skeleton.model.get_submodule(name)

    def _spec(self, name: str) -> TrellisSpec:
        if name in self.outer:
            return self.outer[name].spec
        return self.settings.spec(next((value for pattern, value in self._overrides if pattern.match(name)), None))

    def _lut(self, spec: TrellisSpec) -> torch.Tensor | None:
        if spec not in self._luts:
            self._luts[spec] = default_lut(spec)
        return self._luts[spec]

    def stored(self, name: str, matrix: PackedMatrix) -> dict[str, torch.Tensor]:
        """Part of a layer -> what the shard holds of it."""
        stored = {"trellis": matrix.trellis, "scale_in": matrix.scale_in, "scale_out": matrix.scale_out}
        lut = self._lut(self._spec(name))
        return stored if lut is None else stored | {"lut": lut}

    def report(self, name: str, matrix: PackedMatrix, linear: torch.nn.Linear, correction: float) -> dict[str, Any]:
        """What the ledger keeps of a layer; nothing in it depends on the clock. correction: its damping, infinite for none."""
        spec = self._spec(name)
        return {
            "code": spec.code,
            "bits_per_step": spec.bits_per_step,
            "weights_per_step": spec.weights_per_step,
            "state_bits": spec.state_bits,
            "transform": self.settings.transform,
            "shape": [linear.out_features, linear.in_features],
            "bias": linear.bias is not None,
            "relative_proxy_loss": matrix.relative_proxy_loss,
            "unrefitted_loss": matrix.unrefitted_loss,
            "scale": matrix.scale,
            "damping": matrix.damping,
            "dead_inputs": matrix.dead_inputs,
            "correction_damping": correction if math.isfinite(correction) else None,
            "divergence": matrix.divergence,
        }

    def announce(self, name: str, report: Mapping[str, Any], seconds: float) -> None:
        """Say that a layer is rounded, and what was odd about it."""
        rows, columns = report["shape"]
        self.watcher.row(
            {
                "layer": name,
                "shape": f"{rows} x {columns}",
                "bits": report["bits_per_step"] / report["weights_per_step"],
                "relative proxy loss": report["relative_proxy_loss"],
                "seconds": seconds,
            }
        )
        if report["damping"] > self.settings.damping:
            self.watcher.note(f"{name}: damping raised from {self.settings.damping:g} to {report['damping']:g}")
        if report["dead_inputs"]:
            self.watcher.note(f"{name}: {report['dead_inputs']} of {columns} inputs were always zero in calibration")

    def note_few_tokens(self, prefix: str, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Say which experts of a block saw little text. prefix: the block's name."""
        few = {name: report["tokens"] for name, report in layers.items() if "shared_hessian" in report}
        if few:
            name = min(few, key=few.__getitem__)
            self.watcher.note(
                f"{prefix}: {len(few)} layers of experts saw fewer than {FEW_TOKENS} tokens for each of their inputs, "
                f"{name} only {few[name]}: the mean Hessian of the experts beside them was mixed in"
            )


class RoundedBlock:
    """The groups of one block that are rounded: tensors of its shard, and its report."""

    def __init__(self, rounder: Rounder) -> None:
        self._rounder = rounder
        self.tensors: dict[str, torch.Tensor] = {}
        self._layers: dict[str, Any] = {}
        self._left: dict[str, str] = {}

    def take(self, parcel: Parcel) -> None:
        """Add a group, and say so."""
        for name, layer in parcel.report["layers"].items():
            self._rounder.announce(name, layer, parcel.report["seconds"])
        self.tensors |= parcel.tensors
        self._layers |= parcel.report["layers"]
        self._left |= parcel.report["left"]

    def report(self, prefix: str) -> dict[str, Any]:
        """What the ledger keeps. prefix: the block's name."""
        self._rounder.note_few_tokens(prefix, self._layers)
        return {"layers": self._layers, "left": self._left}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def refuse_unused_patterns(skeleton: Skeleton, settings: QuantizeSettings) -> None:
    """Raise SettingsError where a pattern of the settings fits no layer."""
    names = [f"{prefix}.{name}" for prefix, block in skeleton.blocks for name in find_linears(block)]
    for pattern in (*settings.skip, *settings.layers):
        if not fnmatch.filter(names, pattern):
            raise SettingsError(f"no layer is called {pattern!r}", f"names look like {names[0]}; * stands for anything")
