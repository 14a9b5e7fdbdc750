"""Owns the course of a training run as files, one JSON line a step and a picture; both can be made anew from its shard."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from qtipcli.errors import QtipError
from qtipcli.job.files import write_atomic, write_text_atomic
from qtipcli.stages.progress import Watcher

LINES_FILE, PICTURE_FILE = "loss.jsonl", "loss.png"

SMOOTHED_STEPS = 20
"""The picture's training curve is a running mean over this many steps: single batches differ by more than a run gains."""


def write(directory: Path, losses: Sequence[float], judged: Sequence[tuple[int, float]], watcher: Watcher) -> None:
    """Write both files. losses: of each step, from step 1. judged: (step, held-out loss), step 0 being before the first."""
    heldout = dict(judged)
    lines = [{"step": 0, "heldout": heldout[0]}] if 0 in heldout else []
    for step, loss in enumerate(losses, 1):
        lines.append({"step": step, "loss": loss} | ({"heldout": heldout[step]} if step in heldout else {}))
    write_text_atomic(directory / LINES_FILE, "".join(json.dumps(line) + "\n" for line in lines))
    try:
        _draw(directory / PICTURE_FILE, losses, judged)
    except QtipError as error:
        watcher.note(f"{PICTURE_FILE} was not drawn: {error}")


def _draw(path: Path, losses: Sequence[float], judged: Sequence[tuple[int, float]]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QtipError("matplotlib is not installed", "pip install matplotlib") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    means = [sum(losses[max(0, end - SMOOTHED_STEPS) : end]) / min(end, SMOOTHED_STEPS) for end in range(1, len(losses) + 1)]
    axes.plot(range(1, len(losses) + 1), means, label=f"training, mean of {SMOOTHED_STEPS} steps")
    axes.plot([step for step, _ in judged], [loss for _, loss in judged], marker="o", label="held out, as stored")
    axes.set(
        xlabel="step",
        ylabel="KL to the original, nats",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomic(path, [buffer.getvalue()])
