"""Documents out of files and hub data sets, and the one line each bad one gets. Oracle: what the test itself wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants

from qtipcli.data.text import CALIBRATION_DATA, Documents, load_documents
from qtipcli.errors import CorruptError, QtipError, SettingsError, StorageError

TEXTS = ["once upon a time", "", "naïve ✓ 日本", "a\r\nb"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]
RENDERED = "<s>user hi</s>bot yes</s>"


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def write_parquet(path: Path, columns: dict) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


def refusal(data: str, tokenizer=None) -> QtipError:
    with pytest.raises(QtipError) as caught:
        list(load_documents(data, tokenizer))
    error = caught.value
    assert error.message and error.hint and "\n" not in str(error)
    return error


# What is read


def test_a_txt_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "story.TXT"
    path.write_bytes("\ufeffone\r\n\n\ntwo ✓\n".encode())
    documents = load_documents(str(path))
    assert list(documents) == ["one\r\n\n\ntwo ✓\n"]  # the byte order mark is no text
    assert list(documents) == list(documents)  # it can be read again
    assert (documents.source, documents.streamed) == (str(path), False)


def test_jsonl_and_parquet_give_back_what_was_written(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    parquet = write_parquet(tmp_path / "a.parquet", {"id": list(range(4)), "text": TEXTS})
    assert list(load_documents(jsonl)) == list(load_documents(parquet)) == TEXTS


def test_a_field_after_the_colon_wins_over_text(tmp_path):
    rows = {"text": ["no"] * 4, "story": TEXTS}
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "story": text} for text in TEXTS])
    parquet = write_parquet(tmp_path / "a.parquet", rows)
    assert list(load_documents(f"{jsonl}:story")) == list(load_documents(f"{parquet}:story")) == TEXTS


def test_messages_are_rendered_by_the_chat_template(tmp_path, tokenizer):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    parquet = write_parquet(tmp_path / "a.parquet", {"messages": [CHAT]})
    named = write_jsonl(tmp_path / "b.jsonl", [{"conversation": CHAT, "text": "no"}]) + ":conversation"
    for data in (jsonl, parquet, named):
        assert list(load_documents(data, tokenizer)) == [RENDERED]


def test_a_null_document_is_blank_and_not_an_error(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", {"text": ["a", None]})
    assert list(load_documents(parquet)) == ["a", ""]


def test_parquet_is_read_a_batch_at_a_time(tmp_path, monkeypatch):
    """A page damaged at the end of the file does not keep the first documents from being read."""
    monkeypatch.setattr("qtipcli.data.text._PARQUET_ROWS_PER_BATCH", 1)
    data = write_parquet(tmp_path / "a.parquet", {"text": [f"story {number}" * 20 for number in range(40)]})
    footer = pq.ParquetFile(data).metadata
    last = footer.row_group(footer.num_row_groups - 1).column(0)
    content = bytearray(Path(data).read_bytes())
    start = last.dictionary_page_offset or last.data_page_offset
    content[start : start + last.total_compressed_size] = bytes(last.total_compressed_size)
    Path(data).write_bytes(content)
    documents = iter(load_documents(data))
    assert next(documents) == "story 0" * 20
    with pytest.raises(CorruptError):
        list(documents)


def test_texts_in_memory_are_documents():
    documents = Documents.of("demo", "a", "b")
    assert list(documents) == list(documents) == ["a", "b"]


# What is refused


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.parquet", "no.jsonl:story"])
def test_a_missing_file_is_refused_before_it_is_read(tmp_path, name):
    with pytest.raises(StorageError, match=r"no\.\w+ does not exist"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    assert "is empty" in refusal(str(tmp_path / name)).message


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b" \n\t\n"), ("a.jsonl", b"\n\n"), ("b.jsonl", b'{"text": " "}\n{"text": null}\n')]
)
def test_a_file_of_blanks_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "holds no text" in refusal(str(tmp_path / name)).message


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("latin.txt", b"caf\xe9 noir", "byte 0xe9 at offset 3"),
        ("binary.txt", b"\x7fELF\x00\x01", "byte 0x00 at offset 4"),
        ("utf16.txt", "hello".encode("utf-16-le"), "byte 0x00 at offset 1"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "byte 0xe9 at offset 27"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_first_bad_byte(tmp_path, name, content, fact):
    (tmp_path / name).write_bytes(content)
    message = refusal(str(tmp_path / name)).message
    assert fact in message and name in message
    offset = int(message.rpartition(" ")[2])
    assert content[offset] == int(message.partition("0x")[2][:2], 16)


def test_a_missing_field_is_refused_with_those_that_exist(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"story": "a", "title": "b"}])
    parquet = write_parquet(tmp_path / "a.parquet", {"story": ["a"], "title": ["b"]})
    for data in (jsonl, parquet):
        assert refusal(data).message.endswith("has no field 'text' or 'messages'; its fields are story, title")
        assert "no field 'body'" in refusal(f"{data}:body").message


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("{'text': 1}", "line 2 is not JSON: Expecting property name"),
        ("[1, 2]", "line 2 is not a JSON object"),
        ('{"body": "a"}', "line 2 has no field 'text'"),
        ('{"text": 7}', "line 2: field 'text' holds int"),
        ('{"text": "a\\ud83d"}', "line 2: character 1 is half a surrogate pair"),
        ('{"text": [{"from": "me", "value": "a"}]}', "line 2: a message lacks 'role' or 'content'"),
        ('{"text": [{"role": "robot", "content": "a"}]}', "line 2: the model's chat template refuses it: no robots"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, tokenizer, line, fact):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    assert fact in refusal(str(tmp_path / "a.jsonl"), tokenizer).message


def test_messages_without_a_chat_template_are_refused(tmp_path, tokenizer):
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    tokenizer.chat_template = None
    assert "no chat template" in refusal(data, tokenizer).message
    assert "no chat template" in refusal(data, None).message


def test_a_damaged_parquet_file_is_refused(tmp_path):
    data = write_parquet(tmp_path / "a.parquet", {"text": TEXTS * 500})
    content = Path(data).read_bytes()
    Path(data).write_bytes(content[: len(content) // 2])
    assert "is not a parquet file, or is damaged" in refusal(data).message
    Path(data).write_bytes(content[:4] + bytes(60) + content[64:])  # the footer is whole, the pages are not
    assert "is not a parquet file, or is damaged" in refusal(data).message


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        ("table.csv", "a file of unknown kind '.csv'"),
        ("folder", "is a directory"),
        ("nothing", "neither a file nor the id of a hub data set"),
        ("./owner/name", "neither a file nor the id of a hub data set"),
        ("owner/name:config:more", "neither a file nor the id of a hub data set"),
        ("a.txt:field", "has no field 'field'"),
        ("folder.txt", "is a directory"),
    ],
)
def test_a_value_of_no_known_form_is_refused(tmp_path, monkeypatch, data, fact):
    monkeypatch.chdir(tmp_path)
    for name in ("table.csv", "a.txt"):
        (tmp_path / name).write_text("a")
    for name in ("folder", "folder.txt"):
        (tmp_path / name).mkdir()
    with pytest.raises(SettingsError) as caught:
        load_documents(data)
    assert fact in caught.value.message and caught.value.exit_code == 2


# Hub data sets, without a network


@pytest.fixture
def hub(monkeypatch):
    """Puts `answer` in the place of the hub: rows to stream, or the error to raise. Returns what was asked for."""
    asked = []

    def answer_with(answer, known: Exception | None = None):
        def dataset_info(self, name, **options):
            if known is not None:
                raise known

        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer_with


def test_a_hub_data_set_is_streamed_by_name_configuration_and_split(hub):
    asked = hub(datasets.Dataset.from_dict({"text": TEXTS, "id": [0, 1, 2, 3]}).to_iterable_dataset())
    documents = load_documents("owner/name:small", split="test")
    assert asked == []  # nothing is opened before it is read
    assert list(documents) == TEXTS
    assert asked == [(("owner/name", "small"), {"split": "test", "streaming": True})]
    assert (documents.source, documents.streamed) == ("owner/name:small, split test", True)


@pytest.mark.parametrize(
    ("name", "split", "arguments", "options"),
    [
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
        ("wikitext2", "train", ("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
        (
            "c4", "test", ("allenai/c4", None),
            {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        ),
        (
            "c4", "train", ("allenai/c4", None),
            {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        ),
    ],
)  # fmt: skip
def test_a_short_name_is_what_the_field_means_by_it(hub, name, split, arguments, options):
    asked = hub(datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset())
    documents = load_documents(name, split=split)
    assert list(documents) == TEXTS
    assert asked == [(arguments, options | {"streaming": True})]
    assert documents.source.startswith(f"{name} ({arguments[0]}")  # a report says what was read
    assert all(part in documents.source for part in (options["split"], *options.get("data_files", {}).values()))
    assert documents.streamed


def test_no_more_of_a_hub_data_set_is_read_than_is_taken(hub):
    def rows():
        yield {"text": "first"}
        pytest.fail("the second row was read")

    hub(rows())
    assert next(iter(load_documents("owner/name"))) == "first"


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "is a Python script"),
        (ValueError("Config name is missing.\nPick one among: ['a', 'b']"), "Pick one among: ['a', 'b']"),
        (ConnectionError("Couldn't reach it"), "cannot be read: Couldn't reach it"),
        (KeyError("x" * 5000), "cannot be read"),
    ],
)
def test_an_error_of_the_hub_is_one_short_line_with_a_local_remedy(hub, error, fact):
    hub(error)
    raised = refusal("owner/name:small")
    assert fact in raised.message and "owner/name" in raised.message and "--data FILE.txt" in raised.hint
    assert len(raised.message) < 500


def test_an_error_in_the_middle_of_a_stream_is_one_line_too(hub):
    def rows():
        yield {"text": "first"}
        raise TimeoutError("the read timed out")

    hub(rows())
    assert "cannot be read: the read timed out" in refusal("owner/name").message


def test_without_a_network_one_question_is_enough(hub):
    asked = hub(pytest.fail, known=OSError("Name or service not known"))
    assert "Name or service not known" in refusal("owner/name").message
    assert asked == []


def test_a_hub_data_set_without_text_names_its_fields(hub):
    hub([{"question": "a", "answer": "b"}])
    assert "its fields are question, answer" in refusal("owner/name").message


def test_the_default_data_offline_says_how_to_go_on(tmp_path):
    script = (
        "from qtipcli.data.text import CALIBRATION_DATA, load_documents\n"
        "from qtipcli.errors import QtipError\n"
        "try: list(load_documents(CALIBRATION_DATA))\n"
        "except QtipError as error: print(error.message); print(error.hint)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    message, hint = done.stdout.splitlines()
    assert message == f"hub data set {CALIBRATION_DATA.partition(':')[0]} cannot be reached: offline mode is on"
    assert "unset HF_HUB_OFFLINE" in hint and "--data FILE.txt" in hint
