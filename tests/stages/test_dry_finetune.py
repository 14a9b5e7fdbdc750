"""The dry run of `qtip finetune`: its oracle is what the same command then trains, keeps and writes."""

import json
from typing import ClassVar

import pytest
import torch

from qtipcli.config import BlockTuning
from qtipcli.model.imagined import Imagined
from qtipcli.model.source import ModelSource
from qtipcli.stages import distill, tune_blocks, tuning_rates
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.packed import PackedDirectory
from qtipcli.tune.descent import Descent
from stages.short_measure import shorten, stand_in_for_hub
from stages.tiny import save_model, snapshot

TEXT = ("--samples", 16, "--heldout", 4, "--context", 32, "--batch", 4)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)
    monkeypatch.setattr("qtipcli.stages.dry_finetune.FORWARD_SECONDS", 0.0)
    monkeypatch.setattr("qtipcli.stages.dry_finetune.TUNING_SECONDS", 0.0)


@pytest.fixture
def tune(qtip, packed, tiny_model, text):
    def run(*more, directory=packed / "out", base=tiny_model):
        return qtip("finetune", directory, "--base", base, "--data", text, *TEXT, "--json", *more)

    return run


def rows_of(outcome, table="tuning"):
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)["tables"][table]


class Spy(Descent):
    """Writes down what is trained, and what is saved of it."""

    seen: ClassVar[list[Descent]] = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Spy.seen.append(self)


@pytest.fixture
def spied(monkeypatch):
    monkeypatch.setattr(Spy, "seen", [])
    for module in (distill, tune_blocks):
        monkeypatch.setattr(module, "Descent", Spy)
    return Spy.seen


@pytest.mark.parametrize("more", [(), ("--norm-rate", 0), ("--head-rate", 0.001)])
def test_what_is_trained_end_to_end_is_what_the_run_trains(tune, spied, more):
    """Oracle: the run's own masters, steps, and the state that it saves."""
    (row,) = rows_of(tune("--end-to-end", "--out", "tuned", *more, "--dry-run"))
    assert not spied
    assert tune("--end-to-end", "--out", "tuned", *more).status == 0
    (descent,) = spied
    masters = descent.trained.masters.values()
    assert row["parameters"] == sum(master.numel() for master in masters)
    assert row["tensors"] == len(descent.trained.names) if "--head-rate" not in more else True
    assert row["steps"] == descent.step == descent.steps


def test_what_is_trained_by_block_is_what_the_run_trains(tune, spied):
    """Oracle: as above, of all blocks together."""
    (row,) = rows_of(tune("--blocks", "--out", "tuned", "--dry-run"))
    assert tune("--blocks", "--out", "tuned").status == 0
    assert row["parameters"] == sum(master.numel() for each in spied for master in each.trained.masters.values())
    assert row["tensors"] == sum(len(each.trained.names) for each in spied)
    assert row["steps"] == sum(each.step for each in spied)


@pytest.mark.parametrize("code", ["3inst", "hyb"])
def test_a_model_with_biases_or_a_table(qtip, text, tmp_path, spied, code):
    """Oracle: as above, on layers with biases, and with a table that is trained."""
    model = save_model("qwen2", tmp_path / "model")
    say = ("--state-bits", 8, "--samples", 6, "--context", 32, "--code", code, "--data", text, "--out", "packed")
    assert qtip("quantize", model, *say).status == 0
    tuning = ("finetune", "packed", "--base", model, "--data", text, *TEXT, "--end-to-end", "--json")
    (row,) = rows_of(qtip(*tuning, "--dry-run"))
    assert qtip(*tuning).status == 0
    masters = spied[0].trained.masters
    assert any("lut" in name for name in masters) == (code == "hyb")
    assert any("bias" in name for name in masters)
    assert row["parameters"] == sum(master.numel() for master in masters.values())


def test_saved_states_and_the_result_take_what_is_said(tune, spied, tmp_path):
    """Oracle: the tensors of a saved state but for the history, and the files that the run writes."""
    said = json.loads(tune("--end-to-end", "--checkpoint-every", 2, "--out", "tuned", "--dry-run").out)
    assert tune("--end-to-end", "--checkpoint-every", 2, "--out", "tuned").status == 0
    (descent,) = spied
    state = descent.state()
    saved = sum(tensor.nbytes for name, tensor in state.items() if name not in ("step", "best_loss"))
    result = sum(tensor.nbytes for tensor in descent.best.values())
    assert said["disk"]["end to end, saved states"] == saved + result  # 4 steps: one saved state before the last step
    written = sum(file.stat().st_size for file in (tmp_path / "tuned").glob("*.safetensors"))
    assert said["stored"]["weights"] == written


def test_no_weight_is_read_and_nothing_is_written(tune, packed, tmp_path, monkeypatch):
    """Oracle: checkpoints of which vectors alone can be read."""
    before = snapshot(packed / "out")
    read = PackedDirectory.read

    def vectors(self, name):
        assert name.rpartition(".")[2] in ("scale_in", "scale_out", "weight"), name
        tensor = read(self, name)
        assert tensor.ndim == 1, name
        return tensor

    def refuse(self, name, row=None):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(PackedDirectory, "read", vectors)
    monkeypatch.setattr(ModelSource, "read", refuse)
    done = tune("--blocks", "--end-to-end", "--out", "tuned", "--dry-run")
    assert done.status == 0, done.err
    assert not list(tmp_path.iterdir())
    assert snapshot(packed / "out") == before


def test_a_hub_original_is_described_by_its_headers(tune, tiny_model, monkeypatch):
    """Oracle: the same original in a local directory. The Hub is stood in for by that directory."""
    local = json.loads(tune("--end-to-end", "--out", "tuned", "--dry-run").out)
    where = stand_in_for_hub(monkeypatch, tiny_model)
    hub = json.loads(tune("--end-to-end", "--out", "tuned", "--dry-run", base="org/model").out)
    assert hub["tables"] == local["tables"]
    assert hub["disk"] == local["disk"]
    assert not any(path.exists() for path in where)


def test_memory_grows_with_tokens_as_is_said(packed, tiny_model):
    """Oracle: a block trained on four times the tokens that were counted on; to a twentieth."""
    skeleton = Imagined(ModelSource.open(tiny_model))
    layouts = PackedDirectory(packed / "out").layouts
    settings = BlockTuning()
    found = tuning_rates.measure_tuning(skeleton, layouts, settings, 1, 64, allowed=0.0)
    asked = tuning_rates._Asked(settings, 1, 64, True, False, False, 0.0)
    block = tuning_rates._Block(skeleton, 0, layouts, asked)
    block.decode()
    kept, peak = block.count(4 * tuning_rates.PROBE_TOKENS)
    block.leave()
    tokens = 4 * tuning_rates.PROBE_TOKENS
    assert found.block.of(tokens) == pytest.approx(peak, rel=0.05)
    assert found.kept.of(tokens) == pytest.approx(len(skeleton.blocks) * kept, rel=0.05)


def test_the_head_takes_what_is_said():
    """Oracle: the loss there and back on more tokens and the whole vocabulary; to a tenth, since hidden states are left out."""
    vocabulary, width, tokens = 1000, 8, 257
    weight = torch.randn(vocabulary, width)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    with LiveBytes() as live:
        with torch.no_grad():
            teacher = hidden @ weight.T
        distill.divergence(hidden @ weight.T, teacher).backward()
    assert live.peak / (tokens - 1) / vocabulary == pytest.approx(head_bytes(width, vocabulary), rel=0.1)


def head_bytes(width, vocabulary):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(width, vocabulary, bias=False)

        def get_output_embeddings(self):
            return self.head

    class Skeleton:
        model, device, dtype = Model(), torch.device("cpu"), torch.float32

    return tuning_rates.measure_head(Skeleton()).logit


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (("--out", "tuned"), "neither kind of tuning"),
        (("--end-to-end", "--data", "absent.txt", "--out", "tuned"), "absent.txt"),
    ],
)
def test_what_the_run_refuses_is_refused(tune, more, fact):
    done = tune(*more, "--dry-run")
    assert done.status != 0
    assert fact in done.err


def test_one_of_several_processes_is_refused(tune, monkeypatch):
    monkeypatch.setattr("qtipcli.job.launcher.world", lambda: 2)
    done = tune("--end-to-end", "--out", "tuned", "--dry-run")
    assert done.status == 2
    assert "of one process" in done.err


def test_the_table_is_read_aloud(tune, qtip, packed, tiny_model, text):
    shown = qtip(
        "finetune", packed / "out", "--base", tiny_model, "--data", text, *TEXT, "--blocks", "--end-to-end", "--dry-run"
    )
    assert shown.status == 0, shown.err
    for words in ("what is trained", "by block", "end to end", "peak RAM", "saved states", "nothing was written"):
        assert words in shown.out
