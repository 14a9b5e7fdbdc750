"""Tests of --max-memory, --limit-blocks, and memory that runs out in one layer. Oracle: the bytes of a job without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtipcli.errors import SettingsError
from qtipcli.quant.batches import InBatches
from qtipcli.stages import dry_run, fitting, rounder
from qtipcli.stages.fitting import Fit, fit
from qtipcli.stages.memory import Sizes
from qtipcli_kernels.dispatch import encode
from stages.fixtures import Qtip
from stages.tiny import FAST_OPTIONS, snapshot

CPU = torch.device("cpu")


def phases(memory_gib: float) -> dict[str, dict[str, int]]:
    """Of a job that holds up to 4 GiB of activations beside 2 GB."""
    return {"ram": {"calibrate, inputs of a block": int(2e9 + memory_gib * 2**30), "pack": 10}, "vram": {}}


@pytest.mark.parametrize(("limit", "gib"), [(10e9, 4.0), (6.2e9, 2.0), (3.2e9, 1.0), (2.01e9, 0.0)])
def test_the_most_activations_that_fit_stay_in_memory(limit: float, gib: float) -> None:
    assert fit(phases, int(limit), CPU) == Fit(gib, int(2e9 + gib * 2**30), "calibrate, inputs of a block")


def test_what_cannot_fit_is_refused_with_what_takes_the_most() -> None:
    with pytest.raises(SettingsError) as caught:
        fit(phases, int(1.9e9), CPU)
    assert "1,900 MB is too little: this job takes about 2,000 MB, in the phase 'calibrate, inputs" in caught.value.message
    assert caught.value.hint == "give 2,000 MB or more; a shorter --context takes less on its way through a block"


def test_a_gpu_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 5_000_000)
    with pytest.raises(SettingsError, match="5 MB free on cuda are too little: this job takes about 6 MB"):
        fit(lambda gib: {"ram": {"a": 1}, "vram": {"pack": 6_000_000}}, 10, torch.device("cuda"))


@pytest.mark.parametrize(("free", "expected"), [(100 * 2**30, 4.0), (2 * 2**30, 0.5)])
def test_without_a_limit_a_quarter_of_what_is_free_is_used(monkeypatch, free: int, expected: float) -> None:
    monkeypatch.setattr(fitting, "free_bytes", lambda device: free)
    assert fitting.default_memory_gib() == expected


def test_remedies_belong_to_phases_that_there_are(quantize: Qtip) -> None:
    said = json.loads(quantize("--dry-run", "--json").out)["ram"]
    for start in fitting.REMEDIES:
        assert any(phase.startswith(start) for phase in said), start


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_too_little_memory_is_refused_before_anything_is_written(
    qtip: Qtip, tiny_model: Path, text: Path, tmp_path: Path, command: str
) -> None:
    options = FAST_OPTIONS if command == "quantize" else ["--samples", 4, "--context", 32]
    outcome = qtip(command, tiny_model, *options, "--data", text, "--out", "out", "--max-memory", "50MB")
    assert outcome.status == 2
    assert "--max-memory 50 MB is too little" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_limit_is_no_setting_of_the_job(quantize: Qtip, tmp_path: Path) -> None:
    assert quantize("--out", "plain", "--hessians", "h1").status == 0
    limited = quantize("--out", "limited", "--hessians", "h2", "--max-memory", "20GB")
    assert limited.status == 0
    assert "memory: about" in limited.err
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "limited")
    for one, other in (("h1", "h2"), ("plain.job", "limited.job")):
        settings = [json.loads((tmp_path / name / "job.json").read_text())["settings"] for name in (one, other)]
        assert settings[0] == settings[1]


def test_activations_in_files_give_the_same_bytes(quantize: Qtip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize("--out", "plain", "--hessians", "h1").status == 0
    monkeypatch.setattr(dry_run, "fit_quantize", lambda *arguments: Fit(0.0, 1, "all"))
    filed = quantize("--out", "filed", "--hessians", "h2", "--max-memory", "1GB")
    assert filed.status == 0
    assert filed.err.count("activations go to a file") == 3  # calibration, its way back, the quantized prefix
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "filed")
    for one in (tmp_path / "h1").glob("*.safetensors"):
        assert one.read_bytes() == (tmp_path / "h2" / one.name).read_bytes()


def test_a_pack_that_takes_more_is_refused(qtip: Qtip, quantize: Qtip, tiny_model: Path, tmp_path: Path) -> None:
    assert quantize("--out", "out", "--no-pack").status == 0
    packed = ["pack", tiny_model, "out.job", "--out", "packed", "--max-memory"]
    assert qtip(*packed, "10MB").status == 2
    assert not (tmp_path / "packed").exists()
    assert qtip(*packed, "20GB").status == 0


def test_reading_counts_where_something_is_read() -> None:
    sizes = Sizes(1, 0, 0, 0, 0, 0, 0, read=100, block_read=7)
    assert sizes.reading("calibrate, in front of the blocks") == 0, "which counts it"
    assert sizes.reading("quantize, lm_head") == 100
    assert sizes.reading("quantize, rounding of a group") == 7


@pytest.mark.parametrize("sides", ["--one-sided", "--two-sided"])
def test_a_job_limited_to_its_first_block_goes_on_to_the_same_bytes(quantize: Qtip, tmp_path: Path, sides: str) -> None:
    assert quantize("--out", "whole", "--hessians", "h1", sides).status == 0
    first = quantize("--out", "out", "--hessians", "h2", sides, "--limit-blocks", 1)
    assert (first.status, first.out.strip()) == (0, "out.job")
    assert "the first 1 of 2 blocks are rounded: the same command without --limit-blocks goes on" in first.err
    shards = sorted(path.name for path in (tmp_path / "h2").glob("*-0000*.safetensors"))
    assert shards == ["block-00000.safetensors"] + (["outputs-00000.safetensors"] if sides == "--two-sided" else [])
    assert [path.name for path in (tmp_path / "out.job").glob("*.safetensors")] == ["block-00000.safetensors"]
    assert not (tmp_path / "out").exists()
    assert quantize("--out", "out", "--hessians", "h2", sides).status == 0
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "out")
    for one in (tmp_path / "h1").glob("*.safetensors"):
        assert one.read_bytes() == (tmp_path / "h2" / one.name).read_bytes()


def test_a_limited_job_is_not_packed(qtip: Qtip, quantize: Qtip, tiny_model: Path, tmp_path: Path) -> None:
    assert quantize("--out", "out", "--limit-blocks", 1).status == 0
    outcome = qtip("pack", tiny_model, "out.job", "--out", "packed")
    assert outcome.status == 1
    assert not (tmp_path / "packed").exists()


def test_a_limit_beyond_the_last_block_is_none(quantize: Qtip, tmp_path: Path) -> None:
    assert quantize("--out", "out", "--limit-blocks", 99).status == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_measured_allocation_is_not_limited(quantize: Qtip) -> None:
    outcome = quantize("--out", "out", "--bits", "2.4", "--limit-blocks", 1)
    assert outcome.status == 2
    assert "a measured allocation looks at all blocks" in outcome.err


Failing = Callable[[int], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Makes the stage's encoder run out of memory for more than so many tiles."""

    def install(room: int) -> None:
        def small(tiles, spec, table, fast=False):
            if len(tiles) > room:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12")
            return encode(tiles, spec, table, fast)

        monkeypatch.setattr(rounder, "InBatches", lambda smaller: InBatches(smaller, small))

    return install


def test_a_layer_that_does_not_fit_is_rounded_in_smaller_batches(quantize: Qtip, failing: Failing, tmp_path: Path) -> None:
    assert quantize("--out", "plain", "--hessians", "h").status == 0
    failing(17)
    outcome = quantize("--out", "small", "--hessians", "h")
    assert outcome.status == 0
    assert "model.layers.0.self_attn.q_proj: memory ran out, so that tiles are encoded" in outcome.err
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "small")


def test_a_layer_that_does_not_fit_at_all_is_named_and_finished_blocks_are_kept(
    quantize: Qtip, failing: Failing, tmp_path: Path
) -> None:
    assert quantize("--out", "plain", "--hessians", "h").status == 0
    assert quantize("--out", "out", "--hessians", "h", "--limit-blocks", 1).status == 0
    failing(0)
    outcome = quantize("--out", "out", "--hessians", "h")
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
    assert "memory ran out at model.layers.1.self_attn.q_proj: rounding it takes about" in outcome.err
    assert "finished blocks are kept" in outcome.err
    assert (tmp_path / "out.job/block-00000.safetensors").is_file()
    assert not (tmp_path / "out.job/block-00001.safetensors").exists()
    failing(10**6)
    assert quantize("--out", "out", "--hessians", "h").status == 0
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "out")


def test_memory_that_runs_out_elsewhere_is_no_traceback(quantize: Qtip, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qtipcli.stages.calibrate.forward", full)
    outcome = quantize("--out", "out")
    assert (outcome.status, "memory ran out" in outcome.err, "Traceback" in outcome.err) == (1, True, False)
