"""Owns the commands that make a model talk: `qtip generate`, once, and `qtip chat`, until you leave."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtipcli.cli import options
from qtipcli.cli.display import Display, print_json
from qtipcli.errors import QtipError

if TYPE_CHECKING:
    from qtipcli.stages.chat import Conversation
    from qtipcli.stages.generate import Stop

INTERRUPTED = 130

Directory = Annotated[str, typer.Argument(help="A packed directory, or any causal language model.", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this share \\[the model's own, else 1].")]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens, 0 for all \\[the model's own, else 0].")]
Penalty = Annotated[float | None, typer.Option(help="Above 1 makes what was said less likely \\[the model's own, else 1].")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
StopAt = Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeat.")]
System = Annotated[str | None, typer.Option(help="Instructions before the conversation.")]

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy, 1 samples from the model as it is.")] = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: StopAt = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt by the model's chat template.")] = False,
    system: System = None,
    as_json: options.Json = False,
) -> None:
    """Generate text from a prompt, from packed weights, with the speed it had."""
    from dataclasses import asdict

    from qtipcli.stages.sampling import Sampling

    sampling = Sampling(tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ()))
    from qtipcli.stages import generate

    stream = None if as_json else lambda text: print(text, end="", flush=True)
    with _ctrl_c_stops() as stopper:
        result = generate.run(directory, prompt, sampling, stream, as_chat or system is not None, system, stopper)
    if as_json:
        print_json(asdict(result))
    else:
        print()
        Display().note(result.speed())
    if result.ended == "interrupted":
        raise typer.Exit(INTERRUPTED)


def chat(
    directory: Directory,
    tokens: Annotated[int, typer.Option(help="New tokens in an answer at most.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy \\[the model's own, else 0].")] = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: StopAt = None,
    system: System = None,
) -> None:
    """Talk with a model, from packed weights: Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D ends."""
    from qtipcli.stages.sampling import Sampling

    sampling = Sampling(tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ()))
    from qtipcli.stages.chat import Conversation

    conversation = Conversation(directory, sampling, system)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, gives input() its line editing and history
        Display().note(HELP)
    for line in _lines(is_terminal):
        if line == "/exit":
            return
        if line == "/clear":
            conversation.clear()
            Display().note("forgotten")
        elif line.startswith("/"):
            Display().note(f"no such command: {line}; {HELP}")
        elif line:
            _answer(conversation, line)


def _lines(is_terminal: bool) -> Iterator[str]:
    """What is typed, line by line, without blanks at its ends; Ctrl-C empties the line."""
    while True:
        try:
            yield input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            Display().note(f"nothing to stop; {HELP}")


def _answer(conversation: Conversation, line: str) -> None:
    display = Display()
    try:
        with _ctrl_c_stops() as stopper:
            answer = conversation.reply(line, lambda text: print(text, end="", flush=True), stopper)
    except KeyboardInterrupt:
        print()
        display.note("stopped before the answer began; it is as if you had not asked")
        return
    except QtipError as error:
        # The conversation goes on: it may be cleared, or something shorter said.
        display.console.print(f"qtip: {error.message}; /clear forgets the conversation")
        return
    print()
    display.note(answer.speed() + (", stopped" if answer.ended == "interrupted" else ""))


@contextlib.contextmanager
def _ctrl_c_stops() -> Iterator[Stop]:
    """Inside, Ctrl-C asks the answer to end at its next token; a second one raises KeyboardInterrupt at once."""
    from qtipcli.stages.generate import Stop

    stopper = Stop()

    def ask(number: int, frame: Any) -> None:
        if stopper.asked:
            raise KeyboardInterrupt
        stopper.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stopper
    finally:
        signal.signal(signal.SIGINT, before)
