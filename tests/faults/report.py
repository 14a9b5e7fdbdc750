"""Owns what is said about a run of faults: the table by kind, and the JSON that pieces of a long run add up in."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from faults import disks, kinds
from faults.judge import FAILED, REFUSED, SAME, TOO_LATE


def counted(results: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Kind -> {"tried", and each outcome that there was: how often}."""
    table: dict[str, Counter[str]] = {}
    for result in results:
        table.setdefault(result["kind"], Counter()).update(("tried", result["outcome"]))
    return {kind: dict(table[kind]) for kind in kinds.KINDS if kind in table}


def print_table(results: list[dict[str, Any]]) -> None:
    table = counted(results)
    print(f"\n{'kind':36} {'tried':>6} {SAME:>11} {REFUSED:>14} {FAILED:>7}")
    for kind, row in [*table.items(), ("all", dict(sum(map(Counter, table.values()), Counter())))]:
        print(f"{kind:36} {row.get('tried', 0):6} {row.get(SAME, 0):11} {row.get(REFUSED, 0):14} {row.get(FAILED, 0):7}")
    for kind in kinds.ELSEWHERE:
        print(f"{kind:36} {'-':>6}")


def merged(before: dict[str, Any] | None, results: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The JSON of a run, or of its pieces so far. Raises SystemExit for pieces that do not belong together."""
    before = before or {"seed": seed, "faults": []}
    numbers = {fault["number"] for fault in before["faults"]}
    if before["seed"] != seed or numbers & {result["number"] for result in results}:
        raise SystemExit("these faults do not belong to the pieces that are there, or are among them")
    short = [{name: result[name] for name in ("number", "kind", "subject", "outcome")} for result in results]
    said = before.get("refusals", {})
    failed = before.get("failed", []) + [result for result in results if result["outcome"] == FAILED]
    for result in results:
        if result["outcome"] == REFUSED:
            messages = said.setdefault(result["kind"], [])
            message = re.sub(r"[0-9a-f]{12}|\d+", "#", re.sub(r"/\S*/", "", result["said"]))
            if message not in messages:
                messages.append(message)
    faults = sorted(before["faults"] + short, key=lambda fault: fault["number"])
    return {
        "seed": seed,
        "tried": len(faults),
        "outcomes": dict(Counter(fault["outcome"] for fault in faults)),
        "kinds": counted(faults),
        "subjects": dict(Counter(fault["subject"] for fault in faults)),
        "came too late": before.get("came too late", 0) + sum(result["said"] == TOO_LATE for result in results),
        "small disks": "tmpfs" if disks.may_mount() else "RLIMIT_FSIZE and chmod",
        "refusals": said,
        "failed": failed,
        "faults": faults,
    }
