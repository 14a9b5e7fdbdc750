"""Owns the card and the evaluations that lie in a packed directory: README.md and qtip-eval.json, which may change later.

Only this file knows where the card's facts stand in a packed directory. Neither file is among its checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from qtipcli.errors import QtipError
from qtipcli.hub import card
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.published import model_name, published
from qtipcli.job.files import write_text_atomic
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.untrusted import read_table, read_whole

CARD_FILE = "README.md"
EVALUATIONS_FILE = "qtip-eval.json"
CHANGING = (CARD_FILE, EVALUATIONS_FILE)
"""The files of a packed directory whose bytes may change when it is done."""

_UNREMARKABLE = ("seed", "bits", "skip", "layers")
"""Settings that the card says elsewhere, or that say something only where they are set."""


def write(
    directory: Path,
    config: QtipConfig,
    record: Mapping[str, Any],
    index: Mapping[str, Any],
    inherited: Mapping[str, Any],
) -> None:
    """Write the card of a packed model to `directory`, for the first time.

    record, index: what qtip.json and the index say. inherited: see `inherited_from`.
    Raises StorageError.
    """
    layouts = config.layouts()
    weights = sum(layout.weights for layout in layouts.values())
    settings = (record.get("job") or record.get("quantize") or {}).get("settings", {})
    totals = index.get("metadata", {})
    facts = card.CardFacts(
        base_model=str(config.provenance.get("base_model", "unknown")),
        bits=sum(layout.spec.bits * layout.weights for layout in layouts.values()) / weights if weights else 0.0,
        stored_bits=config.bits_per_weight,
        parameters=totals.get("total_parameters"),
        size_bytes=totals.get("total_size", 0),
        groups=_groups(config, record.get("layers", {})),
        left=len(config.not_converted),
        settings={key: value for key, value in settings.items() if key not in _UNREMARKABLE or value},
        calibration=record.get("calibration"),
        tuning=config.provenance.get("finetune"),
        inherited=inherited,
    )
    write_text_atomic(directory / CARD_FILE, card.text(facts))


def inherited_from(directory: Path, watcher: Watcher) -> dict[str, Any]:
    """What a quantized copy takes over from the card in a model's directory; nothing where it has none."""
    file = directory / CARD_FILE
    if not file.exists():
        return {}
    try:
        return card.inherited(card.front_matter(read_whole(file, "").decode("utf-8")))
    except (OSError, ValueError, QtipError) as error:
        watcher.note(f"licence and languages are not taken over from {file}: {error}")
        return {}


def record(directory: str | Path, base: str | None, result: Mapping[str, Any], watcher: Watcher | None = None) -> None:
    """Keep an evaluation in the packed directory it is of, and in the figures of its card.

    directory: as the user named it; a hub name, or a directory that qtip did not pack, is left alone. base: the original,
    as named. result: its JSON; it takes the place of an earlier one with the same protocol and original.
    Where the directory cannot be written, that is a note: the evaluation was not in vain.
    """
    watcher, where = watcher or Silent(), Path(directory)
    if not (where / "qtip.json").is_file():
        return
    original = None if base is None else model_name(Path(base)) if Path(base).is_dir() else base
    new = published({**result, "base": original, "qtip": package_version("qtipcli")})
    try:
        results = [old for old in evaluations(where) if _question(old) != _question(new)] + [new]
        write_text_atomic(where / EVALUATIONS_FILE, json.dumps({"results": results}, indent=1) + "\n")
        _write_figures(where, results, watcher)
    except (OSError, ValueError, KeyError, TypeError, QtipError) as error:
        watcher.note(f"the figures are not kept with the model: {error}")


def evaluations(directory: Path) -> list[dict[str, Any]]:
    """The evaluations kept in a packed directory, oldest first; none where there is no readable record of them."""
    try:
        results = read_table(directory / EVALUATIONS_FILE, "").get("results")
    except QtipError:
        return []
    return [result for result in results if isinstance(result, dict)] if isinstance(results, list) else []


def _write_figures(directory: Path, results: list[dict[str, Any]], watcher: Watcher) -> None:
    file = directory / CARD_FILE
    if not file.is_file():
        return
    text = read_whole(file, "").decode()
    fields = read_table(directory / "config.json", "")["quantization_config"]
    base_model = QtipConfig(**fields).provenance.get("base_model", "MODEL")
    changed = card.with_section(text, card.FIGURES, card.figures(results, str(base_model)))
    if changed is None:
        watcher.note(f"{file} has no place for figures (its marks were removed): they are in {EVALUATIONS_FILE} alone")
        return
    write_text_atomic(file, changed)


def _question(result: Mapping[str, Any]) -> tuple[str, Any]:
    """What was asked, in a form that compares: an answer to the same question replaces the older one."""
    return json.dumps(result.get("protocol"), sort_keys=True), result.get("base")


def _groups(config: QtipConfig, reports: Mapping[str, Mapping[str, Any]]) -> list[card.LayerGroup]:
    members: dict[tuple[str, str, float], list[str]] = {}
    layouts = config.layouts()
    for name, layout in layouts.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        members.setdefault((kind, layout.spec.code, float(layout.spec.bits)), []).append(name)
    groups = []
    for (kind, code, bits), names in members.items():
        stored = sum(layouts[name].stored_bits for name in names) / sum(layouts[name].weights for name in names)
        losses = [loss for name in names if (loss := reports.get(name, {}).get("relative_proxy_loss")) is not None]
        mean = sum(losses) / len(losses) if losses else None
        groups.append(card.LayerGroup(kind, len(names), code, bits, stored, mean))
    return groups
