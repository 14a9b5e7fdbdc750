"""Broken directories, each tried in a process of its own: a correct load or one clear error, never a crash, a hang, more memory
or code that ran. What long runs found is kept in corpus/ and tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz import strategies, valid
from fuzz.targets import FINDING, LOADED, REFUSED
from fuzz.worker import Worker

EXAMPLES = {"packed": 40, "source": 30, "job": 30, "adapter": 10}
CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


def findings(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if answer["kind"] == FINDING]


@pytest.mark.parametrize("kind", valid.KINDS)
def test_a_broken_directory_loads_or_is_refused_by_one_clear_error(kind: str, worker: Worker, valid_directories: Path) -> None:
    cases = strategies.cases(kind, valid.content(valid_directories / kind))

    # No shrinking: each case is a process, and the corpus keeps what `python -m fuzz` has made small.
    @settings(
        max_examples=EXAMPLES[kind],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.integers(0, 15))
    def each(case: dict[str, Any], depth: int) -> None:
        assert not findings(worker.tried({**case, "depth": depth}))

    each()


@pytest.mark.parametrize("kind", valid.KINDS)
def test_a_valid_directory_loads_everywhere(kind: str, worker: Worker) -> None:
    for depth in (0, 1):
        answers = worker.tried({"kind": kind, "breaks": [], "depth": depth})
        assert answers
        assert {answer["kind"] for answer in answers} == {LOADED}, answers


@pytest.mark.parametrize("file", CORPUS, ids=[file.stem for file in CORPUS])
def test_what_was_found_before(file: Path, worker: Worker) -> None:
    case = json.loads(file.read_text(encoding="utf-8"))
    answers = worker.tried(case)
    assert not findings(answers)
    for entry, words in case.get("says", {}).items():
        answer = next(each for each in answers if each["entry"] == entry)
        assert answer["kind"] == REFUSED
        assert words in answer["what"], answer


def test_a_case_that_ends_its_process_is_a_finding_and_the_worker_goes_on(worker: Worker) -> None:
    """The harness itself: without limits that work, nothing above could fail."""
    for trap, words in (("crash", "ended with -11"), ("memory", "MemoryError"), ("hang", "no answer")):
        found = findings(worker.tried({"kind": "job", "breaks": [], "trap": trap}))
        assert [words in each["what"] for each in found] == [True], found
    assert not findings(worker.tried({"kind": "job", "breaks": []}))
