"""Owns `--max-memory`: what each command is to hold in memory, found before it starts; here what was found is also said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtipcli.config import parse_size

if TYPE_CHECKING:
    from qtipcli.config import CalibrationSettings, QuantizeSettings
    from qtipcli.model.source import ModelSource
    from qtipcli.stages.fitting import Fit
    from qtipcli.stages.progress import Watcher


def calibrate(
    limit: str | None,
    source: ModelSource,
    settings: CalibrationSettings,
    directory: Path,
    head: bool,
    two_sided: bool,
    watcher: Watcher,
) -> float | None:
    """GiB of activations in memory; None where there is no limit. Raises SettingsError where nothing fits."""
    from qtipcli.stages import dry_run

    if limit is None:
        return None
    return _said(dry_run.fit_calibrate(source, settings, directory, head, two_sided, parse_size(limit)), watcher)


def quantize(
    limit: str | None,
    source: ModelSource,
    calibration: dict[str, Any],
    settings: QuantizeSettings,
    hessians: Path,
    out: Path,
    watcher: Watcher,
) -> float | None:
    """The same for `qtip quantize`, its calibration and packing included."""
    from qtipcli.stages import dry_run, pipeline

    if limit is None:
        return None
    job = pipeline.job_directory(out)
    return _said(dry_run.fit_quantize(source, calibration, settings, hessians, job, parse_size(limit)), watcher)


def pack(limit: str | None, source: ModelSource, job: Path, max_shard_size: str) -> None:
    """Refuse a packing that takes more."""
    import torch

    from qtipcli.stages import dry_run, fitting

    if limit is not None:
        plan = dry_run.of_pack(source, job, max_shard_size)
        fitting.fit(lambda _: {"ram": plan.ram, "vram": {}}, parse_size(limit), torch.device("cpu"))


def _said(fit: Fit, watcher: Watcher) -> float:
    watcher.note(
        f"memory: about {fit.peak / 1e6:,.0f} MB at most, in the phase '{fit.phase}'; "
        f"activations beyond {fit.memory_gib:g} GiB go to files"
    )
    return fit.memory_gib
