"""The card, the evaluations and the other files of a packed directory.

Oracles: the base's own files and card, huggingface_hub's reading of a card, and the loopback server's rules for one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hub.loopback import card_errors
from huggingface_hub import ModelCard

from qtipcli.hub import card
from qtipcli.hub.published import model_name, published
from qtipcli.stages import inspect, pack
from qtipcli.stages.card import evaluations, record
from qtipcli.stages.finetune import original_of
from qtipcli.stages.packed import PackedDirectory
from stages.fixtures import Qtip

RESULT = {
    "perplexity": 12.345678,
    "perplexity_stderr": 0.25,
    "kl_mean": 0.0512345,
    "kl_stderr": 0.0021,
    "tokens": 12345,
    "bits_per_weight": 2.5,
    "top1_agreement": 0.9,
    "kl_p999": 0.7,
    "something_new": 0.125,
    "protocol": {"data": "held-out", "windows": 4, "context": 32, "base_dtype": None},
}
BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language:
- no
- en
tags: [mine]
pipeline_tag: fill-mask
---
# The base
"""


class Notes:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with everything that a repository may hold beside weights, and some that is no part of it."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "secret-place" / "base"))
    (base / "README.md").write_text(BASE_CARD)
    for name in (
        "LICENSE",
        "NOTICE.txt",
        "chat_template.jinja",
        "preprocessor_config.json",
        "additional_chat_templates/tool.jinja",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"{name}\n")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "onnx/notes.txt", "fp16/config.json", "fp16/x.txt", ".cache/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"{name}\n")
    return base


@pytest.fixture
def out(base: Path, packed: Path, qtip: Qtip, tmp_path: Path) -> Path:
    outcome = qtip("pack", base, packed / "out.job", "--out", tmp_path / "tiny-2bit")
    assert outcome.status == 0, outcome.err
    return tmp_path / "tiny-2bit"


def test_a_packed_directory_has_every_file_of_its_base_but_weights(out: Path, base: Path) -> None:
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names == {
        *("LICENSE", "NOTICE.txt", "chat_template.jinja", "preprocessor_config.json", "additional_chat_templates/tool.jinja"),
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("model.safetensors", "model.safetensors.index.json", "qtip.json", "README.md", ".qtip-local.json"),
    }
    for name in names - {"config.json", "README.md", "qtip.json", "model.safetensors.index.json", "model.safetensors"}:
        if not name.startswith("."):
            assert (out / name).read_bytes() == (base / name).read_bytes()
    recorded = json.loads((out / "qtip.json").read_text())["sha256"]
    assert "additional_chat_templates/tool.jinja" in recorded and not {"README.md", "qtip-eval.json"} & set(recorded)


def test_the_card_is_one_that_the_hub_reads(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert card_errors(text) == []
    fields = ModelCard.load(out / "README.md").data.to_dict()
    assert fields == {
        "base_model": "base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "language": ["no", "en"],  # `no` unquoted is false to YAML
        "tags": ["qtip", "quantized", "trellis", "2-bit"],
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert f"of {index['total_parameters']:,} parameters" in text
    assert "Calibration: text.txt; 6 windows of 32 tokens, seed 0" in text
    assert "| `model.layers.*.mlp.down_proj` | 2 | 3inst | 2 |" in text
    assert "Not measured yet: `qtip eval DIR --base base`" in text
    assert "# base-qtip-2bit\n" in text
    assert 'from_pretrained("base-qtip-2bit")' in text and "qtip generate base-qtip-2bit" in text


def test_no_file_says_where_the_users_files_are_but_the_one_that_is_never_published(
    out: Path, tmp_path: Path, text: Path
) -> None:
    record(out, str(tmp_path / "secret-place" / "base"), RESULT | {"protocol": {"data": str(text)}})
    published_files = pack.published_files(out)
    assert "qtip-eval.json" in published_files and ".qtip-local.json" not in published_files
    for file in published_files.values():
        content = file.read_bytes()
        assert b"secret-place" not in content and bytes(tmp_path) not in content and bytes(text.parent) not in content, file
    assert original_of(out) == str(tmp_path / "secret-place" / "base")
    (out / ".qtip-local.json").unlink()
    assert original_of(out) == "base"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/texts/a.txt", "a.txt"),
        ("../b.jsonl", "b.jsonl"),
        ("~/c.parquet", "c.parquet"),
        ("HuggingFaceFW/fineweb-edu:sample-10BT", "HuggingFaceFW/fineweb-edu:sample-10BT"),
        ({"data": "/x/y", "n": [1, None, "/z/w"]}, {"data": "y", "n": [1, None, "w"]}),
        ("*.v_proj", "*.v_proj"),
    ],
)
def test_paths_become_names(value: object, expected: object) -> None:
    assert published(value) == expected


def test_a_model_in_the_hubs_cache_has_its_hub_name(tmp_path: Path) -> None:
    assert model_name(tmp_path / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "abc") == "meta-llama/Llama-3.2-1B"
    assert model_name(tmp_path / "my-model") == "my-model"


@pytest.mark.parametrize("content", [None, "# no metadata\n", "---\n: [broken\n---\n", "---\n- list\n---\n"])
def test_a_base_without_a_licence_to_read_makes_a_card_without_one(
    content: str | None, base: Path, packed: Path, qtip: Qtip, tmp_path: Path
) -> None:
    (base / "README.md").unlink()
    if content is not None:
        (base / "README.md").write_text(content)
    outcome = qtip("pack", base, packed / "out.job", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert ("not taken over" in outcome.err) == (content is not None and content.startswith("---"))
    made = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(made.split("---")[1]) and "states no licence" in made and card_errors(made) == []


def test_an_evaluation_changes_the_figures_and_nothing_that_a_user_wrote(out: Path, base: Path, text: Path, qtip: Qtip) -> None:
    file = out / "README.md"
    own = file.read_text().replace("# base-qtip-2bit\n", "# My own title\n\nMy words.\n") + "\nMore of mine.\n"
    file.write_text(own)
    outcome = qtip("eval", out, "--base", base, "--data", text, "--context", "32", "--windows", "4", "--json")
    assert outcome.status == 0, outcome.err
    changed = file.read_text()
    kept = json.loads((out / "qtip-eval.json").read_text())["results"]
    assert len(kept) == 1 and kept[0]["base"] == "base" and kept[0]["protocol"]["data"] == "text.txt"
    for name, value in json.loads(outcome.out)["rows"][0].items():
        assert name == "protocol" or kept[0][name] == value
    assert f"| KL, largest | {kept[0]['kl_max']:.4g} |" in changed and "windows 4, context 32" in changed
    assert card.with_section(changed, card.FIGURES, card.figures([], "base")) == own
    assert qtip("inspect", out).status == 0


def test_another_protocol_is_another_column_and_the_same_one_takes_its_place(out: Path) -> None:
    record(out, None, RESULT)
    record(out, None, RESULT | {"protocol": RESULT["protocol"] | {"context": 64}})
    record(out, None, RESULT | {"perplexity": 11.0})
    record(out, "someone/base", RESULT | {"perplexity": 10.0})
    assert [(kept["perplexity"], kept["protocol"]["context"]) for kept in evaluations(out)] == [
        (12.345678, 64),
        (11.0, 32),
        (10.0, 32),
    ]
    text = (out / "README.md").read_text()
    assert "| | (1) | (2) | (3) |" in text
    assert "| perplexity | 12.35 ± 0.25 | 11.00 ± 0.25 | 10.00 ± 0.25 |" in text
    assert "| KL to the original, mean (nats) | 0.0512 ± 0.0021 |" in text
    assert "| KL, 99.9 % | 0.7 |" in text and "| something new | 0.125 |" in text  # a figure that the card does not know
    assert "stderr" not in text and "base dtype" not in text and "; against someone/base" in text


def test_a_card_without_its_marks_stays_as_it_is(out: Path) -> None:
    (out / "README.md").write_text("mine alone\n")
    notes = Notes()
    record(out, None, RESULT, notes)
    assert (out / "README.md").read_text() == "mine alone\n" and len(evaluations(out)) == 1
    assert "marks were removed" in notes.said[0]


def test_an_evaluation_that_cannot_be_kept_is_a_note(out: Path, text: Path, qtip: Qtip) -> None:
    (out / "qtip-eval.json").mkdir()  # what a read-only file system does for root, too: the file cannot be written
    outcome = qtip("eval", out, "--data", text, "--context", "32", "--windows", "2")
    assert outcome.status == 0 and "not kept with the model" in outcome.err and "perplexity" in outcome.out


def test_what_qtip_did_not_pack_gets_no_files(base: Path) -> None:
    before = sorted(base.rglob("*"))
    record(base, None, RESULT)
    record("someone/model", None, RESULT)
    assert sorted(base.rglob("*")) == before


def test_a_tuned_model_has_a_card_of_its_own(out: Path, tmp_path: Path) -> None:
    record(out, None, RESULT)
    tuning = {
        "data": "/home/me/tune.txt",
        "context": 32,
        "seed": 3,
        "end_to_end": {"batch": 4},
        "blocks": None,
        "heldout_before": 0.5,
        "heldout_after": 0.25,
    }
    PackedDirectory(out).write_changed(tmp_path / "tuned", {}, {"finetune": tuning}, {"finetune": {"settings": tuning}})
    tuned = tmp_path / "tuned"
    text = (tuned / "README.md").read_text()
    assert "Fine-tuning: scales and norms, end to end, on tune.txt; windows of 32 tokens, seed 3" in text
    assert "0.5 -> 0.25 nats" in text and "fine-tuned" in ModelCard(text).data.tags
    assert ModelCard(text).data.license == "other" and card_errors(text) == []
    assert "Calibration: text.txt" in text
    assert not evaluations(tuned) and "Not measured yet" in text
    assert (tuned / "additional_chat_templates" / "tool.jinja").is_file()
    assert inspect.run(tuned)["checksums"] == inspect.run(out)["checksums"]
    assert not any(b"/home/me" in file.read_bytes() for file in pack.published_files(tuned).values())
