"""Zero-shot tasks. Oracle: a stub in the place of lm-eval that writes down how it is called; its figures are those shown.

The real lm-eval is no dependency of the tests; the stub has the signatures of its version 0.4.13.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import zero_shot
from qtipcli.stages.progress import Silent
from stages.fixtures import Qtip

SCORES = {"packed": 0.25, "original": 0.75}


class TaskManager:
    all_tasks = ("arc_easy", "piqa", "hellaswag")


@pytest.fixture
def harness(monkeypatch):
    """Puts the stub in place; returns the calls of simple_evaluate."""
    calls = []

    class HFLM:
        def __init__(self, pretrained, tokenizer=None, batch_size=1):
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def simple_evaluate(model, *, tasks, num_fewshot, log_samples):
        calls.append((model, tasks, num_fewshot))
        value = SCORES["packed" if hasattr(model.model.config, "quantization_config") else "original"]
        figures = {"alias": "x", "acc,none": value, "acc_stderr,none": 0.125, "f1,strict": 1.0, "f1_stderr,strict": "N/A"}
        return {
            "results": dict.fromkeys(tasks, figures),
            "versions": dict.fromkeys(tasks, 1.0),
            "n-samples": {task: {"original": 9, "effective": 8} for task in tasks},
        }

    names = ("lm_eval", "lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval"].evaluator, modules["lm_eval"].tasks = modules["lm_eval.evaluator"], modules["lm_eval.tasks"]
    modules["lm_eval.evaluator"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = TaskManager
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_both_models_are_scored_by_the_harness_without_examples(harness, packed, tiny_model):
    scores = zero_shot.run(str(packed / "out"), str(tiny_model), ["arc_easy", "piqa"], None, False, Silent())
    assert [(tasks, fewshot) for _, tasks, fewshot in harness] == [(["arc_easy", "piqa"], 0)] * 2
    for model, *_ in harness:
        assert type(model.model).__name__ == "LlamaForCausalLM" and not model.model.training
        assert model.tokenizer.encode("def") and model.batch_size == zero_shot.BATCH
    assert [(score.task, score.metric, score.filter) for score in scores] == [
        (task, metric, kind) for task in ("arc_easy", "piqa") for metric, kind in (("acc", "none"), ("f1", "strict"))
    ]
    first, second = scores[:2]
    assert (first.value, first.stderr, first.base_value, first.base_stderr) == (0.25, 0.125, 0.75, 0.125)
    assert (second.value, second.stderr) == (1.0, None)
    assert (first.examples, first.version, first.fewshot) == (8, "1.0", 0)


def test_as_it_is_typed(harness, qtip: Qtip, own_packed, tiny_model, text):
    said = ("eval", own_packed, "--base", tiny_model, "--data", text, "--context", "16", "--windows", "2")
    report = json.loads(qtip(*said, "--tasks", "arc_easy,piqa", "--json").out)
    assert [score["task"] for score in report["tasks"]] == ["arc_easy", "arc_easy", "piqa", "piqa"]
    outcome = qtip(*said, "--tasks", "arc_easy", "--tasks", "piqa")
    assert outcome.status == 0, outcome.err
    assert "0.25 ± 0.12" in outcome.out and "0.75 ± 0.12" in outcome.out
    assert "tasks" not in json.loads(qtip(*said, "--json").out)


def test_an_unknown_task_is_refused_before_any_model_is_loaded(harness, qtip: Qtip, packed, text):
    outcome = qtip("eval", packed / "out", "--data", text, "--tasks", "arc_esy")
    assert outcome.status == 2 and "no task 'arc_esy'" in outcome.err and "did you mean arc_easy?" in outcome.err
    assert not harness
    zero_shot.check(["own/task.yaml"], None)  # a file of one's own


def test_what_the_harness_cannot_do_is_one_line(harness, monkeypatch, tiny_model):
    def fails(**how):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc'\non the Hub.")

    monkeypatch.setattr(sys.modules["lm_eval.evaluator"], "simple_evaluate", fails)
    with pytest.raises(QtipError, match=r"cannot evaluate arc_easy: Couldn't reach 'allenai/ai2_arc' on the Hub \(check"):
        zero_shot.run(str(tiny_model), None, ["arc_easy"], None, False, Silent())


def test_without_the_extra_the_remedy_is_named(monkeypatch, qtip: Qtip, packed, text):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import fails, whether it is installed or not
    outcome = qtip("eval", packed / "out", "--data", text, "--tasks", "arc_easy")
    assert outcome.status == 1
    assert "lm-eval, which is not installed" in outcome.err and "pip install 'qtipcli[eval]'" in outcome.err


def test_tasks_need_the_whole_model(harness):
    with pytest.raises(SettingsError, match="whole model in memory"):
        zero_shot.check(["arc_easy"], True)
