"""Files that lie: headers, names, links, JSON, text that a terminal obeys. The promises: docs/format.md, section 9."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from qtipcli.cli.display import Display, print_table
from qtipcli.cli.main import _run
from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub import card
from qtipcli.hub.tensors import check_tensors
from qtipcli.job.header import build_header, read_header
from qtipcli.job.ledger import Ledger
from qtipcli.job.shards import open_shard
from qtipcli.model.source import ModelSource, index_weight_map
from qtipcli.stages import inspect, pack, push
from qtipcli.untrusted import is_inside, led_out, parse_json, read_table

SOURCES = Path(__file__).parents[2]
FORBIDDEN = (
    r"torch\.load\(",
    r"\bimport pickle\b|\bpickle\.",
    r"(?<![\w.])(eval|exec)\(",
    r"yaml\.(unsafe_|full_)?load\((?!.*(Base|Safe)Loader)",
)
INDEX = "model.safetensors.index.json"


def change(file: Path, *path: str, value: Any) -> None:
    content = json.loads(file.read_text())
    table = content
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    file.write_text(json.dumps(content))


# No code


def test_nothing_in_the_project_unpickles_or_executes() -> None:
    forbidden = re.compile("|".join(FORBIDDEN))
    found = [
        f"{file.name}:{number}"
        for folder in ("src", "kernels")
        for file in (SOURCES / folder).rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert not found


def test_pickled_weights_in_the_place_of_a_shard_are_not_opened(packed: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (packed / "evil.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(canary).encode())
    index = json.loads((packed / INDEX).read_text())
    change(packed / INDEX, "weight_map", value=dict.fromkeys(index["weight_map"], "evil.bin"))
    with pytest.raises(QtipError, match="never pickled"):
        inspect.run(packed)
    with pytest.raises(QtipError, match="never pickled"):
        AutoModelForCausalLM.from_pretrained(packed)
    assert not canary.exists()


# Names and links


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.safetensors", "a/../../b", "..", "", "a\\b", "a\0b", "//a"])
def test_names_that_lead_out(name: str, tmp_path: Path) -> None:
    assert not is_inside(name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptError, match="outside the model directory"):
        index_weight_map(tmp_path / INDEX)


def test_names_that_stay() -> None:
    assert all(map(is_inside, ["a.safetensors", "sub/a.safetensors", "..a", "a..b"]))


def test_an_index_cannot_make_transformers_read_a_neighbour(packed: Path, valid_directories: Path) -> None:
    """transformers joins the index's names to the directory and opens whatever that is."""
    name = sorted(packed.glob("*.safetensors"))[0].name
    (packed / name).rename(packed.parent / name)
    index = json.loads((packed / INDEX).read_text())["weight_map"]
    change(packed / INDEX, "weight_map", value={key: f"../{file}" if file == name else file for key, file in index.items()})
    change(packed / "qtip.json", "sha256", value={})
    for load in (AutoModelForCausalLM.from_pretrained, inspect.run):
        with pytest.raises(CorruptError, match="outside the model directory"):
            load(packed)


def test_a_record_cannot_make_inspect_read_elsewhere(packed: Path) -> None:
    change(packed / "qtip.json", "sha256", "../../etc/passwd", value="00")
    with pytest.raises(CorruptError, match="outside the model directory"):
        inspect.run(packed)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.txt"
    file.write_text("the user's own\n")
    return file


def test_links_out_are_not_published(packed: Path, secret: Path) -> None:
    (packed / "notes.txt").symlink_to(secret)
    with pytest.raises(QtipError, match=r"notes\.txt is a link out of the model's directory"):
        push._local_files(packed, "someone/model", None)


def test_links_out_of_a_source_are_not_copied(valid_directories: Path, tmp_path: Path, secret: Path) -> None:
    source = Path(shutil.copytree(valid_directories / "source", tmp_path / "source"))
    (source / "notes.txt").symlink_to(secret)
    with pytest.raises(QtipError, match=r"notes\.txt is a link out"):
        pack.run(ModelSource.open(source), valid_directories / "job", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_the_directory_and_to_the_cache_s_own_blobs_stay_inside(tmp_path: Path, secret: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("x")
    (tmp_path / "models--c--d" / "blobs").mkdir(parents=True)
    (tmp_path / "models--c--d" / "blobs" / "y").write_text("y")
    for name, target in {
        "own": "../../blobs/x",
        "other": "../../../models--c--d/blobs/y",
        "secret": secret,
        "near": "own",
    }.items():
        (snapshot / name).symlink_to(target)
    assert led_out(snapshot / "own", snapshot) is None
    assert led_out(snapshot / "near", snapshot) is None
    assert led_out(snapshot / "secret", snapshot) == secret.resolve()
    assert led_out(snapshot / "other", snapshot) is not None
    # The same links in a directory that is no snapshot.
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "own").symlink_to(blobs / "x")
    assert led_out(tmp_path / "plain" / "own", tmp_path / "plain") is not None


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_regular_file_is_not_waited_for(kind: str, packed: Path) -> None:
    shard = sorted(packed.glob("*.safetensors"))[0]
    for file in (shard, packed / "qtip.json"):
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        else:
            file.mkdir()
    with pytest.raises(QtipError, match=r"no regular file|is a directory"):
        inspect.run(packed)
    with pytest.raises(QtipError, match=r"no regular file|is a directory"):
        read_header(shard)


# Headers


def safetensors(path: Path, content: Any, tensors: bytes = b"", length: int | None = None) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + tensors)
    return path


def entry(dtype: str, shape: list[Any], first: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


LIES: list[Any] = [
    {"a": entry("F32", [10**15], 0, 8)},
    {"a": entry("F32", [2**63, 2**63], 0, 8)},
    {"a": entry("F32", [10**15], 0, 4 * 10**15)},
    {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)},
    {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 5, 9)},
    {"a": entry("F32", [2], 8, 0)},
    {"a": entry("F32", [-2], 0, 8)},
    {"a": entry("F32", [2.0], 0, 8)},
    {"a": entry("F32", [2], 0, True)},
    {"a": entry("F32", "2", 0, 8)},
    {"a": entry(["F32"], [2], 0, 8)},
    {"a": entry("F32", [2], 0, 1e400)},
    {"a": {"dtype": "F32", "shape": [2]}},
    {"a": 3},
    {"__metadata__": {"a": 1}},
    {"__metadata__": [["a", "b"]]},
    [],
    b"[" * 10_000,
b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}',
    b'{"\\ud800": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}',
    b"\xff\xfe",
    b"",
]  # fmt: skip
"""Headers before 8 bytes of tensors. The first two are right but for shapes that do not fit: what opens a tensor sees it."""


@pytest.mark.parametrize("content", LIES)
def test_headers_that_lie_to_what_checks_a_packed_model(content: Any, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", content, bytes(8))
    with pytest.raises(CorruptError, match=r"a\.safetensors"), open_shard(path):
        check_tensors({}, [path])


@pytest.mark.parametrize("content", LIES[2:])
def test_headers_that_lie_to_our_own_reader(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"a\.safetensors"):
        read_header(safetensors(tmp_path / "a.safetensors", content, bytes(8)))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 10**15])
def test_header_lengths_that_lie(length: int, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", {"a": entry("U8", [8], 0, 8)}, bytes(8), length)
    for read in (read_header, lambda path: check_tensors({}, [path])):
        with pytest.raises(CorruptError, match=r"a\.safetensors"):
            read(path)


def test_what_we_write_passes(tmp_path: Path) -> None:
    header = build_header({"a": entry("U8", [2], 0, 2), "b": entry("F32", [0], 2, 2)}, {"x": "é"})
    (tmp_path / "a.safetensors").write_bytes(header + b"ab")
    assert set(read_header(tmp_path / "a.safetensors").tensors) == {"a", "b"}


# Text


def test_json_that_python_takes_badly(tmp_path: Path) -> None:
    for text in ("[" * 10**6, '{"a":' * 10**5, "[" * 500 + "]" * 500, "1" * 5000, b"\xff", '{"a": 1, "a": 2}'):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text, unique=True)
    (tmp_path / "big.json").write_bytes(b" " * 100_000_001)
    with pytest.raises(CorruptError, match="larger than"):
        read_table(tmp_path / "big.json", "")


def test_a_ledger_with_lines_of_other_types(tmp_path: Path) -> None:
    good = {"bytes": 1, "file": "a.safetensors", "key": "a", "report": {}, "sha256": "00"}
    for part, value in {"bytes": "1", "report": [], "sha256": 3, "key": 1, "file": None}.items():
        (tmp_path / "ledger.jsonl").write_text(
            json.dumps(good | {part: value}, sort_keys=True) + "\n" + json.dumps(good) + "\n"
        )
        with pytest.raises(CorruptError, match="line 1"):
            Ledger(tmp_path / "ledger.jsonl")
    (tmp_path / "ledger.jsonl").write_text("[" * 10**6 + "\n" + json.dumps(good) + "\n")
    with pytest.raises(CorruptError, match="line 1"):
        Ledger(tmp_path / "ledger.jsonl")


def test_errors_are_one_printable_line_of_bounded_length() -> None:
    error = QtipError("a\nqtip: b\x1b[31m\u202e\ud800" + "x" * 10**6, "h\r")
    assert len(error.message) < 2100
    assert error.message.isprintable() and error.hint.isprintable()
    assert error.message.startswith("a\\nqtip: b\\x1b[31m\\u202e\\ud800x")


def test_a_layer_s_name_is_no_markup_and_moves_no_cursor(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(packed / "config.json", "quantization_config", "not_converted", value={"[/red]\x1b[2J\ud800": "why\nnot"})
    change(packed / "qtip.json", "sha256", value={})
    assert _run(["inspect", str(packed)]) == 0
    assert "not converted: [/red]\\x1b[2J\\ud800 (why\\nnot)" in capfd.readouterr().out
    print_table("", [{"layer": "[/red]\x1b[2J"}])
    assert "[/red]\\x1b[2J" in capfd.readouterr().out
    Display().note("[/red] :smile:")
    assert "note: [/red] :smile:" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text", ["[" * 10_000, "a: [", "a: &a [*a]", "? [a]: b", "- a", "a" * 300_000, "a: !!python/object:os.system x"]
)
def test_metadata_of_a_card(text: str) -> None:
    try:
        fields = card.front_matter(f"---\n{text}\n---\n")
    except ValueError:
        return
    assert isinstance(fields, dict) and not card.inherited(fields)


def test_a_licence_that_unfolds_is_not_taken_over() -> None:
    lines = [
        "l0: &l0 [x,x,x,x,x,x,x,x,x]",
        *(f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)),
        "license: *l11",
    ]
    assert card.inherited(card.front_matter("---\n" + "\n".join(lines) + "\n---\n")) == {}
    assert card.inherited({"license": "mit", "language": ["en", "no"]}) == {"license": "mit", "language": ["en", "no"]}
