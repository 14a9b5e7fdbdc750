"""Owns the order of the stages: what `qtip quantize` does beyond its own stage so that one command is enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtipcli.config import AllocationSettings, CalibrationSettings, QuantizeSettings, settings_from
from qtipcli.errors import CorruptError, MismatchError, SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model
from qtipcli.job.processes import ALONE, Processes
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import allocate, calibrate, outer, pack, quantize, sensitivity, whole
from qtipcli.stages.allocate import ALLOCATED, UNIFORM
from qtipcli.stages.progress import Watcher


def hessians_directory(source: ModelSource) -> Path:
    """Where a model's Hessians lie unless the user says otherwise."""
    return Path(f"{source.slug}.hessians")


def job_directory(out: Path) -> Path:
    """The run directory that belongs to a packed directory: beside it, so that the result holds nothing but the model."""
    return out.with_name(f"{out.name}.job")


def sensitivities_directory(hessians: Path, code: str) -> Path:
    """Where the layers' sensitivities lie unless the user says otherwise: beside the Hessians, and for each code its own."""
    return hessians.with_name(f"{hessians.name}.sensitivity-{code}")


def output_directory(source: ModelSource, rate: str) -> Path:
    """Where a packed model goes unless the user says otherwise. rate: such as "2.4bit"."""
    return Path(f"{source.slug}-qtip-{rate}")


def quantize_model(
    source: ModelSource,
    calibration: Mapping[str, Any],
    settings: QuantizeSettings,
    hessians: Path,
    out: Path,
    watcher: Watcher,
    force: bool = False,
    pack_after: bool = True,
    limit_blocks: int | None = None,
    memory_gib: float | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Calibrate unless that is done, round, and pack to `out`; each step goes on where an earlier run stopped.

    calibration: the fields of CalibrationSettings that the user asked for; the others are as the Hessians have them.
    limit_blocks: work on the first blocks only, and pack nothing unless these are all. memory_gib: as of the stages.
    processes: that share the work; the first one packs.
    Returns the packed directory, or the run directory with pack_after False, with blocks left to do and in the other processes.
    """
    quantize.refuse_shared(settings, processes)
    pack.refuse_surroundings(out)
    job = job_directory(out)
    if pack_after and (force or not _is_packed(job, out)):
        whole.refuse_occupied(out, force)
        pack.refuse_links(pack.other_files(source.directory), source.directory)
    _calibrate(source, calibration, settings, hessians, force, watcher, limit_blocks, memory_gib, processes)
    quantize.run(source, settings, hessians, job, force, watcher, limit_blocks, memory_gib, processes)
    if limit_blocks is not None and limit_blocks < (count := len(Skeleton(source).blocks)):
        watcher.note(f"the first {limit_blocks} of {count} blocks are rounded: the same command without --limit-blocks goes on")
        return job
    if not pack_after or not processes.is_main:
        return job
    return pack.run(source, job, out, force, watcher=watcher)


def allocate_model(
    source: ModelSource,
    calibration: Mapping[str, Any],
    settings: QuantizeSettings,
    allocation: AllocationSettings,
    hessians: Path,
    sensitivities: Path,
    out: Path,
    watcher: Watcher,
    force: bool = False,
    pack_after: bool = True,
    memory_gib: float | None = None,
    processes: Processes = ALONE,
) -> Path:
    """As `quantize_model`, with a rate for each layer that is measured to be worth its bytes.

    The allocated model is rounded in OUT.job, the best uniform one of the same size in OUT.uniform.job; both are compared on
    held-out text, and the better one is packed. Each step goes on where an earlier run stopped.
    Returns the packed directory, or the better run directory with pack_after False and in processes other than the first.
    """
    quantize.refuse_shared(settings, processes)
    pack.refuse_surroundings(out)
    jobs = {ALLOCATED: job_directory(out), UNIFORM: job_directory(out.with_name(f"{out.name}.{UNIFORM}"))}
    if pack_after and (force or not any(_is_packed(job, out) for job in jobs.values())):
        whole.refuse_occupied(out, force)
        pack.refuse_links(pack.other_files(source.directory), source.directory)
    allocate.check(source, settings, allocation)
    _calibrate(source, calibration, settings, hessians, force, watcher, memory_gib=memory_gib, processes=processes)
    try:
        sensitivity.run(source, settings, allocation.sensitivity(), hessians, sensitivities, force, watcher, processes)
    except MismatchError as error:
        raise MismatchError(error.message, "--sensitivities DIR for others, or --force to measure them again") from error
    decision = job_directory(out.with_name(f"{out.name}.allocation"))
    table = allocate.decide(source, settings, allocation, hessians, sensitivities, decision, force, watcher, processes)
    report: dict[str, Any] = {"target": allocation.model_dump()} | {name: table[name] for name in table if name != "layers"}
    if allocate.is_uniform(table):
        watcher.note(f"the best allocation is the uniform model at {table['uniform']}: there is nothing to compare")
        del jobs[UNIFORM]
    for which, job in jobs.items():
        watcher.note(f"{which}: predicted KL {table['predicted_kl'][which]:.4g} at {table['bytes'][which]:,} bytes, in {job}")
        chosen = allocate.settings_of(table, settings, which)
        quantize.run(source, chosen, hessians, job, force, watcher, memory_gib=memory_gib, processes=processes)
    kept = ALLOCATED
    if UNIFORM in jobs:
        verdict = allocate.judge(source, sensitivities, jobs, decision, watcher, processes)
        report["measured"], kept = verdict, verdict["kept"]
        watcher.note(
            f"KL on {verdict['windows']} held-out windows: allocated {verdict['kl'][ALLOCATED]:.4g}, "
            f"uniform {verdict['kl'][UNIFORM]:.4g}; the {kept} model is kept"
        )
    if not pack_after or not processes.is_main:
        return jobs[kept]
    return pack.run(source, jobs[kept], out, force, watcher=watcher, provenance={"allocation": report | {"kept": kept}})


def _is_packed(job: Path, out: Path) -> bool:
    return (job / "job.json").is_file() and pack.packed_from(out, RunDirectory.load(job, quantize.STAGE))


def _calibrate(
    source: ModelSource,
    asked: Mapping[str, Any],
    quantize: QuantizeSettings,
    directory: Path,
    force: bool,
    watcher: Watcher,
    limit_blocks: int | None = None,
    memory_gib: float | None = None,
    processes: Processes = ALONE,
) -> None:
    """Make or complete the Hessians that a job with the settings `quantize` needs."""
    wants_outer = outer.shard_keys(quantize.model_dump())
    head = bool(wants_outer) and outer.needs_head_hessian(outer.plan(Skeleton(source), quantize))
    two_sided = quantize.two_sided
    found = _found_hessians(directory, force)
    if found is not None and not force and (damaged := found.damaged(in_full=False)):
        raise next(iter(damaged.values()))  # content is checked by who reads it
    if processes.broadcast(found is not None) != (found is not None):
        raise SettingsError(
            f"{directory} is there for the first process and not for another one, or the other way round",
            "put it on a file system that all machines share, under the same path",
        )
    there = found.settings | {"slices": calibrate.slices_of(found)} if found else {}
    settings = settings_from(CalibrationSettings, {**there, **asked})
    if found is not None:
        is_same = settings.model_dump() == there and found.fingerprint.get("model") == fingerprint_model(source.directory)
        is_whole = not force or not found.damaged()
        is_finished = is_same and is_whole and calibrate.is_complete(found, Skeleton(source), limit_blocks)
        # The first process decides: what the others see of a shared file system may be older.
        if processes.broadcast(is_finished):
            # Finished Hessians do not need their text any more: it may have been moved.
            watcher.note(f"the Hessians in {directory} are used")
            lacks_head = head and not found.done(calibrate.HEAD)
            lacks_outputs = two_sided and not calibrate.has_output_side(found, limit_blocks)
            if lacks_head:
                watcher.note(f"that of the head's input is added to {directory}")
            if lacks_outputs:
                watcher.note(f"those of layers' outputs are added to {directory}")
            if lacks_head or lacks_outputs:
                calibrate.add(source, directory, watcher, head, two_sided, limit_blocks, memory_gib, processes)
            return
    try:
        calibrate.run(source, settings, directory, force, watcher, head, two_sided, limit_blocks, memory_gib, processes)
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
