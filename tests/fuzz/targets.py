"""Owns what is done with a broken directory, and what counts as an answer: a correct load, or one clear error of ours.

Everything here runs in a process of its own, in which the broken directory is all that is wrong.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fuzz import documents
from qtipcli.cli.main import _run
from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import card, pack, push
from qtipcli.stages.packed import PackedDirectory
from qtipcli.stages.progress import Silent

LOADED, REFUSED, FOREIGN, FINDING = "loaded", "refused", "foreign", "finding"
"""FOREIGN: an error of transformers or peft with none of our code beneath it, such as a hidden size of 'abc'."""

LONGEST_MESSAGE = 2000
OURS = ("/qtipcli/", "/qtipcli_kernels/")
TOKENS = torch.arange(5, 17)[None]


TRAPS: dict[str, Callable[[], object]] = {
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "memory": lambda: bytearray(2**33),
    "hang": lambda: time.sleep(60),
}
"""What a case does that is there to try the harness."""


@dataclass(frozen=True)
class Answer:
    """What came of one entry point. kind: one of the four; what: the message; where: tells a finding from others."""

    entry: str
    kind: str
    what: str = ""
    where: str = ""


class Surroundings:
    """What a broken directory is tried with: the valid ones, and a loaded packed model for adapters."""

    def __init__(self, valid: Path) -> None:
        self.valid = valid
        self.model = AutoModelForCausalLM.from_pretrained(valid / "packed", dtype=torch.float32).eval()
        with torch.no_grad():
            self.model(TOKENS)  # compiles what a child would compile each time anew
        self.command(["generate", valid / "packed", "--prompt", "def", "--tokens", "2"])

    @staticmethod
    def command(arguments: list[object]) -> tuple[int, str, str]:
        """(status, stdout, stderr) of a qtip command. A traceback goes through."""
        # As strict about what can be encoded as a terminal or pipe is.
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = _run([str(part) for part in arguments])
        for stream in (out, err):
            stream.seek(0)
        return status, out.read(), err.read()


def answers(kind: str, directory: Path, surroundings: Surroundings, depth: int) -> Iterator[Answer]:
    """What every entry point for this kind of directory makes of it. depth: at 0 and 1 also slow ones."""
    entries = {"packed": _packed, "source": _source, "job": _job, "adapter": _adapter}[kind](directory, surroundings, depth)
    for name, entry in entries.items():
        yield _answer(name, entry)


Entries = dict[str, Callable[[], object]]


def _packed(directory: Path, around: Surroundings, depth: int) -> Entries:
    entries: Entries = {
        "inspect": lambda: _command(around, ["inspect", directory]),
        "load": lambda: _load(directory),
        "directory": lambda: _read_directory(directory),
        "push": lambda: push._local_files(directory, "someone/model", None),
        "card": lambda: card.record(directory, None, {"protocol": {}, "perplexity": 2.0}, Silent()),
    }
    generate = ["generate", directory, "--prompt", "def", "--tokens", "2"]
    text = ["--data", around.valid / "text.txt", "--context", "32", "--windows", "1"]
    if depth == 0:
        entries["generate"] = lambda: _command(around, generate)
    if depth == 1:
        entries["eval"] = lambda: _command(around, ["eval", directory, *text])
    return entries


def _source(directory: Path, around: Surroundings, depth: int) -> Entries:
    options = ["--state-bits", "8", "--samples", "2", "--context", "16", "--one-sided", "--no-pack"]
    text = ["--data", around.valid / "text.txt", "--hessians", directory / "h", "--out", directory / "out"]
    entries: Entries = {"open": lambda: _stream(directory), "copy": lambda: pack.other_files(directory)}
    if depth == 0:
        entries["quantize"] = lambda: _command(around, ["quantize", directory, *options, *text])
    return entries


def _job(directory: Path, around: Surroundings, depth: int) -> Entries:
    out = directory.with_name("packed-again")
    return {
        "read": lambda: _read_job(directory),
        "pack": lambda: _command(around, ["pack", around.valid / "source", directory, "--out", out]),
    }


def _adapter(directory: Path, around: Surroundings, depth: int) -> Entries:
    def load() -> None:
        from peft import PeftConfig, PeftModel

        from qtipcli.hub.lora import packed_lora

        adapted = PeftModel.from_pretrained(
            around.model, directory, config=packed_lora(PeftConfig.from_pretrained(directory)), local_files_only=True
        )
        with torch.no_grad():
            adapted(TOKENS)

    return {"load": load}


def _command(around: Surroundings, arguments: list[object]) -> None:
    """Raises QtipError as the command prints it, AssertionError where what is printed is not one clear error."""
    status, _, err = around.command(arguments)
    if status == 0:
        return
    said = [line for line in err.splitlines() if line.startswith("qtip: ")]
    lines = err.splitlines()
    assert status in (1, 2), f"status {status}"
    assert len(said) == 1, f"{len(said)} errors printed"
    # The error comes last, with one line of a hint or none.
    assert said[0] in (lines[-1], lines[-2] if lines[-1].startswith("  hint: ") else ""), "the error is not one line"
    raise QtipError(said[0])


def _load(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    _check_is_what_is_stored(model, directory)
    with torch.no_grad():
        model(TOKENS % model.get_input_embeddings().num_embeddings)


def _check_is_what_is_stored(model: torch.nn.Module, directory: Path) -> None:
    """Every packed tensor of the model must be the file's, byte by byte; AssertionError names the first that is not."""
    stored = {}
    for file in directory.glob("*.safetensors"):
        stored |= documents.tensors_of(file.read_bytes())
    for name, tensor in model.state_dict().items():
        leaf = name.rpartition(".")[2]
        if leaf in ("trellis", "scale_in", "scale_out", "lut") and not name.startswith("lm_head"):
            data = tensor.to(torch.int32 if leaf == "trellis" else torch.float16).contiguous().numpy().tobytes()
            assert name in stored, f"{leaf} comes from no file"
            assert data == stored[name][2], f"{leaf} is not what is stored"


def _read_directory(directory: Path) -> None:
    packed = PackedDirectory(directory)
    packed.vectors()
    for layer in packed.layers("model.layers.0").values():
        layer.weight_dense(torch.float32)


def _stream(directory: Path) -> None:
    skeleton = Skeleton(ModelSource.open(directory))
    for index in range(len(skeleton.blocks)):
        skeleton.materialize(index)
        skeleton.release(index)
    skeleton.materialize_outer(head=True)


def _read_job(directory: Path) -> None:
    job = RunDirectory.load(directory)
    for key in job.keys():  # noqa: SIM118, no mapping
        job.read(key)


def _answer(entry: str, work: Callable[[], object]) -> Answer:
    try:
        work()
    except QtipError as error:
        return _judged(entry, str(error))
    except BaseException as error:
        return _failed(entry, error)
    return Answer(entry, LOADED)


def _judged(entry: str, message: str) -> Answer:
    """A refusal, unless a person could not read it."""
    if len(message) > LONGEST_MESSAGE:
        return Answer(entry, FINDING, message[:200], f"{entry}: a message of {len(message) // 1000} thousand characters")
    if any(unicodedata.category(each) in ("Cc", "Cs") for each in message):
        return Answer(entry, FINDING, repr(message[:200]), f"{entry}: control characters in a message")
    return Answer(entry, REFUSED, message)


def _failed(entry: str, error: BaseException) -> Answer:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{frame.filename.rpartition('/src/')[2]}:{frame.name}" for frame in frames if _is_ours(frame.filename)]
    what = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, MemoryError) or not (ours or isinstance(error, AssertionError)):
        kind = FINDING if isinstance(error, MemoryError) else FOREIGN
        return Answer(entry, kind, what, f"{entry}: {type(error).__name__}")
    where = f"{entry}: {type(error).__name__} in {ours[-1] if ours else error}"
    return Answer(entry, FINDING, what, where)


def _is_ours(file: str) -> bool:
    return any(part in file for part in OURS) and not file.endswith("/cli/main.py")


def as_json(answer: Answer) -> dict[str, Any]:
    return dict(vars(answer))
