"""Owns a long run: cases drawn by hypothesis from a seed, counted, and what was found, each kind once and made small."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from fuzz import strategies, valid
from fuzz.targets import FINDING
from fuzz.worker import Worker

ROUND = 50
"""Cases of a kind before the next kind's turn."""


@dataclass
class Tally:
    """Counts of a run. inputs: by kind; answers: by kind of answer; findings: where -> {"case", "what", "times"}."""

    inputs: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    refusals: set[str] = field(default_factory=set)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0


def run(
    worker: Worker, seconds: float, seed: int, report: Callable[[Tally], None], kinds: Sequence[str] = valid.KINDS
) -> Tally:
    """Try cases for so many seconds. report: called after each round."""
    tally, started, turn = Tally(), time.monotonic(), 0
    contents = {kind: valid.content(worker.folder / "valid" / kind) for kind in kinds}
    while time.monotonic() - started < seconds:
        kind = kinds[turn % len(kinds)]
        _round(worker, kind, contents[kind], seed + turn, tally)
        turn += 1
        tally.seconds = time.monotonic() - started
        report(tally)
    return tally


def _round(worker: Worker, kind: str, content: Mapping[str, bytes], seed: int, tally: Tally) -> None:
    @seeded(seed)
    @settings(
        max_examples=ROUND, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(strategies.cases(kind, content))
    def each(case: dict[str, Any]) -> None:
        tally.inputs[kind] += 1
        case["depth"] = tally.inputs[kind] % 16
        before = time.monotonic()
        for answer in worker.tried(case):
            tally.answers[answer["kind"]] += 1
            if answer["kind"] == FINDING:
                _note(worker, tally, case, answer)
        tally.slowest = max(tally.slowest, time.monotonic() - before)

    each()


def _note(worker: Worker, tally: Tally, case: dict[str, Any], answer: Mapping[str, Any]) -> None:
    where = answer["where"]
    if where in tally.findings:
        tally.findings[where]["times"] += 1
        return
    tally.findings[where] = {"case": smaller(worker, case, where), "what": answer["what"], "times": 1}


def smaller(worker: Worker, case: dict[str, Any], where: str) -> dict[str, Any]:
    """The case without the breaks that the finding does not need."""
    for place in reversed(range(len(case["breaks"]))):
        rest = [each for number, each in enumerate(case["breaks"]) if number != place]
        if rest and any(answer["where"] == where for answer in worker.tried({**case, "breaks": rest})):
            case = {**case, "breaks": rest}
    return case
