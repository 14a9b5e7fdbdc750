"""A comparison. Oracles: the evaluation of each model alone, windows one by one, and the definition of a Pareto front."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtipcli.data.windows import Windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import blockwise, compare, evaluate, inspect, measure
from qtipcli.stages.load import load_model
from qtipcli.stages.progress import Silent
from stages.tiny import save_model

CONTEXT, WINDOWS = 32, 6
WINDOW_GIB = (CONTEXT - 1) * 3072 * 4 / 2**30
"""One window's logits of the tiny model in float32."""


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def compared(models, base, text, **more):
    return compare.run([str(each) for each in models], str(base), str(text), CONTEXT, WINDOWS, **more)


@pytest.fixture(scope="module")
def report(three, tiny_model, text):
    return compared(reversed(three), tiny_model, text)


@pytest.mark.parametrize("kept", [0, 2.5, WINDOWS])
def test_every_row_is_the_evaluation_of_that_model_alone_bit_for_bit(three, tiny_model, text, kept):
    watcher = Notes()
    report = compared(three, tiny_model, text, cache_gib=kept * WINDOW_GIB, watcher=watcher)
    for row, directory in zip(report["rows"], three, strict=True):
        alone = measure.run(str(directory), str(tiny_model), str(text), CONTEXT, WINDOWS).as_json()
        protocol = alone.pop("protocol")
        assert protocol == report["protocol"]
        assert alone.pop("base_perplexity") == report["base"]["perplexity"]
        assert alone.pop("kl_noise_floor") is None
        assert {name: row[name] for name in alone} == alone
    itself = measure.run(str(tiny_model), None, str(text), CONTEXT, WINDOWS)
    assert report["base"]["perplexity_stderr"] == itself.perplexity_stderr
    assert [f"{int(kept)} of {WINDOWS} windows are kept" in said for said in watcher.said] == [True] * (kept < WINDOWS)


def test_block_by_block_the_rows_are_the_same(three, tiny_model, text, report):
    """Bit for bit with one thread: the same operations on the same tensors, one block after the other."""
    streamed = compared(three, tiny_model, text, stream=True)
    assert streamed["rows"] == report["rows"]
    assert streamed["protocol"] == report["protocol"] | {"placement": "block by block"}


def test_rows_say_what_is_stored_and_stand_in_its_order(report, three, tiny_model):
    assert [row["model"] for row in report["rows"]] == [str(each) for each in three]
    assert [row["label"] for row in report["rows"]] == ["out", "3bit", "4bit"]
    for row, directory in zip(report["rows"], three, strict=True):
        assert row["bits_per_weight"] == inspect.run(directory)["bits_per_weight"]
        tensors = load_file(directory / "model.safetensors").values()
        assert row["size_MB"] == sum(tensor.nbytes for tensor in tensors) / 1e6
        assert row["dtype"] == "float32"
    assert report["base"]["model"] == str(tiny_model)
    assert report["base"]["bits_per_weight"] == 32
    assert report["base"]["size_MB"] == sum(each.nbytes for each in load_file(tiny_model / "model.safetensors").values()) / 1e6
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def kl_by_window(directory, tiny_model, text):
    """Mean KL of each window, from evaluations of one window each."""
    tokenizer = measure.load_tokenizer(str(tiny_model), False)
    model, base = load_model(directory), load_model(tiny_model)
    windows = measure.windows_for(base.config, tokenizer, compare.load_documents(str(text)), CONTEXT, WINDOWS)
    each = (Windows(row[None], "test", 1, None, "none", "0" * 64) for row in windows.tokens)
    return np.array([evaluate.run(model, base, one).kl_mean for one in each])


def test_differences_are_paired_by_window(report, three, tiny_model, text):
    kl = {str(each): kl_by_window(each, tiny_model, text) for each in three}
    two, *others = report["rows"]
    assert two["compared_to"] is two["kl_difference"] is two["kl_difference_stderr"] is None
    for row, before in zip(others, three, strict=False):
        difference = kl[row["model"]] - kl[str(before)]
        assert row["compared_to"] == str(before)
        # float64 means of means of equal length: rounding leaves twelve digits of the KL itself
        close = {"rel": 1e-12, "abs": 1e-12 * row["kl_mean"]}
        assert row["kl_difference"] == pytest.approx(difference.mean(), **close)
        assert row["kl_difference_stderr"] == pytest.approx(difference.std(ddof=1) / math.sqrt(WINDOWS), **close)


def test_against_compares_all_others_to_one(three, tiny_model, text, report):
    # Given by another name of the same directory.
    asked = compared(three, tiny_model, text, against=os.path.relpath(three[1]))
    assert [row["compared_to"] for row in asked["rows"]] == [str(three[1]), None, str(three[1])]
    assert asked["rows"][2]["kl_difference"] == report["rows"][2]["kl_difference"]
    assert asked["rows"][0]["kl_difference"] == -report["rows"][1]["kl_difference"]
    assert asked["rows"][0]["kl_difference_stderr"] == report["rows"][1]["kl_difference_stderr"]


@pytest.mark.parametrize("kept", [0, WINDOWS])
def test_at_most_one_evaluated_model_is_in_memory_and_the_original_runs_once_a_window(
    three, tiny_model, text, kept, monkeypatch
):
    models, alive, forwards = [], [], []

    def loaded(name, *how):
        alive.append(sum(each() is not None for each in models))
        model = load_model(name, *how)
        if Path(name) == tiny_model:
            model.register_forward_hook(lambda *_: forwards.append(1))
        object.__setattr__(model, "itself", model)  # a cycle: it does not go with its last name
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(blockwise, "load_model", loaded)
    compared(three, tiny_model, text, cache_gib=kept * WINDOW_GIB)
    # Before each of the four loads: nothing, then the original unless its logits are kept.
    assert alive == ([0, 0, 0, 0] if kept else [0, 1, 1, 1])
    # Without a cache: for each model, and once to learn the size of a window's logits.
    assert len(forwards) == (WINDOWS if kept else 3 * WINDOWS + 1)


def brute_front(points):
    """No other is as good in both and better in one: the definition, pair by pair."""
    return [not any(a <= cost and b <= loss and (a < cost or b < loss) for a, b in points) for cost, loss in points]


def test_the_front_is_its_definition():
    random_ = random.Random(0)
    for _ in range(3000):
        # Few different values, so that ties of every kind occur.
        points = [(random_.randint(1, 5), random_.randint(1, 5)) for _ in range(random_.randint(0, 8))]
        assert compare.pareto_front(points) == brute_front(points)


def test_the_front_of_a_report_is_that_of_its_rows(report):
    points = [(row["bits_per_weight"], row["kl_mean"]) for row in report["rows"]]
    assert [row["pareto"] for row in report["rows"]] == brute_front(points)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "y"]),
        (["org/m-2bit", "other/m-2bit", "org/m-3bit"], ["org/m-2bit", "other/m-2bit", "m-3bit"]),
        (["x", "a/x"], ["x", "a/x"]),
    ],
)
def test_a_label_is_the_shortest_ending_that_no_other_has(names, expected):
    assert compare.labels(names) == expected


def test_labels_of_directories_are_names_whatever_was_typed(tmp_path, monkeypatch):
    for folder in ("one/model", "two/model"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one" / "model")
    assert compare.labels([".", "../../two/model"]) == ["one/model", "two/model"]
    assert compare.labels(["..", "../../two/model"]) == ["one", "model"]


def test_a_plain_model_and_one_of_another_format(tmp_path, three, tiny_model, text):
    half = save_model("llama", tmp_path / "half")
    load_model(half, torch.bfloat16).save_pretrained(half)
    assert compare.stored_of(str(half)).bits_per_weight == 16
    report = compared([half, *three[:1]], tiny_model, text)
    assert [row["label"] for row in report["rows"]] == ["out", "half"]
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "another"}}))
    other = compare.stored_of(str(half))
    assert other.bits_per_weight is None and other.megabytes > 0


def test_models_that_pack_other_layers_are_noted(tmp_path, quantize, three, tiny_model, packed, text):
    fewer = tmp_path / "fewer"
    assert quantize("--out", fewer, "--hessians", packed / "hessians", "--skip", "*.v_proj").status == 0
    watcher = Notes()
    compared([three[0], three[1], fewer], tiny_model, text, watcher=watcher)
    assert [f"{fewer} packs 12 layers and {three[0]} 14" in said for said in watcher.said] == [True]


# What is refused


def test_other_vocabularies_and_tokenizers_are_refused_by_name(tmp_path, three, tiny_model, text, monkeypatch):
    monkeypatch.setattr(blockwise, "load_model", None)  # nothing is loaded before
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 4000}))
    with pytest.raises(QtipError, match=r"other has a vocabulary of 4,000 tokens, the original .* one of 3,072"):
        compared([three[0], other], tiny_model, text)
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    upper = tmp_path / "upper.txt"
    upper.write_text(text.read_text().upper())
    with pytest.raises(QtipError, match=r"the tokenizer of .*other reads the text as other tokens"):
        compared([three[0], other], tiny_model, upper)


def test_what_is_no_comparison_is_refused(three, tiny_model, text):
    two, three_bits, _ = three
    for models, base, more, fact in (
        ([two], tiny_model, {}, "one model cannot be compared"),
        ([two, two], tiny_model, {}, "is given twice"),
        ([two, two / "../out"], tiny_model, {}, "are the same model"),
        ([two, tiny_model], tiny_model, {}, "is the original itself"),
        ([two, three_bits], tiny_model, {"against": "4bit"}, "4bit is none of the models compared"),
        ([two, three_bits], tiny_model, {"cache_gib": math.nan}, "a cache of nan GiB"),
        ([two, three_bits], tiny_model, {"dtype": "float8"}, "no dtype 'float8'"),
    ):
        with pytest.raises(SettingsError, match=fact):
            compared(models, base, text, **more)
    with pytest.raises(SettingsError, match="needs the original model"):
        compare.run([str(two), str(three_bits)], None)
