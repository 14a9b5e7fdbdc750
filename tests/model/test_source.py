"""What a model directory must be, and what is said about one that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from qtipcli.errors import CorruptError, QtipError
from qtipcli.model import source as source_module
from qtipcli.model.source import INDEX_FILE, SINGLE_FILE, ModelSource, check_finite

from .tiny_models import save

Checkpoint = Callable[[str], Path]


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A Llama checkpoint that the test may damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "tiny-llama"))


def refusal(name: str | Path, **how: object) -> QtipError:
    with pytest.raises(QtipError) as caught:
        ModelSource.open(name, **how)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tensors_are_read_as_stored(checkpoint: Checkpoint) -> None:
    directory = checkpoint("llama")
    stored = load_file(directory / SINGLE_FILE)  # the oracle
    source = ModelSource.open(directory)
    assert set(source.tensor_names) == set(stored)
    assert source.shards == [directory / SINGLE_FILE]
    for name, tensor in stored.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "sharded", max_shard_size="20KB")
    source = ModelSource.open(directory)
    assert len(source.shards) > 2
    assert source.shards == sorted(directory.glob("*.safetensors"))
    everything = {name: tensor for shard in source.shards for name, tensor in load_file(shard).items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in everything.items())


def test_the_slug_is_a_file_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = copy.rename(copy.with_name("a model: (v2)"))
    assert ModelSource.open(odd).slug == "a-model-v2"
    monkeypatch.chdir(odd)
    assert ModelSource.open(".").slug == "a-model-v2"


def test_a_near_folder_is_suggested(copy: Path) -> None:
    error = refusal(copy.with_name("tiny-lama"))
    assert "does not exist" in error.message
    assert error.hint == f"did you mean {copy}?"


def test_a_file_is_not_a_model(copy: Path) -> None:
    assert refusal(copy / "config.json").hint.endswith(str(copy))


def test_a_directory_above_the_model_is_told_apart(copy: Path) -> None:
    error = refusal(copy.parent)
    assert "config.json" in error.message
    assert error.hint == f"did you mean {copy}?"


@pytest.mark.parametrize(
    ("leftover", "fact", "remedy"),
    [
        (None, "no weights", "download"),
        ("pytorch_model.bin", "pickled weights (pytorch_model.bin)", "convert"),
        ("consolidated.pt", "pickled weights (consolidated.pt)", "convert"),
        ("weights.safetensors", "only weights.safetensors", "rename"),
    ],
)
def test_a_directory_without_safetensors_weights(copy: Path, leftover: str | None, fact: str, remedy: str) -> None:
    (copy / SINGLE_FILE).unlink()
    if leftover:
        (copy / leftover).write_bytes(b"anything")
    error = refusal(copy)
    assert fact in error.message
    assert remedy in error.hint


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda whole: whole[:-1], "truncated or damaged"),
        (lambda whole: whole[:4], "truncated or damaged"),
        (lambda whole: b"", "truncated or damaged"),
        (lambda whole: whole[:8] + b"[" + whole[9:], "truncated or damaged"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
    ids=["last byte missing", "only four bytes", "empty", "flipped header", "pointer"],
)
def test_a_damaged_shard_is_named(copy: Path, damage: Callable[[bytes], bytes], fact: str) -> None:
    shard = copy / SINGLE_FILE
    shard.write_bytes(damage(shard.read_bytes()))
    error = refusal(copy)
    assert isinstance(error, CorruptError)
    assert str(shard) in error.message
    assert fact in error.message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(directory.glob("*.safetensors"))
    for shard in shards[1:3]:
        shard.unlink()
    error = refusal(directory)
    assert shards[1].name in error.message
    assert "1 more" in error.message


@pytest.mark.parametrize(
    ("index", "fact"),
    [
        ({"weight_map": {"w": "../elsewhere.safetensors"}}, "outside the model directory: ../elsewhere.safetensors"),
        ({"weight_map": {"w": "/etc/passwd"}}, "outside the model directory: /etc/passwd"),
        ({"weight_map": {"w": "model.safetensors"}}, "does not hold w"),
        ({"weight_map": {"w": 3}}, "no weight_map"),
        ({"metadata": {}}, "no weight_map"),
        ([], "no JSON object"),
    ],
)
def test_a_bad_index_is_refused(copy: Path, index: object, fact: str) -> None:
    (copy / INDEX_FILE).write_text(json.dumps(index))
    assert fact in refusal(copy).message


def test_a_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "is not JSON" in refusal(copy).message


def test_a_model_type_that_transformers_does_not_know(copy: Path) -> None:
    edit_config(copy, model_type="from-the-future")
    assert "from-the-future" in refusal(copy).message


def test_the_models_own_code_is_not_run_unasked(copy: Path) -> None:
    canary = copy / "ran"
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nfrom transformers import LlamaConfig as C\n"
    (copy / "own.py").write_text(code)
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.C"})
    assert "trust" in refusal(copy).hint
    assert not canary.exists()


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_an_already_quantized_model_names_its_method(copy: Path, where: str) -> None:
    stated = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    edit_config(copy, **(stated if where == "top" else {where: stated}))
    error = refusal(copy)
    assert "already quantized (awq)" in error.message
    assert "original model" in error.hint


def test_fp8_weights_are_quantized_weights(copy: Path) -> None:
    tensors = load_file(copy / SINGLE_FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, copy / SINGLE_FILE)
    assert name in refusal(copy).message


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertModel"]},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
    ids=lambda config: config["architectures"][0],
)
def test_what_does_not_predict_the_next_token(copy: Path, config: dict) -> None:
    edit_config(copy, **config)
    error = refusal(copy)
    assert "not a causal language model" in error.message
    assert config["architectures"][0] in error.message


def test_a_hub_download_takes_the_indexed_weights_and_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save("llama", tmp_path / "0123456789abcdef", max_shard_size="20KB")
    asked: list[tuple[str | None, list[str]]] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: object = None) -> str:
        assert name == "org/tiny"
        asked.append((revision, allow_patterns))
        return str(directory)

    monkeypatch.setattr(source_module, "snapshot_download", snapshot)
    source = ModelSource.open("org/tiny", revision="main")
    assert source.slug == "org--tiny"
    (first_revision, small), (second_revision, everything) = asked
    assert first_revision == "main"
    assert second_revision == directory.name  # the commit that the first answer is of
    weights = [pattern for pattern in everything if pattern not in small]
    assert weights == [shard.name for shard in source.shards]
    assert not {"*", "*.bin", "*.pt", "*.py", "*.safetensors"} & {*small, *everything}


def test_an_unreachable_hub_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("internals\nof the client")

    monkeypatch.setattr(source_module, "snapshot_download", snapshot)
    error = refusal("org/tiny", revision="v1")
    assert error.message == "org/tiny at revision v1 is not in the local cache and the Hugging Face Hub cannot be reached"


def test_a_name_that_cannot_be_a_hub_id() -> None:
    assert "neither a local directory nor a possible Hub id" in refusal("a model").message


def test_a_local_directory_has_no_revision(copy: Path) -> None:
    assert refusal(copy, revision="main").exit_code == 2


def test_bad_weights_are_counted_and_named() -> None:
    tensor = torch.zeros(40, 50)
    check_finite("fine", tensor)
    check_finite("whole numbers", torch.zeros(3, dtype=torch.int64))
    tensor[3, 7] = float("nan")
    tensor[4, :2] = float("-inf")
    with pytest.raises(CorruptError, match=r"layers\.3\.up holds 3 values that are NaN or infinite, of 2,000"):
        check_finite("layers.3.up", tensor)
