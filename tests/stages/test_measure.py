"""`qtip eval` of one model. Oracles: a plain loop over transformers' own loss, and the evaluation of models in memory."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtipcli.cli.main import _run
from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import blockwise, evaluate, measure, reference_store, room
from qtipcli.stages.load import load_model
from qtipcli.stages.measure import Keeping
from qtipcli.stages.progress import Silent
from stages.fixtures import Qtip
from stages.tiny import FAST_OPTIONS, save_model

CONTEXT, WINDOWS = 32, 6
WINDOW_BYTES = (CONTEXT - 1) * 3072 * 4
"""One window's logits of the tiny model in float32."""


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def measured(directory, base, text, contexts=(CONTEXT,), **more):
    asked = {"windows": WINDOWS} | more
    return measure.run_all(str(directory), None if base is None else str(base), str(text), contexts, **asked)


@pytest.fixture(scope="module")
def plain(packed, tiny_model, text):
    """The packed model beside its original, both whole in memory."""
    return measured(packed / "out", tiny_model, text).results[0]


@pytest.mark.parametrize("what", ["packed", "original"])
def test_the_perplexity_is_that_of_a_plain_transformers_loop(packed, tiny_model, text, what):
    """Oracle: transformers' loss, a float32 mean a window; their mean has as many digits as float32 sums, hence 1e-5."""
    directory = packed / "out" if what == "packed" else tiny_model
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(directory)(text.read_text(), return_tensors="pt")["input_ids"]
    losses = []
    for start in range(0, tokens.shape[1] - CONTEXT + 1, CONTEXT):
        row = tokens[:, start : start + CONTEXT]
        with torch.no_grad():
            losses.append(model(input_ids=row, labels=row).loss.item())
    result = measured(directory, None, text, windows=None).results[0]
    assert result.protocol.windows == len(losses) > 50
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_each_context_is_a_row_of_its_own(packed, tiny_model, text, plain):
    found = measured(packed / "out", tiny_model, text, (CONTEXT, 16))
    assert [result.protocol.context for result in found.results] == [CONTEXT, 16]
    assert found.results[0] == plain
    assert found.results[1] == measured(packed / "out", tiny_model, text, (16,)).results[0]
    report = found.as_json()
    assert report["rows"] == [result.as_json() for result in found.results]
    assert report | report["rows"][0] == report  # the first context's figures are the report's own
    assert (report["model"], report["base"]) == (str(packed / "out"), str(tiny_model))


def test_a_context_that_is_too_long_is_refused_before_any_model_is_loaded(packed, tiny_model, text, monkeypatch):
    monkeypatch.setattr(blockwise, "load_model", None)
    with pytest.raises(SettingsError, match="128 tokens are longer than the 64 positions"):
        measured(packed / "out", tiny_model, text, (32, 128), windows=2)


def test_c4_has_a_default_of_its_own(packed, monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "load_documents", lambda data, *how: data)
    monkeypatch.setattr(measure, "windows_for", lambda *how: asked.append(how[2:]) or pytest.skip("seen"))
    for data, windows, expected in (("c4", None, 256), ("c4", 3, 3), ("x.txt", None, None), (None, None, None)):
        with pytest.raises(pytest.skip.Exception):
            measure.run_all(str(packed / "out"), None, data, windows=windows)
        assert asked[-1][2] == expected
    assert asked[-1][0] == "wikitext2"


def test_the_noise_floor_is_what_the_original_scores_in_the_evaluated_dtype(tiny_model, packed, text):
    found = measured(packed / "out", tiny_model, text, dtype="bfloat16", noise_floor=True).results[0]
    rows = measure._all_windows(str(tiny_model), str(text), (CONTEXT,), WINDOWS, False, Silent())[0]
    wide, narrow = load_model(tiny_model, torch.float32), load_model(tiny_model, torch.bfloat16)
    assert found.kl_noise_floor == evaluate.run(narrow, wide, rows).kl_mean > 0
    protocol = found.protocol
    assert (protocol.dtype, protocol.base_dtype, protocol.noise_dtype) == ("bfloat16", "float32", "bfloat16")


# Block by block


@pytest.fixture(scope="module")
def variants(tmp_path_factory, text):
    """Kind -> (packed directory, its original): a tied packed embedding, and biases with a packed head of its own."""
    where, found = tmp_path_factory.mktemp("variants"), {}
    for kind, said in (("llama", ("--embedding-bits", "4")), ("qwen2", ("--head-bits", "4"))):
        model, out = save_model(kind, where / f"{kind}-model"), where / kind
        command = ["quantize", model, *FAST_OPTIONS, "--data", text, "--out", out, "--hessians", where / f"{kind}.h", *said]
        assert _run([str(part) for part in command]) == 0
        found[kind] = (out, model)
    return found


@pytest.mark.parametrize("kind", ["plain", "llama", "qwen2"])
@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_block_by_block_the_figures_are_those_of_models_in_memory(
    kind, memory_gib, variants, packed, tiny_model, text, monkeypatch
):
    """The same operations on the same tensors in the same order: with one thread not a bit differs, and with several only the
    order of a sum may. The last assertion allows for that, 1e-6 of float32's 6e-8 through a dozen layers, and nothing more."""
    directory, base = variants[kind] if kind in variants else (packed / "out", tiny_model)
    monkeypatch.setattr(blockwise.StreamedLogits.__init__, "__defaults__", ("stream", memory_gib))  # 0: through a file
    whole = measured(directory, base, text).results[0]
    streamed = measured(directory, base, text, stream=True).results[0]
    assert streamed.protocol == replace(whole.protocol, placement="block by block")
    for name in ("perplexity", "base_perplexity", "kl_mean", "kl_p99", "kl_max", "kl_median", "top1_agreement"):
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-6), name
    assert whole.kl_mean > 1e-3


def test_block_by_block_no_more_than_one_block_is_real(packed, text, monkeypatch):
    """Oracle: every parameter of the skeleton, asked whether it is on meta, each time a block is loaded."""
    real = []
    materialize = blockwise.Skeleton.materialize

    def counted(self, index):
        block = materialize(self, index)
        real.append([number for number, (_, each) in enumerate(self.blocks) if not next(each.parameters()).is_meta])
        return block

    monkeypatch.setattr(blockwise.Skeleton, "materialize", counted)
    monkeypatch.setattr(blockwise, "load_model", None)
    measured(packed / "out", None, text, stream=True)
    assert {tuple(each) for each in real} == {(0,), (1,)}


def test_models_that_do_not_fit_are_streamed_and_it_is_said(packed, tiny_model, text, plain, monkeypatch):
    together = sum(blockwise.weight_bytes(str(name), None, False, torch.device("cpu")) for name in (packed / "out", tiny_model))
    for free, streams in ((together / blockwise.WEIGHTS_SHARE + 8, False), (together / blockwise.WEIGHTS_SHARE - 8, True)):
        monkeypatch.setattr(blockwise, "free_bytes", lambda device, free=free: free)
        watcher = Notes()
        found = measured(packed / "out", tiny_model, text, watcher=watcher).results[0]
        assert (found.protocol.placement == "block by block") is streams
        assert [f"{packed / 'out'} and {tiny_model} would take" in said for said in watcher.said] == [True] * streams
        assert found.kl_mean == plain.kl_mean
    monkeypatch.setattr(blockwise, "free_bytes", lambda device: 0)
    assert measured(packed / "out", tiny_model, text, stream=False).results[0] == plain


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_a_model_takes_is_known_from_its_headers(packed, tiny_model, dtype):
    """Oracle: the parameters of the model in memory, tied ones once."""
    for name in (packed / "out", tiny_model):
        parameters = load_model(name, dtype).state_dict(keep_vars=True).values()
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parameters if each.numel()}
        assert blockwise.weight_bytes(str(name), dtype, False, torch.device("cpu")) == sum(held.values())


def test_a_control_group_bounds_the_free_memory(tmp_path):
    for name, content in (("memory.max", "1000"), ("memory.current", "700"), ("memory.stat", "anon 5\ninactive_file 100\n")):
        (tmp_path / name).write_text(content)
    assert room.group_free(tmp_path) == [400]
    (tmp_path / "memory.max").write_text("max")
    assert room.group_free(tmp_path) == room.group_free(tmp_path / "absent") == []


def test_another_methods_model_is_not_streamed(tiny_model, tmp_path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "another"}}))
    with pytest.raises(QtipError, match="already quantized"):
        blockwise.open_skeleton(str(other))
    assert blockwise.must_stream([(str(other), None)], False, None, Silent()) is False


# Kept logits of the original


@pytest.fixture
def loaded(monkeypatch):
    """The models loaded, in their order."""
    names: list[str] = []
    monkeypatch.setattr(blockwise, "load_model", lambda name, *how: names.append(Path(name).name) or load_model(name, *how))
    return names


@pytest.mark.parametrize("kept", [0, 2.5, 2 * WINDOWS])
def test_kept_for_the_run_nothing_changes_and_the_original_comes_first(packed, tiny_model, text, plain, loaded, kept):
    keeping = Keeping(gib=kept * WINDOW_BYTES / 2**30)
    found = measured(packed / "out", tiny_model, text, (CONTEXT, 16), keeping=keeping)
    assert found.results[0] == plain
    assert found.results[1] == measured(packed / "out", tiny_model, text, (16,)).results[0]
    assert loaded[:2] == ["tiny-llama", "out"]


def test_kept_in_a_directory_a_second_run_loads_no_original(packed, tiny_model, text, plain, loaded, tmp_path):
    keeping = Keeping(directory=tmp_path / "cache")
    assert measured(packed / "out", tiny_model, text, keeping=keeping).results[0] == plain
    assert loaded == ["tiny-llama", "out"]
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(files) == WINDOWS
    loaded.clear()
    assert measured(packed / "out", tiny_model, text, keeping=keeping).results[0] == plain
    assert loaded == ["out"]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == files
    # More windows take what is there and add what is not.
    loaded.clear()
    more = measured(packed / "out", tiny_model, text, windows=WINDOWS + 2, keeping=keeping).results[0]
    assert more == measured(packed / "out", tiny_model, text, windows=WINDOWS + 2).results[0]
    assert loaded[0] == "tiny-llama" and len(list((tmp_path / "cache").iterdir())) == WINDOWS + 2


def test_the_directory_stays_below_its_cap_and_another_original_finds_nothing(
    packed, tiny_model, text, plain, loaded, tmp_path
):
    watcher = Notes()
    keeping = Keeping(gib=3.5 * WINDOW_BYTES / 2**30, directory=tmp_path / "cache")
    assert measured(packed / "out", tiny_model, text, keeping=keeping, watcher=watcher).results[0] == plain
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert f"3 of {WINDOWS} windows" in watcher.said[0]
    key = reference_store.original_key(str(tiny_model), None, False)
    assert key == reference_store.original_key(str(tiny_model), None, False)
    assert key != reference_store.original_key(str(tiny_model), torch.bfloat16, False)
    assert key != reference_store.original_key(str(packed / "out"), None, False)


def test_originals_that_share_a_directory_are_kept_apart(packed, tiny_model, text, tmp_path):
    keeping = Keeping(directory=tmp_path / "cache")
    for base in (tiny_model, packed / "out"):
        found = measured(tiny_model, base, text, windows=2, keeping=keeping).results[0]
        assert found == measured(tiny_model, base, text, windows=2).results[0]
        assert (found.kl_mean == 0) is (base == tiny_model)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_what_cannot_be_asked_is_refused(packed, tiny_model, text):
    for more, fact in (
        ({"noise_floor": True}, "a noise floor needs the original"),
        ({"keeping": Keeping(gib=1.0)}, "cannot be kept without the original"),
        ({"dtype": "float8"}, "no dtype 'float8'"),
        ({"stream": True, "tasks": ["arc_easy"]}, "whole model in memory"),
    ):
        with pytest.raises(SettingsError, match=fact):
            measured(packed / "out", None, text, **more)
    with pytest.raises(SettingsError, match="a cache of nan GiB"):
        Keeping(gib=math.nan)


# As it is typed


def test_several_contexts_as_they_are_typed(qtip: Qtip, own_packed, tiny_model, text):
    said = ("eval", own_packed, "--base", tiny_model, "--data", text, "--windows", "4")
    report = json.loads(qtip(*said, "--context", "16,32", "--context", "64", "--json").out)
    assert [row["protocol"]["context"] for row in report["rows"]] == [16, 32, 64]
    outcome = qtip(*said, "--context", "16,32")
    assert outcome.status == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in lines] == ["16", "32"]
    assert f"{report['rows'][0]['kl_p999']:.4g}" in lines[0]
    assert sum("content_hash" in line for line in outcome.out.splitlines()) == 2
    for bad in ("16,x", "1", "-3", "2.5"):
        outcome = qtip(*said, f"--context={bad}")
        assert outcome.status == 2 and "--context" in outcome.err and "whole number" in outcome.err
