"""Owns the order of the stages: what `qtip quantize` does beyond its own stage so that one command is enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtipcli.config import CalibrationSettings, QuantizeSettings, settings_from
from qtipcli.errors import CorruptError, MismatchError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import calibrate, outer, pack, quantize
from qtipcli.stages.progress import Watcher


def hessians_directory(source: ModelSource) -> Path:
    """Where a model's Hessians lie unless the user says otherwise."""
    return Path(f"{source.slug}.hessians")


def job_directory(out: Path) -> Path:
    """The run directory that belongs to a packed directory: beside it, so that the result holds nothing but the model."""
    return out.with_name(f"{out.name}.job")


def output_directory(source: ModelSource, bits: float) -> Path:
    """Where a packed model goes unless the user says otherwise."""
    return Path(f"{source.slug}-qtip-{bits:g}bit")


def quantize_model(
    source: ModelSource,
    calibration: Mapping[str, Any],
    settings: QuantizeSettings,
    hessians: Path,
    out: Path,
    watcher: Watcher,
    force: bool = False,
    pack_after: bool = True,
) -> Path:
    """Calibrate unless that is done, round, and pack to `out`; each step goes on where an earlier run stopped.

    calibration: the fields of CalibrationSettings that the user asked for; the others are as the Hessians have them.
    Returns the packed directory, or the run directory with pack_after False.
    """
    pack.refuse_surroundings(out)
    job = job_directory(out)
    if pack_after and not _is_packed(job, out):
        pack.refuse_occupied(out, force)
    wants_outer = outer.shard_keys(settings.model_dump())
    head = bool(wants_outer) and outer.needs_head_hessian(outer.plan(Skeleton(source), settings))
    _calibrate(source, calibration, hessians, force, watcher, head, settings.two_sided)
    quantize.run(source, settings, hessians, job, force, watcher)
    return pack.run(source, job, out, force, watcher=watcher) if pack_after else job


def _is_packed(job: Path, out: Path) -> bool:
    return (job / "job.json").is_file() and pack.packed_from(out, RunDirectory.load(job, quantize.STAGE))


def _calibrate(
    source: ModelSource,
    asked: Mapping[str, Any],
    directory: Path,
    force: bool,
    watcher: Watcher,
    head: bool,
    two_sided: bool,
) -> None:
    found = _found_hessians(directory, force)
    settings = settings_from(CalibrationSettings, {**(found.settings if found else {}), **asked})
    if found is not None:
        is_same = settings.model_dump() == found.settings and found.fingerprint["model"] == fingerprint_model(source.directory)
        is_whole = not force or not found.damaged()
        if is_same and is_whole and calibrate.is_complete(found, Skeleton(source)):
            # Finished Hessians do not need their text any more: it may have been moved.
            watcher.note(f"the Hessians in {directory} are used")
            lacks_head = head and not found.done(calibrate.HEAD)
            lacks_outputs = two_sided and not calibrate.has_output_side(found)
            if lacks_head or lacks_outputs:
                added = ["that of the head's input"] * lacks_head + ["those of layers' outputs"] * lacks_outputs
                watcher.note(f"{' and '.join(added)} are added to {directory}")
                calibrate.add(source, directory, watcher, head, two_sided)
            return
    try:
        calibrate.run(source, settings, directory, force, watcher, head, two_sided)
    except MismatchError as error:
        raise MismatchError(
            error.message, "leave those options out to use what is there, or --hessians DIR for others"
        ) from error


def _found_hessians(directory: Path, force: bool) -> RunDirectory | None:
    """The calibrate job in `directory`, if there is one; with `force` one that cannot be read counts as none."""
    if not (directory / "job.json").is_file():
        return None
    try:
        return RunDirectory.load(directory, calibrate.STAGE)
    except (CorruptError, MismatchError):
        if not force:
            raise
        return None
