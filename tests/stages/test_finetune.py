"""Tuning of tiny models: it lowers the held-out loss, is never worse, touches scales only, and no kill changes the result.

Oracles: the untuned model, `qtip eval`, bytes of an undisturbed run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtipcli.errors import StoppedError
from qtipcli.job.processes import Processes
from qtipcli.job.shared import SharedDirectory
from qtipcli.stages import finetune
from stages.fixtures import Outcome, Qtip
from stages.tiny import environment, save_model, snapshot

TEXT = ("--samples", "16", "--heldout", "4", "--context", "32", "--batch", "4")


@pytest.fixture
def tune(qtip: Qtip, packed: Path, tiny_model: Path, text: Path) -> Qtip:
    """`qtip finetune` on the packed tiny model, or on keyword `directory`."""

    def run(*arguments: object, directory: Path = packed / "out", base: Path = tiny_model) -> Outcome:
        return qtip("finetune", directory, "--base", base, "--data", text, *TEXT, *arguments)

    return run


def test_a_head_is_trained_on_request(tune: Qtip, packed: Path, tmp_path: Path) -> None:
    """The tiny model's is tied to the embedding, and is so still."""
    assert tune("--end-to-end", "--head-rate", "1e-2", "--norm-rate", "0", "--out", "tuned").status == 0
    before, after = (load_file(where / "model.safetensors") for where in (packed / "out", tmp_path / "tuned"))
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "scale" not in name}
    assert changed == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", ["--blocks", "--end-to-end"])
def test_tuning_lowers_the_heldout_divergence(kind: str, tune: Qtip, packed: Path, tmp_path: Path) -> None:
    outcome = tune(kind, "--out", "tuned", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["written"]
    assert report["heldout_after"] < report["heldout_before"]
    before, after = (load_file(where / "model.safetensors") for where in (packed / "out", tmp_path / "tuned"))
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"scale_in", "scale_out", "weight"}
    assert all(before[name].ndim == 1 for name in before if not torch.equal(before[name], after[name]))
    assert all(before[name].dtype == after[name].dtype for name in before)
    for block in range(2):
        stem = f"model.layers.{block}"
        attention = [after[f"{stem}.self_attn.{name}_proj.scale_in"] for name in "qkv"]
        assert torch.equal(attention[0], attention[1])
        assert torch.equal(attention[0], attention[2])
        assert torch.equal(after[f"{stem}.mlp.gate_proj.scale_in"], after[f"{stem}.mlp.up_proj.scale_in"])


def test_the_reported_divergence_is_that_of_the_written_model(
    tune: Qtip, qtip: Qtip, tiny_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qtip eval` computes in float64 from the files; the held-out windows of the report are given to it as they are."""
    report = json.loads(tune("--blocks", "--end-to-end", "--out", "tuned", "--json").out)
    from qtipcli.model.source import ModelSource
    from qtipcli.stages import calibrate, evaluate
    from qtipcli.stages.load import load_model

    settings = finetune.CalibrationSettings(data=str(text), samples=20, context=32, seed=0)
    windows = calibrate.load_windows(ModelSource.open(tiny_model), settings)
    windows = type(windows)(**{**vars(windows), "tokens": windows.tokens[-4:]})
    measured = evaluate.run(load_model("tuned"), load_model(tiny_model), windows).kl_mean
    assert measured == pytest.approx(report["heldout_after"], rel=1e-3)
    assert qtip("inspect", "tuned").status == 0


def test_what_is_no_better_is_not_written(tune: Qtip, packed: Path, tmp_path: Path) -> None:
    """A rate that throws everything about, so that no epoch is better than none."""
    for kind, rate in (("--blocks", "--block-rate"), ("--end-to-end", "--end-rate")):
        outcome = tune(kind, rate, "0.9", "--out", "tuned", "--json")
        assert outcome.status == 0, outcome.err
        report = json.loads(outcome.out)
        assert not report["written"]
        assert report["heldout_after"] <= report["heldout_before"]
        assert report["directory"] == str(packed / "out")
        assert "nothing was written" in outcome.err
        assert not (tmp_path / "tuned").exists()


def test_biases_norms_and_tables_are_trained_on_request(quantize: Qtip, tune: Qtip, tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path / "model")
    assert quantize("--out", "out", "--code", "hyb", model=model).status == 0
    rates = ("--norm-rate", "1e-2", "--lut-rate", "1e-2")
    for name, kinds in (("both", ("--blocks", "--end-to-end")), ("end", ("--end-to-end",))):
        outcome = tune(*kinds, *rates, "--out", name, directory=tmp_path / "out", base=model)
        assert outcome.status == 0, outcome.err
        before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("out", name))
        changed = {".".join(name.split(".")[-2:]) for name in before if not torch.equal(before[name], after[name])}
        assert {"q_proj.bias", "input_layernorm.weight", "down_proj.lut", "o_proj.scale_out"} <= changed
        assert not any("trellis" in name or "embed" in name or "lm_head" in name for name in changed)


def test_the_same_command_again_does_nothing(tune: Qtip, tmp_path: Path) -> None:
    assert tune("--blocks", "--end-to-end", "--out", "tuned").status == 0
    before = snapshot(tmp_path)
    outcome = tune("--blocks", "--end-to-end", "--out", "tuned")
    assert outcome.status == 0
    assert "nothing was done" in outcome.err
    assert snapshot(tmp_path) == before


def test_interrupted_anywhere_it_ends_in_the_same_bytes(tune: Qtip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every safe point of the training stops the run once; each time the command is given again."""
    command = ("--blocks", "--end-to-end", "--checkpoint-every", "3")
    assert tune(*command, "--out", "oracle").status == 0
    oracle = snapshot(tmp_path / "oracle")
    real, stops, calls = Processes.checkpoint, [2, 1, 5, 9, 3, 2, 4], [0]

    def stop_here(processes: Processes) -> None:
        calls[0] += 1
        if stops and calls[0] == stops[0]:
            stops.pop(0)
            calls[0] = 0
            raise StoppedError("stopped by the test: everything finished so far is saved")
        real(processes)

    monkeypatch.setattr(Processes, "checkpoint", stop_here)
    stopped = 0
    while (outcome := tune(*command, "--out", "tuned")).status == 130:
        stopped += 1
        assert not (tmp_path / "tuned").exists()
    assert outcome.status == 0, outcome.err
    assert stopped == 7
    assert snapshot(tmp_path / "tuned") == oracle


def test_a_kill_behind_the_result_leaves_no_saved_state(tune: Qtip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("--end-to-end", "--checkpoint-every", "3")
    assert tune(*command, "--out", "oracle").status == 0
    forget = SharedDirectory.forget

    def stop_there(job: SharedDirectory, *keys: str) -> None:
        if job.done("result"):
            raise KeyboardInterrupt
        forget(job, *keys)

    with monkeypatch.context() as patch:
        patch.setattr(SharedDirectory, "forget", stop_there)
        assert tune(*command, "--out", "tuned").status == 130
    assert list((tmp_path / "tuned.end.job").glob("step-*"))
    assert tune(*command, "--out", "tuned").status == 0
    expected, found = snapshot(tmp_path / "oracle.end.job"), snapshot(tmp_path / "tuned.end.job")
    assert found.keys() == expected.keys()
    assert [found[name] for name in ("loss.jsonl", "loss.png")] == [expected[name] for name in ("loss.jsonl", "loss.png")]


def test_a_stop_between_two_saved_states_saves_its_own(tune: Qtip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's two blocks are safe points, then each step is one: the fifth comes after step 3."""
    real, calls = Processes.checkpoint, [0]

    def stop_at_the_fifth(processes: Processes) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise StoppedError("stopped by the test")
        real(processes)

    monkeypatch.setattr(Processes, "checkpoint", stop_at_the_fifth)
    assert tune("--end-to-end", "--out", "tuned").status == 130
    assert [file.name for file in (tmp_path / "tuned.end.job").glob("step-*")] == ["step-0000003.safetensors"]


def kill_jobs(*arguments: str) -> dict:
    command = [sys.executable, "-m", "stages.kills", "--what", "finetune", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_random_moments_it_ends_in_the_same_bytes() -> None:
    report = kill_jobs("--kills", "3", "--warm")
    assert report["differing"] == 0, report


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_it_ends_in_the_same_bytes() -> None:
    report = kill_jobs("--kills", "20")
    assert report["differing"] == 0, report
    assert {"tuning blocks", "tuning end to end"} <= report["reached"].keys()


def test_activations_in_a_file_give_the_same_bytes(tune: Qtip, tmp_path: Path) -> None:
    assert tune("--blocks", "--out", "held").status == 0
    outcome = tune("--blocks", "--out", "spilt", "--memory", "0")
    assert outcome.status == 0
    assert "go to a file" in outcome.err
    assert snapshot(tmp_path / "held") == snapshot(tmp_path / "spilt")


def test_packed_layers_that_decode_in_every_product_train_as_well(tune: Qtip) -> None:
    """--memory 0 leaves no room for decoded weights; gradient checkpointing computes everything twice."""
    plain = json.loads(tune("--end-to-end", "--out", "plain", "--json").out)
    for name, options in (("packed", ("--memory", "0")), ("twice", ("--gradient-checkpointing",))):
        outcome = tune("--end-to-end", "--out", name, "--json", *options)
        assert outcome.status == 0, outcome.err
        other = json.loads(outcome.out)
        assert other["heldout_after"] == pytest.approx(plain["heldout_after"], rel=2e-2)


def test_autocast_trains(tune: Qtip) -> None:
    report = json.loads(tune("--end-to-end", "--autocast", "--out", "tuned", "--json").out)
    assert report["heldout_after"] < report["heldout_before"]


def test_the_course_of_the_loss_is_written(tune: Qtip, tmp_path: Path) -> None:
    assert tune("--end-to-end", "--out", "tuned", "--end-epochs", "2").status == 0
    job = tmp_path / "tuned.end.job"
    lines = [json.loads(line) for line in (job / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "heldout" in line] == [0, 4, 8]
    pytest.importorskip("matplotlib")
    assert (job / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_are_tuned_as_they_are_rounded(quantize: Qtip, packed: Path, qtip: Qtip, tmp_path: Path) -> None:
    shutil.copytree(packed / "hessians", tmp_path / "hessians")
    # At one bit, so that there is something left to tune after layers were corrected.
    options = ("--hessians", "hessians", "--quantized-prefix", "--bits", "1")
    assert quantize("--out", "plain", *options).status == 0
    options = (*options, "--tune-blocks")
    assert quantize("--out", "out", *options).status == 0
    tuned, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    name = "model.layers.{}.mlp.up_proj.{}"
    assert torch.equal(tuned[name.format(0, "trellis")], plain[name.format(0, "trellis")])
    assert not torch.equal(tuned[name.format(0, "scale_out")], plain[name.format(0, "scale_out")])
    assert not torch.equal(tuned[name.format(1, "trellis")], plain[name.format(1, "trellis")])
    assert qtip("inspect", "out").status == 0
    oracle = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    ledger = tmp_path / "out.job" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    assert "1 of 2 done before" in quantize("--out", "out", *options).err
    assert snapshot(tmp_path / "out") == oracle


def test_a_job_stands_for_its_packed_directory(tune: Qtip, packed: Path, tmp_path: Path) -> None:
    assert tune("--blocks", "--out", "tuned", directory=packed / "out.job").status == 0
    shutil.copytree(packed / "out.job", tmp_path / "alone.job")
    outcome = tune("--blocks", "--out", "other", directory=tmp_path / "alone.job")
    assert outcome.status == 1
    assert "not packed" in outcome.err


def test_the_original_is_found_by_what_the_directory_says(qtip: Qtip, packed: Path, text: Path) -> None:
    outcome = qtip("finetune", packed / "out", "--data", text, *TEXT, "--blocks", "--out", "tuned")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "neither kind of tuning"),
        (("--blocks", "--block-rate", "2"), 2, "learning_rate"),
        (("--blocks", "--batch", "0"), 2, "batch"),
        (("--blocks", "--context", "100000"), 1, "positions"),
        (("--blocks", "--data", "absent.txt"), 1, "absent.txt"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[str, ...], status: int, said: str, tune: Qtip) -> None:
    outcome = tune(*arguments, "--out", "tuned")
    assert outcome.status == status, outcome.err
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_bad_directories_are_refused(tune: Qtip, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    for directory, said in ((tmp_path / "absent", "holds no model"), (tiny_model, "not a qtip model")):
        outcome = tune("--blocks", "--out", "tuned", directory=directory)
        assert outcome.status == 1
        assert said in outcome.err
    assert "choose another --out" in tune("--blocks", "--out", packed / "out").err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "not empty" in tune("--blocks", "--out", "full").err
    other = save_model("qwen2", tmp_path / "other")
    assert "another model" in tune("--blocks", "--out", "tuned", base=other).err


def test_the_untuned_model_stays_as_it_was(tune: Qtip, packed: Path) -> None:
    before = snapshot(packed / "out")
    assert tune("--blocks", "--end-to-end", "--out", "tuned").status == 0
    assert snapshot(packed / "out") == before


@pytest.mark.slow
def test_tuning_the_blocks_of_a_billion_parameters_takes_less_than_six_gigabytes() -> None:
    command = [sys.executable, "-m", "stages.tune_memory", "--blocks", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["parameters"] > 1e9
    assert report["peak_GB"] < 6, report
