"""Fixtures that the tests of stages/ and cli/ share: both conftests import them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qtipcli.cli.main import _run
from stages.tiny import FAST_OPTIONS, one_thread, save_model, save_text, snapshot


class Outcome(NamedTuple):
    """What a command left: its exit status and both streams."""

    status: int
    out: str
    err: str


Qtip = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One torch thread, no hub, and the variables that the command line sets put back afterwards."""
    for name in ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TQDM_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}.get(name, "1"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with one_thread():
        yield


@pytest.fixture
def qtip(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qtip:
    """Runs one qtip command in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = _run([str(argument) for argument in arguments])
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def quantize(qtip: Qtip, tiny_model: Path, text: Path) -> Qtip:
    """`qtip quantize MODEL` with little text and a small trellis; keyword `model` for another model."""

    def run(*arguments: object, model: Path | str = tiny_model, data: Path | None = text) -> Outcome:
        said = ["--data", data] if data is not None else []
        return qtip("quantize", model, *FAST_OPTIONS, *said, *arguments)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; read only."""
    return save_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text; read only."""
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def three(tiny_model: Path, text: Path, packed: Path) -> list[Path]:
    """The tiny model in 2, 3 and 4 bits, all from the same Hessians; read only."""
    command = ["quantize", tiny_model, *FAST_OPTIONS, "--data", text, "--hessians", packed / "hessians"]
    for bits in (3, 4):
        said = [*command, "--bits", bits, "--out", packed / f"{bits}bit"]
        assert _run([str(part) for part in said]) == 0
    return [packed / name for name in ("out", "3bit", "4bit")]


@pytest.fixture(scope="session")
def packed(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in which the tiny model was quantized to `out`, with `out.job` and `hessians` beside it; read only."""
    where = tmp_path_factory.mktemp("packed")
    command = ["quantize", tiny_model, *FAST_OPTIONS, "--data", text, "--out", where / "out", "--hessians", where / "hessians"]
    with one_thread():
        assert _run([str(part) for part in command]) == 0
    before = snapshot(where / "out")
    yield where
    assert snapshot(where / "out") == before, "a test wrote to what others read: let it have `own_packed`"


TEMPLATE = """{%- for message in messages -%}
<{{ message.role }}>{{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""
"""Of the tiny model that chats; each turn on a line of its own."""


@pytest.fixture(scope="session")
def talking(packed: Path) -> Path:
    """The packed tiny model with a chat template; read only."""
    directory = packed / "talking"
    shutil.copytree(packed / "out", directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def interrupted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is pressed when the first piece of each answer is shown."""
    from qtipcli.stages.generate import Generator

    answer = Generator.answer

    def pressed(self: Generator, prompt: str, sampling: object, on_text: Callable[[str], None], **options: object) -> object:
        def show(piece: str) -> None:
            on_text(piece)
            if not options["stop"].asked:
                signal.raise_signal(signal.SIGINT)

        return answer(self, prompt, sampling, show, **options)

    monkeypatch.setattr(Generator, "answer", pressed)


@pytest.fixture
def own_packed(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed / "out"`, for commands that write to it, as `qtip eval` does."""
    return Path(shutil.copytree(packed / "out", tmp_path / "packed"))
