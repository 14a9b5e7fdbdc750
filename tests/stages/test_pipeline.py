"""The pipeline on tiny models: what is packed is what was rounded, nothing is done twice, and no kill changes the result.

Oracles: the model with each linear replaced by the stored matrix; an undisturbed run; bytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qtipcli  # noqa: F401, registers the format
from qtipcli.nn.linear import TrellisLinear
from qtipcli.stages import pack
from stages.fixtures import Qtip
from stages.tiny import VOCABULARY, environment, logits, logits_of, save_model, snapshot

FRESH = """
import sys, torch
torch.set_num_threads(1)
import qtipcli
from safetensors.torch import save_file
from stages.tiny import logits
save_file({path.rpartition("/")[2]: logits(path) for path in sys.argv[2:]}, sys.argv[1])
"""


def test_a_fresh_process_computes_the_same_bits(quantize: Qtip, tmp_path: Path) -> None:
    here = {}
    for kind in ("llama", "qwen2"):
        model = save_model(kind, tmp_path / f"{kind}-model")
        assert quantize("--out", kind, "--bits", "4", "--hessians", f"{kind}-hessians", model=model).status == 0
        here[kind] = logits(tmp_path / kind)
        plain = logits(model)
        assert 0 < float((here[kind] - plain).std() / plain.std()) < 0.5
    program = [sys.executable, "-c", FRESH, tmp_path / "logits", *(tmp_path / kind for kind in here)]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fresh = load_file(tmp_path / "logits")
    for kind, expected in here.items():
        assert torch.equal(fresh[kind], expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_layers_stand_for_the_original_weights(kind: str, quantize: Qtip, tmp_path: Path) -> None:
    """Padding (an intermediate size of 100), biases (qwen2) and a tied head (llama)."""
    model = save_model(kind, tmp_path / "model")
    # Corrected for inputs that are not the original's, layers are not near the original ones, and need not be.
    assert quantize("--out", "out", "--bits", "8", "--original-prefix", "--one-sided", model=model).status == 0
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, TrellisLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        original = plain.get_submodule(name)
        assert float((layer.weight_dense() - original.weight).square().mean() / original.weight.square().mean()) < 3e-3
        assert (layer.bias is None) == (original.bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, original.bias)
        original.weight.data = layer.weight_dense()
    torch.testing.assert_close(logits_of(packed), logits_of(plain), rtol=1e-3, atol=1e-3)
    kept = {name: value for name, value in packed.state_dict().items() if name.rpartition(".")[0] not in layers}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in kept.items())
    is_tied = packed.lm_head.weight.data_ptr() == packed.model.embed_tokens.weight.data_ptr()
    assert is_tied == (kind == "llama")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (kind == "qwen2")
    assert packed.lm_head.weight.shape == (VOCABULARY, 64)


def test_the_same_command_again_does_nothing(quantize: Qtip, tmp_path: Path) -> None:
    assert quantize("--out", "out").status == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    outcome = quantize("--out", "out")
    assert outcome.status == 0
    assert "nothing was done" in outcome.err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == before


def test_the_same_settings_elsewhere_give_the_same_bytes(quantize: Qtip, packed: Path, tmp_path: Path) -> None:
    assert quantize("--out", "elsewhere").status == 0
    assert snapshot(tmp_path / "elsewhere") == snapshot(packed / "out")


def test_another_bitrate_reuses_the_hessians(qtip: Qtip, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    before = snapshot(packed / "hessians")
    # No data and no samples said: those of the Hessians stand, and their text need not be there any more.
    outcome = qtip(
        "quantize", tiny_model, "--bits", "3", "--state-bits", "8", "--hessians", packed / "hessians", "--out", "out"
    )
    assert outcome.status == 0, outcome.err
    assert "Hessians" in outcome.err
    assert "calibrate" not in outcome.err
    assert snapshot(packed / "hessians") == before
    report = qtip("inspect", "out", "--json").out
    assert {row["bits"] for row in json.loads(report)["rows"]} == {3.0}


def test_force_keeps_good_hessians(qtip: Qtip, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    before = snapshot(tmp_path / "hessians")
    options = ("--bits", "3", "--state-bits", "8", "--hessians", "hessians", "--out", "out", "--force")
    outcome = qtip("quantize", tiny_model, *options)
    assert outcome.status == 0, outcome.err
    assert snapshot(tmp_path / "hessians") == before


def test_steps_one_by_one_give_what_one_command_gives(
    qtip: Qtip, quantize: Qtip, packed: Path, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    said = ("--data", text, "--samples", "6", "--context", "32")
    assert qtip("calibrate", tiny_model, *said, "--out", "hessians").status == 0
    assert snapshot(tmp_path / "hessians").keys() == snapshot(packed / "hessians").keys()
    outcome = quantize("--out", "out", "--hessians", "hessians", "--no-pack")
    assert outcome.status == 0
    assert outcome.out == "out.job\n"
    assert not (tmp_path / "out").exists()
    assert qtip("pack", tiny_model, "out.job", "--out", "out").status == 0
    assert snapshot(tmp_path / "out") == snapshot(packed / "out")


def test_layers_can_be_skipped_or_given_other_bits(quantize: Qtip, tmp_path: Path) -> None:
    options = ("--skip", "*.0.*v_proj", "--layer", "*down_proj=4", "--layer", "*.o_proj=1:1mad")
    outcome = quantize("--out", "out", *options, "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["not_converted"]["model.layers.0.self_attn.v_proj"] == "skipped by the settings"
    bits = {row["layer"]: (row["bits"], row["code"]) for row in report["rows"]}
    assert len(bits) == 13
    assert bits["model.layers.1.mlp.down_proj"] == (4.0, "3inst")
    assert bits["model.layers.0.self_attn.o_proj"] == (1.0, "1mad")
    assert bits["model.layers.0.mlp.up_proj"] == (2.0, "3inst")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear


def test_a_block_transform_is_stored_and_loads(quantize: Qtip, tmp_path: Path) -> None:
    assert quantize("--out", "out", "--transform", "block-16", "--bits", "4").status == 0
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).model.layers[0].mlp.down_proj
    assert str(layer.layout.transform_in) == str(layer.layout.transform_out) == "block-16"
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_quantized_prefix_changes_later_blocks_and_resumes_to_the_same(quantize: Qtip, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "hessians", tmp_path / "hessians")
    options = ("--hessians", "hessians", "--quantized-prefix")
    assert quantize("--out", "plain", "--hessians", "hessians", "--original-prefix").status == 0
    assert quantize("--out", "out", *options).status == 0
    changed, original = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    # The first layers see the original's own input; every other one sees what the rounded ones made of it.
    assert torch.equal(changed["model.layers.0.self_attn.q_proj.trellis"], original["model.layers.0.self_attn.q_proj.trellis"])
    for name in ("model.layers.0.self_attn.o_proj.trellis", "model.layers.1.self_attn.q_proj.trellis"):
        assert not torch.equal(changed[name], original[name])
    oracle = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    ledger = tmp_path / "out.job" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    outcome = quantize("--out", "out", *options)
    assert "1 of 2 done before" in outcome.err
    assert snapshot(tmp_path / "out") == oracle


def test_calibration_resumes_to_the_same_hessians(qtip: Qtip, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    command = ("calibrate", tiny_model, "--data", text, "--samples", "6", "--context", "32", "--out", "hessians")
    assert qtip(*command).status == 0
    oracle = load_file(tmp_path / "hessians" / "block-00001.safetensors")
    ledger = tmp_path / "hessians" / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    assert "1 of 2 done before" in qtip(*command).err
    again = load_file(tmp_path / "hessians" / "block-00001.safetensors")
    assert again.keys() == oracle.keys()
    assert all(torch.equal(again[name], oracle[name]) for name in oracle)


def test_several_shards_in_and_out(qtip: Qtip, quantize: Qtip, packed: Path, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model", max_shard_size="300KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    assert quantize("--out", "out", model=model).status == 0
    assert snapshot(tmp_path / "out")["model.safetensors"] == snapshot(packed / "out")["model.safetensors"]
    assert qtip("pack", model, "out.job", "--out", "small", "--max-shard-size", "50KB").status == 0
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert qtip("inspect", "small").status == 0
    assert torch.equal(logits(tmp_path / "small"), logits(tmp_path / "out"))


def test_a_kill_while_a_directory_is_replaced_leaves_nothing(
    quantize: Qtip, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def killed(path: Path, target: Path) -> None:
        real(path, target)
        raise SystemExit  # between the two renames: the old directory is away, the new one is not there

    real = Path.rename
    monkeypatch.setattr(pack.Path, "rename", killed)
    with pytest.raises(SystemExit):
        quantize("--out", "out", "--force")
    monkeypatch.setattr(pack.Path, "rename", real)
    assert (tmp_path / "out.replaced" / "old").exists()
    assert quantize("--out", "out", "--force").status == 0
    assert snapshot(tmp_path / "out") == snapshot(packed / "out")
    assert {file.name for file in tmp_path.iterdir() if file.name.startswith("out")} == {"out", "out.job"}


def kill_jobs(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "stages.kills", *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_jobs_killed_at_random_moments_end_in_the_same_bytes() -> None:
    report = kill_jobs("--kills", "8", "--warm")
    assert report["differing"] == 0, report
    assert len(report["reached"]) >= 2, "the kills must hit the job at work"


@pytest.mark.slow
def test_a_hundred_jobs_killed_at_random_moments_end_in_the_same_bytes() -> None:
    report = kill_jobs("--kills", "100")
    assert report["differing"] == 0, report


def test_a_tampered_scale_is_found_even_with_its_checksum_gone(qtip: Qtip, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "out", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scale_in"][3] = float("nan")
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "qtip.json").unlink()
    outcome = qtip("inspect", "out")
    assert outcome.status == 1
    assert "model.layers.0.mlp.up_proj.scale_in" in outcome.err
