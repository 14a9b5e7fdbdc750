"""Owns the sensitivity stage: what rounding one layer alone does to the whole model, measured on held-out windows.

Each layer gets the error of a cheap rounding (quant/probe.py) while all others stay as they are, and KL(original || changed) is
read. That over the error's relative proxy loss is the layer's sensitivity; times the loss that a rate would cost the layer it
predicts what the rate would cost the model. Source: Q-Palette (arXiv 2509.20214), section 4.

The run directory holds the shard `tokens` and for each block an empty shard whose report has a row for each layer. The model
lies in memory as a whole (stages/divergence.py); blocks are done in order, and a stopped run goes on with the next one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtipcli.config import CalibrationSettings, QuantizeSettings, SensitivitySettings
from qtipcli.errors import QtipError, SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_text, fingerprint_versions
from qtipcli.job.interrupt import interruptible
from qtipcli.job.processes import ALONE, Processes
from qtipcli.job.shared import SharedDirectory
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.quant.matrix import RoundingSettings
from qtipcli.quant.probe import probe_group
from qtipcli.quant.transform import Transform
from qtipcli.stages import calibrate
from qtipcli.stages.calibrate import TOKENS, block_key
from qtipcli.stages.divergence import Reference
from qtipcli.stages.few_tokens import StoredMoments
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.spread import least_loaded
from qtipcli_kernels.spec import SpecError, TrellisSpec, offered_bits

STAGE = "sensitivity"

JUDGE_TOKENS = "judge_tokens"
"""The tensor of the shard `tokens` on which finished models are compared; the layers are measured on its tensor `tokens`."""

QUANTIZE_FIELDS = ("code", "state_bits", "transform", "damping", "refit", "scale", "search", "seed")
"""The settings of the rounding that decide what a layer's error is like, and so belong to this job."""

UNMEASURED_KL = 1e-12
"""Nats below which a layer did nothing at all: float64 rounds sums of probabilities to 1e-16 each."""

LEAST_SHARE = 1e-3
"""Share of the median layer's KL that every layer counts for at least: what is smaller than that on a few windows may not be so
on other text, and costs nothing to provide for."""


def run(
    source: ModelSource,
    quantize: QuantizeSettings,
    settings: SensitivitySettings,
    hessians: Path,
    directory: Path,
    force: bool = False,
    watcher: Watcher | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Fill `directory` with the layers' sensitivities, going on where an earlier run stopped; returns it.

    hessians: a finished calibrate run directory of the same model, whose windows are not measured on. processes: that share the
    layers; each holds the whole model.
    Raises MismatchError where it holds another job, SettingsError for a rate that the code has not, QtipError where the text
    has no window beside those of the calibration, StoppedError after Ctrl-C.
    """
    watcher = watcher or Silent()
    calibration = RunDirectory.load(hessians, calibrate.STAGE)
    specs = candidates(quantize, settings)
    frozen = settings.model_dump() | {name: getattr(quantize, name) for name in QUANTIZE_FIELDS}
    fingerprint = {
        "model": calibration.fingerprint["model"],
        "calibration": fingerprint_text(repr(calibration.settings), repr(calibration.fingerprint)),
        "versions": fingerprint_versions(),
    }
    with (
        interruptible(notice=processes.is_main),
        SharedDirectory.join(processes, directory, STAGE, frozen, fingerprint, force) as job,
    ):
        if not job.done(TOKENS):
            with processes.main_first():
                heldout = _heldout(source, settings, calibration, watcher)
            job.commit(TOKENS, *heldout)
        _measure(source, quantize, settings, specs, calibration, job, watcher, processes)
    return directory


def candidates(quantize: QuantizeSettings, settings: SensitivitySettings) -> list[TrellisSpec]:
    """Every trellis that a layer may be given: the job's code at each of its rates, then the half rates that it has not."""
    own = offered_bits(quantize.code)
    specs = [TrellisSpec.at_bits(quantize.code, bits, quantize.state_bits) for bits in own]
    if settings.half_code is not None:
        others = [bits for bits in offered_bits(settings.half_code) if bits not in own]
        specs += [TrellisSpec.at_bits(settings.half_code, bits, quantize.state_bits) for bits in others]
    return specs


def spec_name(spec: TrellisSpec) -> str:
    """How a report calls a trellis, as `--layer` does: "2.5:hyb2"."""
    return f"{spec.bits:g}:{spec.code}"


def rows(job: RunDirectory, calibration: RunDirectory) -> dict[str, dict[str, Any]]:
    """Full name -> what was measured of each layer that calibration called, and its sensitivity in `sensitivity`.

    A layer without any effect on these windows (an expert that they never reach) gets the median: nothing is known of it. One
    with next to none counts for LEAST_SHARE of the median layer. A layer of zeros, which no rounding changes, gets 0.
    Raises QtipError where the stage is not finished.
    """
    measured = {name: dict(row) for key in calibrate.block_keys(calibration) for name, row in job.report(key)["layers"].items()}
    known = {name: row["kl"] for name, row in measured.items() if row["kl"] > UNMEASURED_KL and row["noise_loss"] > 0}
    least = LEAST_SHARE * statistics.median(known.values()) if known else 0.0
    found = {name: max(kl, least) / measured[name]["noise_loss"] for name, kl in known.items()}
    middle = statistics.median(found.values()) if found else 0.0
    for name, row in measured.items():
        row["sensitivity"] = found.get(name, middle if row["noise_loss"] > 0 else 0.0)
    return measured


def _measure(
    source: ModelSource,
    quantize: QuantizeSettings,
    settings: SensitivitySettings,
    specs: Sequence[TrellisSpec],
    calibration: RunDirectory,
    job: SharedDirectory,
    watcher: Watcher,
    processes: Processes,
) -> None:
    keys = calibrate.block_keys(calibration)
    missing = [key for key in keys if not job.done(key)]
    watcher.begin(STAGE, len(keys), len(keys) - len(missing))
    if not missing:
        return
    noise = _noise(quantize, settings)
    rounding = RoundingSettings(
        Transform.parse(quantize.transform),
        quantize.damping,
        quantize.refit,
        quantize.scale,
        quantize.search and quantize.scale is None,
        seed=quantize.seed,
    )
    reference = Reference(source, job.read(TOKENS)[TOKENS], watcher, processes.poll)
    for index, (prefix, _) in enumerate(reference.skeleton.blocks):
        if block_key(index) in missing:
            layers: dict[str, Any] = {}
            groups = [group["names"] for group in calibration.report(block_key(index))["groups"]]
            # Each layer takes one pass of the model.
            owners = least_loaded({names[0]: len(names) for names in groups}, [0.0] * processes.world)
            own = [names for names in groups if owners[names[0]] == processes.rank]
            for names, hessian_II in _hessians(calibration, index, reference.skeleton, own):
                processes.poll()
                linears = {name: reference.skeleton.model.get_submodule(name) for name in names}
                weights = {name: linear.weight for name, linear in linears.items()}
                for name, probe in probe_group(weights, hessian_II, noise, specs, rounding).items():
                    with reference.changed({f"{name}.weight": probe.noisy_OI}):
                        kl = reference.divergence()
                    layers[name] = _row(name, linears[name], kl, probe.noise_loss, probe.losses)
            found = {name: row for part in processes.collect(layers) for name, row in part.items()}
            job.commit(block_key(index), {}, {"layers": found})
            watcher.advance(prefix)
        if block_key(index) != missing[-1]:
            reference.advance()


def _row(
    name: str, linear: torch.nn.Module, kl_W: Tensor, noise_loss: float, losses: Mapping[TrellisSpec, float]
) -> dict[str, Any]:
    kl = float(kl_W.mean())
    if not all(map(math.isfinite, (kl, noise_loss, *losses.values()))):
        raise QtipError(f"with noise in {name} the model predicts nothing: its KL is {kl}", "look for NaN or infinite weights")
    return {
        "shape": [linear.out_features, linear.in_features],
        "bias": linear.bias is not None,
        "kl": kl,
        "kl_stderr": float(kl_W.std() / math.sqrt(len(kl_W))) if len(kl_W) > 1 else None,
        "noise_loss": noise_loss,
        "losses": {spec_name(spec): loss for spec, loss in losses.items()},
    }


def _hessians(
    calibration: RunDirectory, index: int, skeleton: Skeleton, groups: Sequence[list[str]]
) -> Iterator[tuple[list[str], Tensor]]:
    """(full names, Hessian) of those of `groups` of a block that have one to be rounded with; others are never quantized."""
    stored = StoredMoments(calibration, index, *skeleton.blocks[index])
    for names in groups:
        moments = stored.of(names, skeleton.device)
        if moments.seen:
            yield names, moments.mixed()


def _noise(quantize: QuantizeSettings, settings: SensitivitySettings) -> TrellisSpec:
    try:
        return TrellisSpec.at_bits(quantize.code, settings.noise_bits, quantize.state_bits)
    except SpecError as error:
        fact, _, remedy = str(error).partition(": ")
        raise SettingsError(f"noise_bits cannot be {settings.noise_bits:g}: {fact}", remedy) from error


def _heldout(
    source: ModelSource, settings: SensitivitySettings, calibration: RunDirectory, watcher: Watcher
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, report) of the shard `tokens`: windows that calibrated nothing; fewer than asked for where text is short."""
    own = CalibrationSettings(**calibration.settings)
    wanted = settings.windows + settings.judge_windows
    is_other_text = settings.data is not None and settings.data != own.data
    asked = {"data": settings.data, "samples": wanted} if is_other_text else {"samples": own.samples + wanted}
    windows = calibrate.load_windows(source, own.model_copy(update=asked))
    seen = {row.numpy().tobytes() for row in calibration.read(calibrate.TOKENS)[calibrate.TOKENS]}
    kept = [row for row in windows.tokens if row.numpy().tobytes() not in seen][:wanted]
    if len(kept) < 2:
        raise QtipError(
            f"{windows.source} holds {windows.available} windows of {windows.context} tokens, and {windows.rows - len(kept)} "
            "of them calibrated the model: too few are left to measure sensitivities on",
            "calibrate with fewer --samples, or give other text with --heldout-data FILE",
        )
    share = settings.windows if len(kept) == wanted else max(1, len(kept) * settings.windows // wanted)
    if len(kept) < wanted:
        watcher.note(
            f"{windows.source} holds {len(kept)} held-out windows of {windows.context} tokens, not {wanted}: "
            f"layers are measured on {share}, models on {len(kept) - share}"
        )
    tensors = {TOKENS: torch.stack(kept[:share]), JUDGE_TOKENS: torch.stack(kept[share:])}
    return tensors, {"source": windows.source, "windows": share, "judge_windows": len(kept) - share, "context": windows.context}
