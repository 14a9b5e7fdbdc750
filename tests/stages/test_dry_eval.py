"""The dry run of `qtip eval`: its oracle is what the same command then reports and keeps."""

import json

import pytest
import torch
from safetensors import safe_open

from qtipcli.data.windows import Windows
from qtipcli.model.source import ModelSource
from qtipcli.stages import dry_eval, evaluate, forward_rates
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.own_process import growth_bytes
from stages.short_measure import shorten, stand_in_for_hub
from stages.tiny import VOCABULARY, snapshot

CPU = torch.device("cpu")
SAY = ("--context", 32, "--windows", 5)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)
    monkeypatch.setattr(dry_eval, "FORWARD_SECONDS", 0.0)
    # What is said is then what the evaluation adds to the process, which no two runs agree on to the byte.
    monkeypatch.setattr(dry_eval, "settled_bytes", lambda: 0)


def test_text_and_passes_are_those_of_the_run(qtip, own_packed, tiny_model, text):
    """Oracle: the protocol that the same command prints."""
    say = ("eval", own_packed, "--base", tiny_model, "--data", text, "--context", "32,16", "--windows", 5, "--stream")
    before = snapshot(own_packed)
    found = json.loads(qtip(*say, "--dry-run", "--json").out)
    assert snapshot(own_packed) == before
    rows = json.loads(qtip(*say, "--json").out)["rows"]
    for said, row in zip(found["tables"]["text"], rows, strict=True):
        protocol = row["protocol"]
        assert (said["windows"], said["context"]) == (protocol["windows"], protocol["context"])
        assert said["predictions"] == row["tokens"]
    own, original = found["tables"]["models"]
    assert (own["computes in"], own["how"]) == (protocol["dtype"], protocol["placement"])
    assert original["computes in"] == protocol["base_dtype"]
    assert own["windows"] == sum(row["protocol"]["windows"] for row in rows)


def test_text_that_is_short_is_said_as_it_is(qtip, tiny_model, tmp_path):
    """Oracle: the run, which takes the windows that are there."""
    (tmp_path / "short.txt").write_text("word " * 400)
    say = ("eval", tiny_model, "--data", "short.txt", "--context", 32, "--windows", 1000, "--json")
    windows = json.loads(qtip(*say, "--dry-run").out)["tables"]["text"][0]["windows"]
    assert windows == json.loads(qtip(*say).out)["rows"][0]["protocol"]["windows"] < 1000


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_no_weight_is_read(qtip, own_packed, tiny_model, text, monkeypatch, stream):
    """Oracle: checkpoints whose every read fails, and a loader that does."""

    def refuse(*arguments, **options):
        raise AssertionError(f"{arguments} was read")

    monkeypatch.setattr(ModelSource, "read", refuse)
    monkeypatch.setattr("qtipcli.stages.blockwise.load_model", refuse)
    done = qtip("eval", own_packed, "--base", tiny_model, "--data", text, *SAY, stream, "--dry-run")
    assert done.status == 0, done.err
    assert "peak RAM" in done.out
    assert "nothing was written" in done.out


def test_the_disk_is_what_kept_logits_take(qtip, own_packed, tiny_model, text, tmp_path):
    """Oracle: the tensors in the directory that the run fills."""
    say = ("eval", own_packed, "--base", tiny_model, "--data", text, *SAY, "--cache", "kept", "--json")
    found = json.loads(qtip(*say, "--dry-run").out)
    assert not (tmp_path / "kept").exists()
    assert qtip(*say).status == 0
    size = 0
    for file in (tmp_path / "kept").glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            size += reader.get_tensor("logits").nbytes
    assert found["disk"] == {"original's logits": size}
    assert size == 5 * 31 * VOCABULARY * 4


def test_memory_is_that_of_a_comparison(qtip, tiny_model, text, own_packed):
    """Oracle: by hand. Whole models are together, kept logits take the original's place, a comparison has one at a time."""
    say = ("eval", "--base", tiny_model, "--data", text, *SAY, "--dry-run", "--json")

    def peak(*more):
        return json.loads(qtip(*say, *more).out)["ram"]

    def weights(model):
        return forward_bytes[str(model)]

    rows = json.loads(qtip(*say, own_packed).out)["tables"]["models"]
    forward_bytes = {row["model"]: round(row["weights_MB"] * 1e6) for row in rows}
    together = peak(own_packed)
    assert together["loading"] >= weights(own_packed) + weights(tiny_model)
    kept = peak(own_packed, "--cache-gib", 1)
    assert kept["loading"] == weights(tiny_model)
    assert together["loading"] - kept["loading"] >= weights(own_packed)
    streamed = peak(own_packed, "--stream")
    assert "loading" not in streamed
    assert streamed["blocks, one at a time"] < together["loading"]


def test_what_a_comparison_takes_is_what_it_takes_in_full():
    """Oracle: a whole window, too large for the heap, whose logits are counted. A twentieth: the last part is shorter."""
    seconds, most = forward_rates.comparison(300, 50_000, 2, CPU)
    rows = Windows(torch.zeros(1, 300, dtype=torch.int64), "", 1, None, "", "")
    own, original = (forward_rates.RandomLogits(299, 50_000, CPU) for _ in range(2))
    with LiveBytes() as live:
        evaluate.predict(own, rows, original)
    assert most == pytest.approx(live.peak, rel=0.05)
    assert seconds > 0


def test_logits_in_the_heap_take_more_than_their_own_size():
    """Oracle: their size; what the C library leaves unused comes on top, and is not many times more."""
    size = 2 * 256 * 20_000 * 4
    assert size < forward_rates.comparison(256, 20_000, 2, CPU)[1] < 6 * size


def test_growth_is_what_a_call_adds_for_a_while():
    """Oracle: a tensor of 64 MB that is gone when the call ends; pages are touched."""
    assert growth_bytes(lambda: torch.ones(16_000_000)) == pytest.approx(64e6, rel=0.1)


def test_a_hub_model_is_described_by_its_headers(qtip, tiny_model, text, monkeypatch):
    """Oracle: the same model in a local directory. The Hub is stood in for by that directory."""
    say = ("--data", text, *SAY, "--dry-run", "--json")
    local = json.loads(qtip("eval", tiny_model, "--base", tiny_model, *say).out)
    where = stand_in_for_hub(monkeypatch, tiny_model)
    done = qtip("eval", "org/model", "--base", "org/model", *say)
    assert done.status == 0, done.err
    hub = json.loads(done.out)
    # These two are measured, and no two measurements are equal.
    measured = {"reading the text": 0, "comparing": 0}
    assert hub["ram"] | measured == local["ram"] | measured
    assert [row | {"model": ""} for row in hub["tables"]["models"]] == [
        row | {"model": ""} for row in local["tables"]["models"]
    ]
    assert where
    assert not any(path.exists() for path in where)


def test_a_hub_text_is_not_read(qtip, tiny_model, own_packed):
    done = qtip("eval", tiny_model, "--context", 32, "--dry-run")
    assert done.status == 0, done.err
    assert "wikitext2 is not read" in done.out
    refused = qtip("eval", tiny_model, "--data", "org/text", "--context", 32, "--dry-run")
    assert refused.status == 2
    assert "say --windows" in refused.err


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (("--noise-floor",), "needs the original model"),
        (("--cache-gib", 1), "cannot be kept without the original model"),
        (("--compare",), "one model cannot be compared"),
        (("--dtype", "float8"), "no dtype 'float8'"),
        (("--context", 4096), "longer than the 64 positions"),
    ],
)
def test_what_the_run_refuses_is_refused(qtip, tiny_model, text, more, fact):
    done = qtip("eval", tiny_model, "--data", text, *more, "--dry-run")
    assert done.status != 0
    assert fact in done.err
    assert "Traceback" not in done.err


def test_models_of_a_comparison_are_counted_one_by_one(qtip, three, tiny_model, text):
    """Each row is a pass of its own, and the original's logits are kept once."""
    found = json.loads(qtip("eval", "--compare", *three, "--base", tiny_model, "--data", text, *SAY, "--dry-run", "--json").out)
    assert [row["is"] for row in found["tables"]["models"]] == ["evaluated"] * 3 + ["original"]
    assert found["disk"] == {"original's logits, while it runs": 5 * 31 * VOCABULARY * 4}
