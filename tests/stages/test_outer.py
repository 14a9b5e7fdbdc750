"""Head and embedding through the whole pipeline, on tiny models whose vocabulary no 16 divides.

Oracles: the model with each matrix replaced by the stored one; the Hessian of the plain model; an undisturbed run; bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import qtipcli  # noqa: F401, registers the format
from qtipcli.errors import QtipError
from qtipcli.model.source import ModelSource
from qtipcli.nn.swap import packed_modules
from qtipcli.stages import calibrate, pack, quantize
from qtipcli.stages.progress import Silent
from stages.fixtures import Qtip
from stages.tiny import FAST_OPTIONS, VOCABULARY, logits, logits_of, one_thread, save_model, snapshot

SIZES = {"vocab_size": VOCABULARY + 3, "hidden_size": 48, "head_dim": 16}
KINDS = {"untied": "qwen2", "tied": "llama"}
OPTIONS = {"untied": ("--head-bits", "3", "--embedding-bits", "4"), "tied": ("--embedding-bits", "4")}
SHARDS = {"untied": ("head", "embedding"), "tied": ("embedding",)}


@pytest.fixture(scope="module", params=["untied", "tied"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(KINDS[kind], tmp_path_factory.mktemp("outer") / "model", SIZES)


@pytest.fixture(scope="module")
def done(kind: str, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model was quantized to `out`, with `out.job` and `hessians` beside it; read only."""
    from qtipcli.cli.main import _run

    where = tmp_path_factory.mktemp("done")
    said = ["--data", text, "--out", where / "out", "--hessians", where / "hessians"]
    with one_thread():
        assert _run([str(part) for part in ("quantize", model, *FAST_OPTIONS, *OPTIONS[kind], *said)]) == 0
    return where


def both_names(kind: str) -> set[str]:
    return {"model.embed_tokens"} | ({"lm_head"} if kind == "untied" else set())


def relative_loss(error: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


def test_what_is_packed_stands_for_the_original_matrices(kind: str, model: Path, done: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(done / "out", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    modules = packed_modules(packed)
    assert both_names(kind) <= modules.keys()
    head_II = load_file(done / "hessians" / "head.safetensors")["lm_head"]
    for name, module in modules.items():
        original = plain.get_submodule(name).weight.detach()
        if name in both_names(kind):
            metric_II = head_II if name == "lm_head" else torch.eye(48)
            # 3 and 4 bits cost .02 and .005 of the power at L = 16 (method.md, section 3); L is 8 here, and a tied matrix
            # is rounded for the head too.
            assert relative_loss(module.weight_dense() - original, original, metric_II) < 0.03
        plain.get_submodule(name).weight.data = module.weight_dense()
    torch.testing.assert_close(logits_of(packed), logits_of(plain), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(done / "out"), logits_of(packed))


def test_bits_per_weight_counts_them_and_the_report_names_them(kind: str, qtip: Qtip, done: Path) -> None:
    report = json.loads(qtip("inspect", done / "out", "--json").out)
    rows = {row["layer"]: row for row in report["rows"]}
    assert both_names(kind) <= rows.keys()
    assert report["not_converted"] == ({} if kind == "untied" else {"lm_head": "tied to model.embed_tokens, which is packed"})
    # By hand: 193 tile rows of 3 tiles at 4 bits, one fp16 scale for each of 3,075 tokens and 48 values.
    stored = 193 * 3 * 256 * 4 + 16 * (VOCABULARY + 3 + 48)
    embedding = rows["model.embed_tokens"]
    assert embedding["shape"] == [VOCABULARY + 3, 48]
    assert embedding["bits_per_weight"] == pytest.approx(stored / ((VOCABULARY + 3) * 48))
    assert embedding["transform"] == "full / block-16"
    weights = {name: row["shape"][0] * row["shape"][1] for name, row in rows.items()}
    average = sum(rows[name]["bits_per_weight"] * count for name, count in weights.items()) / sum(weights.values())
    assert report["bits_per_weight"] == pytest.approx(average, abs=5e-5)  # four decimals on disk
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(done / "out"))
    assert report["parameters"] == sum(parameter.numel() for parameter in plain.parameters())


def test_the_stored_hessian_is_that_of_the_plain_models_head(kind: str, model: Path, done: Path) -> None:
    tokens = load_file(done / "hessians" / "tokens.safetensors")["tokens"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        x_NI = plain.model(tokens).last_hidden_state.reshape(-1, 48).double()
    exact = x_NI.T @ x_NI / len(x_NI)
    stored = load_file(done / "hessians" / "head.safetensors")["lm_head"]
    assert float((stored - exact).norm() / exact.norm()) < 1e-5  # float32, through two blocks


def test_hessians_without_the_heads_get_it_from_their_tokens(
    kind: str, qtip: Qtip, model: Path, text: Path, done: Path, tmp_path: Path
) -> None:
    """As a directory from before there was one; its text is gone."""
    own = Path(shutil.copyfile(text, tmp_path / "text.txt"))
    said = ("--data", own, "--samples", "6", "--context", "32")
    assert qtip("calibrate", model, *said, "--out", "hessians").status == 0
    own.unlink()
    assert not (tmp_path / "hessians" / "head.safetensors").exists()
    with pytest.raises(QtipError, match="no Hessian of the head's input"):
        settings = quantize.QuantizeSettings(state_bits=8, embedding_bits=4, head_bits=3 if kind == "untied" else None)
        quantize.run(ModelSource.open(model), settings, tmp_path / "hessians", tmp_path / "job", watcher=Silent())
    shutil.rmtree(tmp_path / "job")
    command = ("quantize", model, "--state-bits", "8", *OPTIONS[kind], "--hessians", "hessians", "--out", "out")
    outcome = qtip(*command)
    assert outcome.status == 0, outcome.err
    assert "that of the head's input is added" in outcome.err
    added = (tmp_path / "hessians" / "head.safetensors").read_bytes()
    assert added == (done / "hessians" / "head.safetensors").read_bytes()
    weights = "out/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (done / weights).read_bytes()


def test_calibrate_records_it_on_request_and_goes_on_to_the_same(
    kind: str, qtip: Qtip, model: Path, text: Path, done: Path, tmp_path: Path
) -> None:
    command = ("calibrate", model, "--data", text, "--samples", "6", "--context", "32", "--out", "hessians", "--head")
    assert qtip(*command).status == 0
    ledger = tmp_path / "hessians" / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    outcome = qtip(*command)
    assert "1 of 3 done before" in outcome.err
    assert (tmp_path / "hessians" / "head.safetensors").read_bytes() == (done / "hessians" / "head.safetensors").read_bytes()


def test_a_job_that_lost_them_makes_the_same_bytes_again(kind: str, qtip: Qtip, model: Path, text: Path, done: Path) -> None:
    where = Path.cwd()
    shutil.copytree(done, where, dirs_exist_ok=True)
    oracle = snapshot(where / "out")
    shutil.rmtree(where / "out")
    ledger = where / "out.job" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in lines if json.loads(line)["key"] not in SHARDS[kind]))
    with pytest.raises(QtipError, match=f"not finished: the {SHARDS[kind][0]} is missing"):
        pack.run(ModelSource.open(model), where / "out.job", where / "out", watcher=Silent())
    command = ("quantize", model, *FAST_OPTIONS, *OPTIONS[kind], "--data", text, "--out", "out", "--hessians", "hessians")
    assert qtip(*command).status == 0
    assert snapshot(where / "out") == oracle


def test_the_blocks_are_packed_as_without_them(kind: str, qtip: Qtip, model: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "hessians", tmp_path / "hessians")
    assert qtip("quantize", model, "--state-bits", "8", "--hessians", "hessians", "--out", "out").status == 0
    without, with_them = (load_file(where / "out" / "model.safetensors") for where in (tmp_path, done))
    shared = {name for name in without if name.startswith("model.layers.")}
    assert len(shared) > 40
    assert all(torch.equal(without[name], with_them[name]) for name in shared)
    # A job without them is frozen as it was before there were such settings, so that old jobs go on.
    frozen = json.loads((tmp_path / "out.job" / "job.json").read_text())["settings"]
    assert not {"head_bits", "embedding_bits"} & frozen.keys()


def test_it_is_evaluated_generates_and_is_tuned(kind: str, qtip: Qtip, model: Path, text: Path, done: Path) -> None:
    held = ("--data", text, "--context", "32")
    outcome = qtip("eval", done / "out", "--base", model, *held, "--windows", "4", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["protocol"]["dtype"] == "float32"
    assert qtip("generate", done / "out", "--prompt", "def f", "--tokens", "3").status == 0
    tune = ("finetune", done / "out", "--base", model, *held, "--samples", "16", "--heldout", "4", "--batch", "4")
    refused = qtip(*tune, "--end-to-end", "--head-rate", "1e-3", "--out", "refused")
    assert refused.status == 1
    assert "no plain matrix" in refused.err
    outcome = qtip(*tune, "--end-to-end", "--out", "tuned", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["heldout_after"] < report["heldout_before"]
    before, after = (load_file(where / "model.safetensors") for where in (done / "out", Path("tuned")))
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert ("lm_head" in changed) == (kind == "untied")
    assert "model.embed_tokens" not in changed
    assert qtip("inspect", "tuned").status == 0


def test_a_config_that_ties_what_the_checkpoint_does_not_is_set_right(qtip: Qtip, text: Path, tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path / "model", SIZES)
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    options = ("--head-bits", "4", "--data", text, "--out", "out")
    outcome = qtip("quantize", model, *FAST_OPTIONS, *options)
    assert outcome.status == 0, outcome.err
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert packed_modules(packed).keys() >= {"lm_head"}
    assert not packed.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "changes", "option", "words"),
    [
        ("gemma3_text", {}, "--embedding-bits", ("model.embed_tokens", "Gemma3TextScaledWordEmbedding")),
        ("gemma3_text", {}, "--head-bits", ("token embedding", "--embedding-bits 4")),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_done(
    name: str, changes: dict, option: str, words: tuple[str, ...], qtip: Qtip, text: Path, tmp_path: Path
) -> None:
    save_model("llama", tmp_path / "llama", SIZES)
    sizes = AutoConfig.from_pretrained(tmp_path / "llama").to_dict() | {"layer_types": ["full_attention"] * 2} | changes
    known = {key: value for key, value in sizes.items() if key in ("intermediate_size", "num_hidden_layers", "layer_types",
             "num_attention_heads", "num_key_value_heads", *SIZES)}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **known)).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "llama" / file, tmp_path / "model" / file)
    outcome = qtip("quantize", "./model", *FAST_OPTIONS, option, "4", "--data", text, "--out", "out")
    assert outcome.status in (1, 2)
    assert "Traceback" not in outcome.err
    said = [line for line in outcome.err.splitlines() if line.startswith(("qtip: ", "  hint: "))]
    assert len(said) == 2
    assert all(word in "".join(said) for word in words), said
    assert {file.name for file in tmp_path.iterdir()} == {"llama", "model"}


def test_adding_the_heads_hessian_to_another_models_is_refused(packed: Path, tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path / "model")
    with pytest.raises(QtipError, match="calibrated on another model"):
        calibrate.add(ModelSource.open(model), packed / "hessians", head=True)
