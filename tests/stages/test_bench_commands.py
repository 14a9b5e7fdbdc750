"""`qtip bench` as it is typed: tables, JSON, pictures, and what exits with which status."""

import json

import pytest

from qtipcli.stages import limits
from qtipcli_kernels import dispatch
from stages.tiny import ROOT

MATVEC = ("bench", "matvec", "--device", "cpu", "--codes", "1mad", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 1 << 16})


def test_matvec_prints_a_table_and_draws(qtip, tmp_path):
    outcome = qtip(*MATVEC, "--shape", "64x96,37x100", "--batches", "1,2", "--plot", "roof.png")
    assert outcome.status == 0, outcome.err
    for word in ("64x96", "37x100", "GB per s", "bandwidth share", "numba", "timing: wall clock", "bandwidth: "):
        assert word in outcome.out
    assert (tmp_path / "roof.png").stat().st_size > 5000


def test_matvec_measures_the_layers_of_a_model(qtip):
    outcome = qtip(*MATVEC, "--model", "SmolLM2-135M", "--json")
    assert outcome.status == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert [(row["layer"], row["shape"]) for row in rows] == [
        ("q_proj, o_proj", "576x576"),
        ("k_proj, v_proj", "192x576"),
        ("gate_proj, up_proj", "1536x576"),
        ("down_proj", "576x1536"),
        ("q+k+v", "960x576"),
        ("gate+up", "3072x576"),
    ]


def test_a_wrong_product_is_shown_without_speed_and_fails(qtip, monkeypatch):
    right = dispatch.matvec
    monkeypatch.setattr(dispatch, "matvec", lambda *arguments: right(*arguments) * float("nan"))
    outcome = qtip(*MATVEC, "--shape", "64x96", "--json")
    assert outcome.status == 1
    (row,) = json.loads(outcome.out)["rows"]
    assert row["microseconds"] is None
    assert row["error"] is None
    assert "no speed is given" in outcome.err


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        (("--model", "gpt-5"), "known are llama-2-7b"),
        (("--model", "qwen3-8b", "--shape", "64x64"), "--shape and --model"),
        (("--plot", "roof.jpg"), "roof.jpg is no PNG"),
        (("--batches", "1.5"), "'1.5' is not a list of whole numbers"),
        (("--shape", "64"), "'64' is not a shape"),
        (("--dtype", "int8"), "'int8'"),
    ],
)
def test_bad_usage_of_matvec_is_refused(qtip, asked, fact):
    outcome = qtip(*MATVEC, *asked)
    assert outcome.status == 2
    assert fact in outcome.err
    assert not outcome.out


def test_model_takes_a_config_and_prints_one_json_object(qtip):
    config = ROOT / "tests" / "gpu_report" / "tiny_config.json"
    asked = ("bench", "model", "--random", config, "--code", "3inst", "--state-bits", "8", "--device", "cpu")
    outcome = qtip(*asked, "--prompts", "8", "--tokens", "2", "--seconds", "0.01", "--json")
    assert outcome.status == 0, outcome.err
    assert [row["measure"] for row in json.loads(outcome.out)["rows"]] == ["prefill of 8", "decode", "weights", "peak memory"]


def test_model_of_an_unknown_name_lists_those_that_are_known(qtip):
    outcome = qtip("bench", "model", "--random", "gpt-5")
    assert outcome.status == 2
    assert "known are llama-2-7b" in outcome.err
