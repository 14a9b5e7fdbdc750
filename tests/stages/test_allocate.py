"""A measured allocation of bits on tiny models: what is measured, what is chosen, what is stored, and that it is never worse.

Oracles: transformers' own model with one weight replaced; the sizes of the tensors that were written; the evaluation of the
packed model; the uniform model's bytes; an undisturbed run.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtipcli.cli.main import _run
from qtipcli.data.windows import Windows
from qtipcli.job.directory import RunDirectory
from qtipcli.model.source import ModelSource
from qtipcli.quant.matrix import RoundingSettings
from qtipcli.quant.probe import probe_group
from qtipcli.quant.transform import Transform
from qtipcli.stages import allocate, evaluate, sensitivity
from qtipcli.stages.allocate import ALLOCATED, TABLE, UNIFORM, VERDICT
from qtipcli.stages.calibrate import TOKENS, block_key
from qtipcli.stages.divergence import Reference
from qtipcli.stages.progress import Silent
from qtipcli_kernels.spec import TrellisSpec
from stages.fixtures import Qtip
from stages.test_pipeline import kill_jobs
from stages.tiny import FAST_OPTIONS, save_model, snapshot

MATERIALS = Path(__file__).parents[3] / "shared" / "materials"
PRESET = "description: little is measured\nallocate: {windows: 2, judge_windows: 3}\n"


@pytest.fixture(scope="session")
def allocated(packed: Path, tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the tiny model was quantized to an average of 2.5 bits, with all that is left beside `out`."""
    where = tmp_path_factory.mktemp("allocated")
    shutil.copytree(packed / "hessians", where / "hessians")
    (where / "little.yaml").write_text(PRESET)
    command = ["quantize", tiny_model, *FAST_OPTIONS, "--data", text, "--out", where / "out", "--hessians", where / "hessians"]
    assert _run([str(part) for part in [*command, "--bits", "2.5", "--preset", where / "little.yaml"]]) == 0
    return where


@pytest.fixture
def own(allocated: Path, tmp_path: Path) -> Path:
    """A copy of it, in the directory where commands run."""
    shutil.copytree(allocated, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def again(quantize: Qtip, own: Path) -> Qtip:
    """The same command, or one that differs in the options given."""

    def run(*arguments: object) -> Any:
        return quantize("--preset", "little.yaml", "--hessians", "hessians", *(arguments or ("--bits", "2.5", "--out", "out")))

    return run


def stored_bytes(directory: Path) -> int:
    """Of all tensors on disk."""
    return sum(tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values())


def plain_divergence(model: Any, original: Any, tokens: torch.Tensor) -> float:
    """Mean KL(original || model) by definition."""
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(each(input_ids=tokens, use_cache=False).logits[:, :-1].double(), -1) for each in (original, model)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# What is measured


def test_sensitivities_are_what_one_noisy_layer_does_to_the_whole_model(allocated: Path, tiny_model: Path) -> None:
    """Float32 logits against float32 logits that were computed in other batches, both compared in float64."""
    job = RunDirectory.load(allocated / "hessians.sensitivity-3inst", sensitivity.STAGE)
    calibration = RunDirectory.load(allocated / "hessians")
    tokens = job.read(TOKENS)[TOKENS]
    for block, group in ((0, 0), (1, -1)):
        names = calibration.report(block_key(block))["groups"][group]["names"]
        hessian = calibration.read(block_key(block))[names[0]]
        original, model = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval() for _ in range(2))
        weights = {name: original.get_submodule(name).weight for name in names}
        settings = RoundingSettings(Transform(), 1e-3, refit=True)
        probes = probe_group(weights, hessian, TrellisSpec("3inst", 2, 8), [], settings)
        row = job.report(block_key(block))["layers"][names[-1]]
        model.get_submodule(names[-1]).weight.data = probes[names[-1]].noisy_OI
        assert row["kl"] == pytest.approx(plain_divergence(model, original, tokens), rel=1e-3)
        assert row["noise_loss"] == probes[names[-1]].noise_loss
        assert row["kl_stderr"] > 0
        assert sensitivity.rows(job, calibration)[names[-1]]["sensitivity"] == row["kl"] / row["noise_loss"]


def test_held_out_windows_are_not_those_that_calibrated(allocated: Path) -> None:
    job = RunDirectory.load(allocated / "hessians.sensitivity-3inst")
    shard = job.read(TOKENS)
    calibrated = {tuple(row) for row in RunDirectory.load(allocated / "hessians").read(TOKENS)[TOKENS].tolist()}
    measured, judged = ({tuple(row) for row in shard[name].tolist()} for name in (TOKENS, sensitivity.JUDGE_TOKENS))
    assert (len(calibrated), len(measured), len(judged)) == (6, 2, 3)
    assert calibrated.isdisjoint(measured | judged)
    assert measured.isdisjoint(judged)


class Reports:
    """Stands for two run directories of one block with these layers."""

    def __init__(self, **layers: tuple[float, float]) -> None:
        self.layers = {name: {"kl": kl, "noise_loss": loss} for name, (kl, loss) in layers.items()}

    def keys(self) -> list[str]:
        return [TOKENS, "block-00000"]

    def report(self, key: str) -> dict[str, Any]:
        return {"layers": self.layers}


def test_what_cannot_be_measured_is_not_taken_for_harmless() -> None:
    job = Reports(a=(4.0, 2.0), b=(1.0, 2.0), c=(0.25, 2.0), idle=(0.0, 2.0), faint=(1e-9, 2.0), zero=(0.0, 0.0))
    found = {name: row["sensitivity"] for name, row in sensitivity.rows(job, job).items()}
    assert (found["a"], found["b"], found["c"]) == (2.0, 0.5, 0.125)
    median = (1.0 + 0.25) / 2  # of a, b, c and faint
    assert found["faint"] == sensitivity.LEAST_SHARE * median / 2.0
    assert found["idle"] == (0.5 + 0.125) / 2
    assert found["zero"] == 0.0


# What is stored


def test_an_average_takes_no_more_bytes_than_that_rate_would(allocated: Path, packed: Path) -> None:
    """The uniform model at 2 bits, and half a bit more for each of the padded weights: 112 where a tile does not divide 100."""
    table = RunDirectory.load(allocated / "out.allocation.job", allocate.STAGE).report(TABLE)
    padded = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 112 * 64)
    assert table["budget"] == stored_bytes(packed / "out") + padded // 16
    written = stored_bytes(allocated / "out")
    assert written == table["bytes"][ALLOCATED] <= table["budget"]
    assert written > table["budget"] - 256, "a layer of 64 x 32 takes 256 bytes a bit"
    assert table["bytes"][UNIFORM] == stored_bytes(packed / "out")
    assert table["uniform"] == "2:3inst"
    assert len(set(table["layers"].values())) > 1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_size_counts_all_that_is_stored(kind: str, quantize: Qtip, tmp_path: Path) -> None:
    """A tied head and an untied one, biases, norms; the size is met to less than what the smallest layer gains by a bit."""
    model = save_model(kind, tmp_path / "model")
    (tmp_path / "little.yaml").write_text(PRESET)
    size = stored_bytes(model) - 4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 100 * 64) + 30_000
    outcome = quantize("--preset", "little.yaml", "--size", f"{size}B", "--out", "out", model=model)
    assert outcome.status == 0, outcome.err
    assert size - 256 < stored_bytes(tmp_path / "out") <= size
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == stored_bytes(tmp_path / "out")


def test_the_smallest_size_and_one_byte_less(again: Qtip, own: Path) -> None:
    outcome = again("--size", "1KB", "--out", "small")
    assert outcome.status == 2
    smallest = int(outcome.err.split("the smallest possible is ")[1].split(" bytes")[0].replace(",", ""))
    assert again("--size", smallest - 1, "--out", "small").status == 2
    assert not list(own.glob("small*"))
    outcome = again("--size", smallest, "--out", "small", "--json")
    assert outcome.status == 0, outcome.err
    assert stored_bytes(own / "small") == smallest
    assert {row["bits"] for row in json.loads(outcome.out)["rows"]} == {1.0}
    assert "there is nothing to compare" in outcome.err
    assert not (own / "small.uniform.job").exists()


def test_more_room_than_the_highest_rates_need_is_said(again: Qtip, own: Path) -> None:
    outcome = again("--size", "1GiB", "--out", "large", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert {row["bits"] for row in report["rows"]} == {8.0}
    assert f"every layer has its best rate at {stored_bytes(own / 'large'):,} bytes" in outcome.err


def test_the_users_own_layers_stay_as_they_are(again: Qtip, own: Path) -> None:
    fixed = ("--skip", "*.0.*v_proj", "--layer", "*down_proj=4", "--layer", "*.1.*q_proj=:1mad")
    outcome = again("--bits", "2.5", "--out", "mixed", *fixed, "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    rows = {row["layer"]: (row["bits"], row["code"]) for row in report["rows"]}
    assert report["not_converted"]["model.layers.0.self_attn.v_proj"] == "skipped by the settings"
    assert rows["model.layers.0.mlp.down_proj"] == rows["model.layers.1.mlp.down_proj"] == (4.0, "3inst")
    assert rows["model.layers.1.self_attn.q_proj"] == (2.0, "1mad")
    table = RunDirectory.load(own / "mixed.allocation.job").report(TABLE)
    assert set(table["layers"]) == set(rows) - {
        name for name in rows if "down_proj" in name or name.endswith("1.self_attn.q_proj")
    }
    assert stored_bytes(own / "mixed") == report["allocation"]["bytes"][ALLOCATED] <= table["budget"]
    for name, text in table["layers"].items():
        assert rows[name] == (float(text.split(":")[0]), text.split(":")[1])
    uniform = RunDirectory.load(own / "mixed.uniform.job")
    bits = {name: row["bits_per_step"] for key in uniform.keys() for name, row in uniform.report(key).get("layers", {}).items()}  # noqa: SIM118
    assert bits["model.layers.1.mlp.down_proj"] == 4
    assert set(bits) == set(rows)


def test_half_rates_are_chosen_where_their_table_is_worth_it() -> None:
    """In 1024 x 1024 the table of 2 KiB is a hundredth of a bit a weight, and a half rate is on the way from 2 to 3 bits."""
    layers = {f"layer.{number}": allocate.Layer(1024, 1024, False) for number in range(3)}
    settings = sensitivity.SensitivitySettings()
    specs = sensitivity.candidates(allocate.QuantizeSettings(), settings)
    assert [sensitivity.spec_name(spec) for spec in specs[8:]] == ["1.5:hyb2", "2.5:hyb2", "3.5:hyb2"]
    budget = allocate.Budget(layers, specs, Transform(), 0, 3 * (1024 * 1024 * 5 // 16 + 2048 + 4096))
    losses = {name: {sensitivity.spec_name(spec): 4.0**-spec.bits for spec in specs} for name in layers}
    taken = allocate.allocate(budget.choices(losses), budget.limit)
    assert {specs[index].bits for index in taken} == {2.5}
    assert budget.best_uniform().bits == 2.5
    assert budget.uniform_bytes(budget.best_uniform()) == budget.limit


# What is kept


def test_the_figures_are_those_of_the_packed_model(allocated: Path, tiny_model: Path) -> None:
    """Packed layers against the dense weights that they stand for: float32 sums in another order."""
    record = json.loads((allocated / "out" / "qtip.json").read_text())["allocation"]
    assert record["kept"] == ALLOCATED
    tokens = RunDirectory.load(allocated / "hessians.sensitivity-3inst").read(TOKENS)[sensitivity.JUDGE_TOKENS]
    windows = Windows(tokens, "held-out", 3, 3, "none", "")
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (allocated / "out", tiny_model)]
    result = evaluate.run(*models, windows)
    assert record["measured"]["kl"][ALLOCATED] == pytest.approx(result.kl_mean, rel=1e-3)
    assert record["measured"]["kl_stderr"][ALLOCATED] == pytest.approx(result.kl_stderr, rel=1e-2)
    assert record["measured"]["kl"][ALLOCATED] < record["measured"]["kl"][UNIFORM]
    assert 0 < record["predicted_kl"][ALLOCATED] < record["predicted_kl"][UNIFORM]
    config = json.loads((allocated / "out" / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["allocation"] == record


def test_tuned_vectors_are_in_the_figures(quantize: Qtip, tmp_path: Path) -> None:
    """Norms and biases that block tuning trained, in a model that has both."""
    model = save_model("qwen2", tmp_path / "model")
    (tmp_path / "little.yaml").write_text(PRESET)
    options = ("--preset", "little.yaml", "--bits", "2.5", "--tune-blocks", "--hessians", "h", "--out", "out")
    outcome = quantize(*options, model=model)
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "out" / "qtip.json").read_text())["allocation"]
    tokens = RunDirectory.load(tmp_path / "h.sensitivity-3inst").read(TOKENS)[sensitivity.JUDGE_TOKENS]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (tmp_path / "out", model)]
    assert record["measured"]["kl"][record["kept"]] == pytest.approx(plain_divergence(*models, tokens), rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not MATERIALS.is_dir(), reason="../shared/materials is absent")
def test_an_average_lies_below_the_line_between_its_neighbours(qtip: Qtip, tmp_path: Path) -> None:
    """On a real model and text, log KL over stored bits: at L = 16 it lies 20 % (2.5 bits) below the line (docs/log.md)."""
    model = MATERIALS / "tinystories-llama-1m"
    calibration = ("--data", MATERIALS / "tinystories-calibration.txt", "--samples", "64", "--context", "256")
    held_out = ("--data", MATERIALS / "tinystories-heldout.txt", "--context", "256", "--windows", "32", "--json")
    figures = {}
    for bits in ("2", "2.5", "3"):
        options = ("--bits", bits, "--state-bits", "10", "--hessians", "hessians", "--out", f"out-{bits}")
        outcome = qtip("quantize", model, *calibration, *options)
        assert outcome.status == 0, outcome.err
        result = json.loads(qtip("eval", f"out-{bits}", "--base", model, *held_out).out)
        figures[bits] = result["bits_per_weight"], math.log(result["kl_mean"])
    (x0, y0), (x, y), (x1, y1) = (figures[bits] for bits in ("2", "2.5", "3"))
    assert y < y0 + (y1 - y0) * (x - x0) / (x1 - x0) - 0.05


def test_a_worse_allocation_is_not_kept(again: Qtip, own: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensitivities that are upside down spend bits where they are worth least; what is packed then is the uniform model."""
    measured = sensitivity.rows

    def inverted(*arguments: Any) -> Any:
        rows = measured(*arguments)
        for row in rows.values():
            row["sensitivity"] = 1e-6 / row["sensitivity"] ** 3
        return rows

    monkeypatch.setattr(sensitivity, "rows", inverted)
    outcome = again("--bits", "2.4", "--out", "worse", "--json")
    assert outcome.status == 0, outcome.err
    assert "the uniform model is kept" in outcome.err
    verdict = json.loads(outcome.out)["allocation"]["measured"]
    assert verdict["kept"] == UNIFORM
    assert verdict["kl"][UNIFORM] < verdict["kl"][ALLOCATED]
    ours, uniform = (load_file(where / "model.safetensors") for where in (own / "worse", packed / "out"))
    assert ours.keys() == uniform.keys()
    assert all(torch.equal(ours[name], uniform[name]) for name in ours)
    monkeypatch.undo()
    monkeypatch.chdir(own)
    assert "nothing was done" in again("--bits", "2.4", "--out", "worse").err


def test_offered_rates_can_be_allocated_too(again: Qtip, own: Path, packed: Path) -> None:
    outcome = again("--allocate", "--bits", "3", "--out", "three", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert len({row["bits"] for row in report["rows"]}) > 1 or report["allocation"]["kept"] == UNIFORM
    assert report["allocation"]["measured"]["kl"].keys() == {ALLOCATED, UNIFORM}
    padded = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 112 * 64)
    assert stored_bytes(own / "three") <= stored_bytes(packed / "out") + padded // 8


# What is done again


def test_the_same_command_again_does_nothing(again: Qtip, own: Path) -> None:
    before = snapshot(own)
    outcome = again()
    assert outcome.status == 0, outcome.err
    assert "nothing was done" in outcome.err
    assert snapshot(own) == before


def test_another_average_measures_nothing_again(again: Qtip, own: Path) -> None:
    before = snapshot(own / "hessians.sensitivity-3inst")
    outcome = again("--bits", "1.5", "--out", "other", "--no-pack")
    assert outcome.status == 0, outcome.err
    assert "sensitivity (2 of 2 done before)" in outcome.err
    assert outcome.out.strip() in ("other.job", "other.uniform.job")
    assert snapshot(own / "hessians.sensitivity-3inst") == before


def test_each_step_goes_on_to_the_same_bytes(again: Qtip, own: Path) -> None:
    oracle = snapshot(own)
    verdict = RunDirectory.load(own / "out.allocation.job").report(VERDICT)
    for job, kept in (("hessians.sensitivity-3inst", 2), ("out.allocation.job", 1), ("out.uniform.job", 1)):
        ledger = own / job / "ledger.jsonl"
        ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:kept]))
        shutil.rmtree(own / "out")
        assert again().status == 0
        assert snapshot(own) == oracle
    assert RunDirectory.load(own / "out.allocation.job").report(VERDICT) == verdict


def test_other_settings_are_refused_with_the_remedy(again: Qtip, own: Path) -> None:
    outcome = again("--bits", "2.5", "--out", "other", "--windows", "3")
    assert outcome.status == 1
    assert "windows is 2 there and 3 here" in outcome.err
    assert "--sensitivities DIR" in outcome.err
    outcome = again("--bits", "2.25", "--out", "out")
    assert outcome.status == 2 or "allocate.bits is 2.5 there" in outcome.err
    assert again("--bits", "2.5", "--out", "other", "--windows", "3", "--sensitivities", "mine").status == 0
    assert len(RunDirectory.load(own / "mine").read(TOKENS)[TOKENS]) == 3


def test_the_allocated_job_can_be_packed_again(qtip: Qtip, own: Path, tiny_model: Path) -> None:
    assert qtip("pack", tiny_model, "out.job", "--out", "second", "--max-shard-size", "50KB").status == 0
    tensors = [
        {name: tensor for file in (own / where).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for where in ("out", "second")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_names_with_brackets_are_not_patterns() -> None:
    table = {"layers": {"a[0].b": "3:3inst", "a0.b": "1.5:hyb2"}, "uniform": "2:3inst"}
    settings = allocate.settings_of(table, allocate.QuantizeSettings(), ALLOCATED)
    assert list(settings.layers) == ["a[[]0].b", "a0.b"]
    assert settings.layers["a0.b"].code == "hyb2"
    uniform = allocate.settings_of(table, allocate.QuantizeSettings(layers={"x": {"bits": 4}}), UNIFORM)
    assert list(uniform.layers) == ["x", "*"]


def test_allocations_killed_at_random_moments_end_in_the_same_bytes() -> None:
    report = kill_jobs("--what", "allocate", "--kills", "4", "--warm")
    assert report["differing"] == 0, report


def test_tokens_of_other_text_are_all_held_out(again: Qtip, own: Path) -> None:
    (own / "other.txt").write_text("".join(f"class Number{n}:\n    value = {n}\n\n" for n in range(200)))
    outcome = again("--bits", "2.5", "--out", "other", "--heldout-data", "other.txt", "--sensitivities", "other.job-s")
    assert outcome.status == 0, outcome.err
    assert RunDirectory.load(own / "other.job-s").report(TOKENS)["source"] == "other.txt"


def test_too_little_text_is_shared_or_refused(quantize: Qtip, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("".join(f"def f{n}(x):\n    return {n}\n\n" for n in range(30)))
    outcome = quantize("--bits", "2.5", "--samples", "6", "--hessians", "few", "--out", "few-out", data=short)
    assert outcome.status == 0, outcome.err
    note = next(line for line in outcome.err.splitlines() if "held-out windows of 32 tokens, not 80" in line)
    tokens = RunDirectory.load(tmp_path / "few.sensitivity-3inst").read(TOKENS)
    measured, judged = len(tokens[TOKENS]), len(tokens[sensitivity.JUDGE_TOKENS])
    assert f"holds {measured + judged} held-out" in note
    assert 1 <= measured <= judged
    outcome = quantize("--bits", "2.5", "--samples", "500", "--hessians", "all", "--out", "all-out", data=short)
    assert outcome.status == 1
    assert "too few are left" in outcome.err
    assert "--heldout-data FILE" in outcome.err
    assert not list(tmp_path.glob("all-out*"))


def test_the_stream_of_blocks_is_the_model(tiny_model: Path) -> None:
    """Nothing is different with nothing changed, and changes are undone."""
    rows = torch.arange(64).reshape(4, 16) * 7
    reference = Reference(ModelSource.open(tiny_model), rows, Silent())
    assert not reference.divergence().any()
    name = "model.layers.1.mlp.up_proj.weight"
    before = reference.skeleton.model.get_parameter(name).clone()
    with reference.changed({name: torch.zeros_like(before)}):
        whole = reference.divergence()
    assert torch.equal(reference.skeleton.model.get_parameter(name), before)
    assert (whole > 0).all()
    reference.advance()
    assert not reference.divergence().any()
    with reference.changed({name: torch.zeros_like(before)}):
        assert torch.equal(reference.divergence(), whole)
