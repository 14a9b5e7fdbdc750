"""Owns `--dry-run`: which plan each command makes, and how it is shown, as a table with totals or as one JSON object."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtipcli.cli.display import print_json, print_table

if TYPE_CHECKING:
    from qtipcli.config import AllocationSettings, CalibrationSettings, FinetuneSettings, QuantizeSettings
    from qtipcli.stages.plan import LayerKind, Plan


def calibrate(
    model: str,
    revision: str | None,
    trust: bool,
    as_json: bool,
    settings: CalibrationSettings,
    out: Path | None,
    head: bool,
    two_sided: bool,
) -> None:
    """What `qtip calibrate` would do."""
    from qtipcli.model.remote import described
    from qtipcli.stages import dry_run, pipeline

    with described(model, revision, trust) as source:
        directory = out or pipeline.hessians_directory(source)
        show(dry_run.of_calibrate(source, settings, directory, head, two_sided), as_json)


def quantize(
    model: str,
    revision: str | None,
    trust: bool,
    as_json: bool,
    calibration: dict[str, Any],
    settings: QuantizeSettings,
    allocation: AllocationSettings | None,
    hessians: Path | None,
    out: Path | None,
    pack_after: bool,
) -> None:
    """What `qtip quantize` would do."""
    from qtipcli.model.remote import described
    from qtipcli.stages import dry_allocate, dry_run, pipeline

    with described(model, revision, trust) as source:
        where = hessians or pipeline.hessians_directory(source)
        job = pipeline.job_directory(out or pipeline.output_directory(source, f"{settings.bits:g}bit"))
        if allocation is None:
            found = dry_run.of_quantize(source, calibration, settings, where, job, pack_after)
        else:
            found = dry_allocate.of_allocate(source, calibration, settings, allocation, where, job, pack_after)
        show(found, as_json)


def pack(model: str, revision: str | None, trust: bool, as_json: bool, job: Path, max_shard_size: str) -> None:
    """What `qtip pack` would do."""
    from qtipcli.model.remote import described
    from qtipcli.stages import dry_run

    with described(model, revision, trust) as source:
        show(dry_run.of_pack(source, job, max_shard_size), as_json)


def finetune(
    directory: Path,
    base: str | None,
    revision: str | None,
    trust: bool,
    as_json: bool,
    settings: FinetuneSettings,
    out: Path | None,
    memory_gib: float,
) -> None:
    """What `qtip finetune` would do. Raises SettingsError in one of several processes."""
    from qtipcli.errors import SettingsError
    from qtipcli.job import launcher
    from qtipcli.model.remote import described
    from qtipcli.stages import dry_finetune
    from qtipcli.stages import finetune as stage

    if launcher.world() > 1:
        raise SettingsError("a dry run is of one process", "start it without torchrun: N processes share its windows")
    packed = stage.packed_directory(directory)
    target = out or packed.with_name(f"{packed.name}-tuned")
    with described(base or stage.original_of(packed), revision, trust) as source:
        show(dry_finetune.of_finetune(source, packed, settings, target, memory_gib), as_json)


def evaluate(
    models: list[str],
    base: str | None,
    trust: bool,
    as_json: bool,
    cache_gib: float | None,
    cache: Path | None,
    against: str | None,
    **asked: Any,
) -> None:
    """What `qtip eval` would do. asked: as of dry_eval.of_eval."""
    from qtipcli.errors import SettingsError
    from qtipcli.hub.config import METHOD
    from qtipcli.model.remote import described
    from qtipcli.stages import compare, dry_eval
    from qtipcli.stages.load import check_name
    from qtipcli.stages.measure import Keeping

    if asked["compare"]:
        compare.checked(models, base, against)
    elif len(models) > 1:
        raise SettingsError(f"{len(models)} models are given and one is evaluated", "say --compare to compare them")
    with ExitStack() as stack:
        sources = []
        for name in filter(None, (*models, base)):
            check_name(name)
            sources.append(stack.enter_context(described(name, None, trust, METHOD)))
        original = sources.pop() if base is not None else None
        show(dry_eval.of_eval(sources, original, keeping=Keeping(cache_gib, cache), **asked), as_json)


def push(directory: Path, repository: str, revision: str | None, as_json: bool) -> None:
    """What `qtip push` would send."""
    from qtipcli.stages import dry_push

    show(dry_push.of_push(directory, repository, revision), as_json)


def show(plan: Plan, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print_json(plan.as_json())
        return
    title = f"what qtip {plan.command} would do with {plan.model}"
    if plan.layers:
        print_table(title, [_row(kind) for kind in plan.layers])
    elif plan.tables:
        print(title)
    for name, rows in plan.tables.items():
        print_table(name, rows)
    totals = plan.as_json()
    if plan.stored is not None:
        stored, files = plan.stored, f"{plan.stored.files} safetensors file{'s' if plan.stored.files > 1 else ''}"
        rate = f", {stored.bits_per_weight:.3f} bits per packed weight" if stored.bits_per_weight else ""
        print(f"stored: {stored.weights:,} bytes in {files}{rate}; index {stored.index:,}, other files {stored.copied:,}")
    for name, title in (("ram", "peak RAM"), ("vram", "peak VRAM")):
        phases = getattr(plan, name)
        if phases:
            print(f"{title}: {totals[f'peak_{name}'] / 1e6:,.0f} MB ({max(phases, key=phases.get)})")
    if plan.disk:
        parts = ", ".join(f"{what} {size / 1e6:,.1f}" for what, size in plan.disk.items())
        print(f"disk: {totals['total_disk'] / 1e6:,.1f} MB ({parts})")
    if plan.seconds:
        parts = ", ".join(f"{what} {_time(seconds)}" for what, seconds in plan.seconds.items())
        print(f"time here and now: {_time(totals['total_seconds'])} ({parts})")
    for note in plan.notes:
        print(f"note: {note}")
    print("nothing was written")


def _row(kind: LayerKind) -> dict[str, Any]:
    return {
        "layers": kind.name,
        "count": kind.count,
        "shape": " x ".join(map(str, kind.shape)),
        "bits": kind.bits,
        "code": kind.code,
        "bytes": f"{kind.bytes:,}",
        "left because": kind.why,
    }


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
