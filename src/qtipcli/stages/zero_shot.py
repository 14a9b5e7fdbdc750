"""Owns zero-shot tasks: scores of lm-eval, the field's harness, for a model and its original. Only this file imports it.

It is an extra, `pip install qtipcli[eval]`: it brings some thirty packages that nothing else here needs.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages.load import load_model, load_tokenizer
from qtipcli.stages.progress import Watcher

BATCH = 8
"""Requests of one pass. Padding is masked, so that it changes a score by no more than rounding."""

REMEDY = "pip install 'qtipcli[eval]'"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task, metric: as lm-eval calls them; filter: of answers, "none" for most.
        value, stderr: of the evaluated model; stderr is None where lm-eval gives none.
        base_value, base_stderr: of the original, None without one.
        examples: answered; version: of the task; fewshot: examples in front of each question.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int | None
    version: str
    base_value: float | None = None
    base_stderr: float | None = None
    fewshot: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check(tasks: Sequence[str], stream: bool | None) -> None:
    """Raise SettingsError or QtipError for what can be known before a model is loaded.

    stream: True where models are to be evaluated block by block, which the harness cannot.
    """
    if stream:
        raise SettingsError("zero-shot tasks need the whole model in memory", "leave --stream or --tasks out")
    _, tasks_module, _ = _harness()
    names = tasks_module.TaskManager().all_tasks
    for task in tasks:
        if task not in names and not task.endswith((".yaml", ".yml")):
            near = difflib.get_close_matches(task, names, n=1)
            raise SettingsError(
                f"lm-eval has no task {task!r}", f"did you mean {near[0]}?" if near else "see `lm-eval ls tasks`"
            )


def run(
    name: str,
    base: str | None,
    tasks: Sequence[str],
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    watcher: Watcher,
) -> list[TaskScore]:
    """Every metric of `tasks` (names of lm-eval, or YAML files of one's own) without examples in front, in the tasks' order.

    One model is in memory at a time. Raises QtipError where lm-eval is not installed, or fails: it downloads its data sets.
    """
    models = [name] if base is None else [name, base]
    watcher.begin("zero-shot tasks", len(models))
    reports = []
    for each in models:
        gc.collect()
        reports.append(_report(each, tasks, dtype, trust_remote_code))
        watcher.advance(each)
    own, original = reports[0], reports[1]["results"] if base is not None else {}
    scores = []
    for task, figures in own["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error_key, beside = f"{metric}_stderr,{kind}", original.get(task, {})
            scores.append(
                TaskScore(
                    task, metric, kind, float(value), _number(figures.get(error_key)),
                    own.get("n-samples", {}).get(task, {}).get("effective"), str(own.get("versions", {}).get(task, "")),
                    _number(beside.get(key)), _number(beside.get(error_key)),
                )
            )  # fmt: skip
    return scores


def _report(name: str, tasks: Sequence[str], dtype: torch.dtype | None, trust_remote_code: bool) -> dict[str, Any]:
    evaluator, _, model_class = _harness()
    model = load_model(name, dtype, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    try:
        wrapped = model_class(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        return evaluator.simple_evaluate(model=wrapped, tasks=list(tasks), num_fewshot=0, log_samples=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        fact = " ".join(str(error).split())[:300].rstrip(".")
        raise QtipError(
            f"lm-eval cannot evaluate {', '.join(tasks)}: {fact or type(error).__name__}",
            "check the network, from which it takes its data sets, and that `lm-eval run` can do the task",
        ) from error


def _harness() -> tuple[Any, Any, Any]:
    """lm-eval's evaluator, its tasks, and its class of transformers models."""
    try:
        from lm_eval import evaluator
        from lm_eval import tasks as tasks_module
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise QtipError("zero-shot tasks need lm-eval, which is not installed", REMEDY) from error
    return evaluator, tasks_module, HFLM


def _number(value: Any) -> float | None:
    """lm-eval says "N/A" where it has no standard error."""
    return float(value) if isinstance(value, int | float) else None
