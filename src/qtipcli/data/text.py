"""Owns where text comes from: what a `--data` value means, and how each kind of file or data set becomes documents.

Only this file knows the forms of that value, `FILE.txt`, `FILE.jsonl[:field]`, `FILE.parquet[:column]`, `owner/name[:config]`
and the short names `wikitext2` and `c4`, and the two data sets taken by default.
A document is a string; documents come lazily and can be read again.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtipcli.errors import CorruptError, QtipError, SettingsError, storage_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Web text of high quality, ungated, in parquet: `datasets` 5 refuses the script data set of the paper (RedPajama's sample).
CALIBRATION_DATA = "HuggingFaceFW/fineweb-edu:sample-10BT"
CALIBRATION_SPLIT = "train"
# The test set of the published perplexities (method.md, "Results").
EVALUATION_DATA = "wikitext2"
EVALUATION_SPLIT = "test"


@dataclass(frozen=True)
class HubText:
    """One split of a hub data set. file: the one file of the repository that is read; None for all of the split."""

    name: str
    config: str | None
    split: str
    file: str | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.name}{config}, split {self.split}" + (f", {self.file}" if self.file else "")


_C4 = "allenai/c4"
SHORT_NAMES = {
    "wikitext2": {
        CALIBRATION_SPLIT: HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        EVALUATION_SPLIT: HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    },
    "c4": {
        CALIBRATION_SPLIT: HubText(_C4, None, "train", "en/c4-train.00000-of-01024.json.gz"),
        EVALUATION_SPLIT: HubText(_C4, None, "validation", "en/c4-validation.00000-of-00008.json.gz"),
    },
}
"""What the field means by these names. Of C4 it reads one file, the first of the split (GPTQ's scripts, arXiv 2210.17323, and
those that follow them)."""

SHORT_NAMES_WINDOWS = {"c4": 256}
"""Windows evaluated where none were asked for and the text has no natural end: as many as GPTQ's scripts."""

_TEXT_FIELDS = ("text", "messages")  # looked for in this order where no field is named
_LOCAL_FORM = re.compile(r"(?P<path>.+\.(?P<kind>txt|jsonl|parquet))(?::(?P<field>[^:/]+))?", re.IGNORECASE)
_HUB_FORM = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_LOCAL_REMEDY = "give text of your own instead: --data FILE.txt"
_PARQUET_ROWS_PER_BATCH = 256  # documents held at a time: a few MB of web text
_HUB_TIMEOUT_SECONDS = 10.0
_QUOTED_CHARACTERS = 300  # of another library's message


@dataclass(frozen=True)
class Documents:
    """Text in the order of its source; each iteration reads the source again.

    Attributes:
        source: what a report calls it: the `--data` value, with the split for a hub data set.
        streamed: it comes over the network and may be endless: read no more of it than is needed.
        read: opens the source; yields documents, blank ones included. Raises QtipError where the source is at fault.
    """

    source: str
    streamed: bool
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()

    @classmethod
    def of(cls, source: str, *texts: str) -> Documents:
        """Documents that are in memory already."""
        return cls(source, streamed=False, read=lambda: iter(texts))


def load_documents(data: str, tokenizer: PreTrainedTokenizerBase | None = None, split: str = CALIBRATION_SPLIT) -> Documents:
    """The documents that a `--data` value names.

    Args:
        data: a .txt file (one document, whole), a .jsonl or .parquet file with one document a row, or the id of a hub data set.
            In rows the document is the field after the colon, else "text", else "messages". A list of messages
            ({"role": ..., "content": ...}) is rendered by the tokenizer's chat template. Or one of SHORT_NAMES.
        tokenizer: for its chat template; None where no messages are expected.
        split: the hub data set's split; local files have none. Of short names it chooses the one to calibrate or evaluate on.

    Raises:
        SettingsError: the value has none of these forms, or names a directory or an unknown kind of file.
        StorageError: the file cannot be found. All that is inside it is found out by reading, as QtipError.
    """
    if data in SHORT_NAMES:
        return _hub_text(f"{data} ({SHORT_NAMES[data][split]})", SHORT_NAMES[data][split], tokenizer)
    local = _LOCAL_FORM.fullmatch(data)
    if local:
        return _local_documents(data, Path(local["path"]), local["kind"].lower(), local["field"], tokenizer)
    path = Path(data)
    remedy = (
        f"give a .txt, .jsonl or .parquet file, {', '.join(SHORT_NAMES)}, or a hub data set as owner/name or owner/name:config"
    )
    if path.is_dir():
        raise SettingsError(f"data {data} is a directory", remedy)
    if path.exists():
        raise SettingsError(f"data {data} is a file of unknown kind '{path.suffix}'", remedy)
    hub = _HUB_FORM.fullmatch(data)
    if hub is None:
        raise SettingsError(f"data {data!r} is neither a file nor the id of a hub data set", remedy)
    text = HubText(hub["name"], hub["config"], split)
    return _hub_text(str(text), text, tokenizer)


def _hub_text(source: str, text: HubText, tokenizer: PreTrainedTokenizerBase | None) -> Documents:
    return Documents(source, True, lambda: _some_text(_hub_documents(text, tokenizer), source))


def _local_documents(
    data: str, path: Path, kind: str, field: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Documents:
    try:
        is_directory = path.is_dir()
        size = path.stat().st_size
    except OSError as error:
        raise storage_error(error, path, "read") from error
    if is_directory:
        raise SettingsError(f"data {path} is a directory", "name the file in it")
    if kind == "txt" and field is not None:
        raise SettingsError(f"data {path} is plain text and has no field '{field}'", f"say --data {path}")
    if size == 0:
        raise QtipError(f"data {path} is empty", "choose a file with text in it")

    def read() -> Iterator[str]:
        if kind == "txt":
            return iter([_read_text(path)])
        rows = _jsonl_rows(path) if kind == "jsonl" else _parquet_rows(path, field)
        return (_document(row, field, where, tokenizer, f"name it after a colon: --data {path}:FIELD") for where, row in rows)

    return Documents(data, False, lambda: _some_text(read(), str(path)))


def _some_text(documents: Iterable[str], source: str) -> Iterator[str]:
    """The same documents; raises QtipError at the end where all of them were blank."""
    found = False
    for document in documents:
        found = found or bool(document.strip())
        yield document
    if not found:
        raise QtipError(f"data {source} holds no text", "choose data with text in it")


# Local files


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise storage_error(error, path, "read") from error
    return _utf8(content, path, 0).removeprefix("\ufeff")


def _utf8(content: bytes, path: Path, offset: int) -> str:
    """Bytes as text; a zero byte, which no text has, tells a binary or UTF-16 file. `offset`: of the first byte in its file."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        position = error.start
    else:
        position = content.find(0)
        if position < 0:
            return text
    raise QtipError(
        f"data {path} is not UTF-8 text: byte 0x{content[position]:02x} at offset {offset + position}",
        "choose a text file, or convert it to UTF-8",
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it is, object) for each line that is not blank."""
    offset = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path} line {number}"
                text = _utf8(line, path, offset)
                offset += len(line)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise QtipError(
                        f"data {where} is not JSON: {error.msg} at column {error.colno}",
                        "write one JSON object a line",
                    ) from error
                if not isinstance(row, dict):
                    raise QtipError(
                        f"data {where} is not a JSON object", 'write one JSON object a line, such as {"text": "..."}'
                    )
                yield where, row
    except OSError as error:
        raise storage_error(error, path, "read") from error


def _parquet_rows(path: Path, field: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it is, row with its one text column), read a batch at a time: a shard of web text is gigabytes."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            column = _field_of(table.schema_arrow.names, field, str(path), f"name it after a colon: --data {path}:COLUMN")
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS_PER_BATCH, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except OSError as error:  # before ArrowException: a damaged page is both
        if error.errno is None:
            raise _damaged_parquet(path, error) from error
        raise storage_error(error, path, "read") from error
    except pyarrow.ArrowException as error:
        raise _damaged_parquet(path, error) from error


def _damaged_parquet(path: Path, error: Exception) -> CorruptError:
    return CorruptError(f"data {path} is not a parquet file, or is damaged: {_one_line(error)}", "fetch or write it again")


# Rows


def _field_of(names: Collection[str], field: str | None, where: str, remedy: str) -> str:
    """The name of the field that holds the document. Raises QtipError with the names that there are."""
    for candidate in (field,) if field is not None else _TEXT_FIELDS:
        if candidate in names:
            return candidate
    wanted = f"no field '{field}'" if field is not None else "no field 'text' or 'messages'"
    raise QtipError(f"data {where} has {wanted}; its fields are {', '.join(names) or 'none'}", remedy)


def _document(
    row: Mapping[str, Any], field: str | None, where: str, tokenizer: PreTrainedTokenizerBase | None, remedy: str
) -> str:
    """The document in one row: a string as it is, messages rendered, a null as the empty string."""
    name = _field_of(row.keys(), field, where, remedy)
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, list):
        value = _rendered(value, where, tokenizer)
    if not isinstance(value, str):
        raise QtipError(f"data {where}: field '{name}' holds {type(value).__name__}, not text or messages", remedy)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, and no tokenizer takes it
        raise QtipError(f"data {where}: character {error.start} is half a surrogate pair", "mend or drop that row") from error
    return value


def _rendered(messages: list[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as the model reads it: through the tokenizer's chat template, no reply begun."""
    from jinja2 import TemplateError

    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages):
        raise QtipError(f"data {where}: a message lacks 'role' or 'content'", 'write messages as {"role": ..., "content": ...}')
    if tokenizer is None or not tokenizer.chat_template:
        raise QtipError(
            f"data {where} holds chat messages, and the model's tokenizer has no chat template",
            "give plain text: --data FILE.txt",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise QtipError(
            f"data {where}: the model's chat template refuses it: {_one_line(error)}", "mend or drop that row"
        ) from error


# Hub data sets


def _hub_documents(text: HubText, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Streams a hub data set. What goes wrong outside of this project's code becomes one line with a remedy."""
    import datasets
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            # One short question first: without a network `datasets` itself retries for half a minute before it says so.
            HfApi().dataset_info(text.name, timeout=_HUB_TIMEOUT_SECONDS)
        files = {"data_files": {text.split: text.file}} if text.file else {}
        rows = datasets.load_dataset(text.name, text.config, split=text.split, streaming=True, **files)
        for number, row in enumerate(rows, start=1):
            yield _document(row, None, f"{text.name} row {number}", tokenizer, "choose a data set with a text column")
    except QtipError:
        raise
    except Exception as error:  # the HTTP client's errors are of another package with each version of huggingface_hub
        raise _hub_error(text, error) from error


def _hub_error(text: HubText, error: Exception) -> QtipError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    asked = f"hub data set {text.name}"
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError
        return QtipError(f"{asked} is gated", f"accept its terms on its page and run `hf auth login`, or {_LOCAL_REMEDY}")
    if isinstance(error, RepositoryNotFoundError):
        return QtipError(
            f"{asked} does not exist, or is private, and no file has that name", f"check the name, or {_LOCAL_REMEDY}"
        )
    if isinstance(error, ConnectionError) and constants.HF_HUB_OFFLINE:
        return QtipError(f"{asked} cannot be reached: offline mode is on", f"unset HF_HUB_OFFLINE, or {_LOCAL_REMEDY}")
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in str(error):
        return QtipError(
            f"{asked} is a Python script, and the datasets library runs none", f"choose a parquet data set, or {_LOCAL_REMEDY}"
        )
    if isinstance(error, ValueError):  # an unknown configuration or split; the library names those that exist
        wanted = f"configuration {text.config or '(none given)'}, split {text.split}"
        return QtipError(
            f"{asked} cannot be opened ({wanted}): {_one_line(error)}", f"say owner/name:config, or {_LOCAL_REMEDY}"
        )
    return QtipError(f"{asked} cannot be read: {_one_line(error)}", f"check the network, or {_LOCAL_REMEDY}")


def _one_line(error: Exception) -> str:
    """What another library has to say, short enough for one line of ours."""
    words = " ".join(str(error).split()).rstrip(".")
    return textwrap.shorten(words, _QUOTED_CHARACTERS, placeholder=" ...") or type(error).__name__
