"""Owns what `qtip quantize --dry-run` says of a measured allocation: its budget, the two models that it rounds, its memory.

Which layer gets how many bits is what the run measures, so that the table is that of the best uniform model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtipcli.config import AllocationSettings, QuantizeSettings
from qtipcli.model.imagined import Imagined
from qtipcli.model.source import ModelSource
from qtipcli.stages import allocate, calibrate, dry_run
from qtipcli.stages.allocate import UNIFORM
from qtipcli.stages.divergence import KEPT_BYTES
from qtipcli.stages.memory import FLOAT
from qtipcli.stages.own_process import resident_bytes
from qtipcli.stages.plan import Plan
from qtipcli.stages.sensitivity import spec_name

DOUBLE = 8
"""Bytes of a log-probability that is kept of the original."""

MEASURING = "measuring layers"

UNIFORM_SAID = "layers and bytes are those of the best uniform model: the allocated one takes at most the budget"

NOT_COUNTED = "the time that measuring each layer takes is not counted; its memory is"


def of_allocate(
    source: ModelSource,
    calibration: Mapping[str, Any],
    settings: QuantizeSettings,
    allocation: AllocationSettings,
    hessians: Path,
    job_directory: Path,
    pack_after: bool = True,
) -> Plan:
    """The plan of pipeline.allocate_model. Raises SettingsError where nothing fits into what was asked for."""
    skeleton = Imagined(source)
    budget = allocate.budget_of(skeleton, settings, allocation)
    uniform = budget.best_uniform()
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    del skeleton
    own = allocate.settings_of({"uniform": spec_name(uniform)}, settings, UNIFORM)
    plan = dry_run.of_quantize(source, calibration, own, hessians, job_directory, pack_after)
    kept = DOUBLE * allocation.windows * calibrate.context_of(source, calibration.get("context")) * vocabulary
    measuring = {MEASURING: FLOAT * parameters + (kept if kept <= KEPT_BYTES else 0)}
    on_gpu = bool(plan.vram)
    ram = plan.ram if on_gpu else plan.ram | {MEASURING: resident_bytes() + measuring[MEASURING]}
    rows = (
        {
            "budget_bytes": budget.limit,
            "of them fixed": budget.fixed_bytes,
            "best uniform": spec_name(uniform),
            "its_bytes": budget.uniform_bytes(uniform),
            "rates": ", ".join(map(spec_name, budget.specs)),
        },
    )
    return replace(
        plan,
        ram=ram,
        vram=plan.vram | measuring if on_gpu else plan.vram,
        seconds=plan.seconds | {"quantize, the uniform model": plan.seconds["quantize"]},
        disk=plan.disk | {"uniform quantize job": plan.disk["quantize job"]},
        notes=(*plan.notes, NOT_COUNTED, UNIFORM_SAID),
        tables={"measured allocation": rows},
    )
