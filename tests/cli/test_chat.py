"""`qtip chat` with piped input: turns, commands, Ctrl-C. The oracle: transformers' generate on the conversation written out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stages.fixtures import Outcome, Qtip
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtipcli  # noqa: F401, registers the format

Say = Callable[..., Outcome]
TOKENS = 6


@pytest.fixture
def say(qtip: Qtip, talking: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Runs `qtip chat` with these lines as its input, then Ctrl-D; keyword `options` for more options."""

    def run(*lines: str, options: tuple[object, ...] = (), model: Path = talking) -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return qtip("chat", model, "--tokens", TOKENS, *options)

    return run


@pytest.fixture(scope="module")
def answer(talking: Path) -> Callable[[str], str]:
    """What the model adds to a text, greedily, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(talking, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(talking)

    def greedy(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
        output = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return greedy


def test_the_turns_of_a_conversation_build_on_each_other(say, answer):
    outcome = say("one", "two")
    first = answer("<user>one\n<assistant>")
    second = answer(f"<user>one\n<assistant>{first}\n<user>two\n<assistant>")
    assert second != answer("<user>two\n<assistant>")
    assert outcome.status == 0
    assert outcome.out == f"{first}\n{second}\n"
    assert outcome.err.count("tokens/s") == 2


def test_clear_forgets_all_but_the_instructions(say, answer):
    outcome = say("one", "/clear", "two", options=("--system", "be"))
    assert outcome.out == "".join(answer(f"<system>be\n<user>{word}\n<assistant>") + "\n" for word in ("one", "two"))
    assert "forgotten" in outcome.err


def test_exit_ends_it_before_the_input_does(say, answer):
    assert say("/exit", "one").out == ""


def test_blank_lines_and_unknown_commands_are_not_said_to_the_model(say):
    outcome = say("", "   ", "/frobnicate")
    assert (outcome.status, outcome.out) == (0, "")
    assert "no such command: /frobnicate" in outcome.err
    assert "/clear" in outcome.err


def test_ctrl_c_stops_the_answer_and_not_the_chat(say, answer, interrupted_at_once):
    outcome = say("one", "two")
    assert outcome.status == 0
    assert outcome.err.count(", stopped") == 2
    first, second = outcome.out.splitlines()
    assert first
    assert second
    whole = answer("<user>one\n<assistant>")
    assert whole.startswith(first)
    assert whole != first


def test_ctrl_c_where_nothing_is_said_goes_on(say, monkeypatch):
    lines = iter(["interrupt", "/frobnicate"])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "interrupt":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", typed)
    outcome = say()
    assert outcome.status == 0
    assert "nothing to stop" in outcome.err
    assert "no such command" in outcome.err


def test_a_conversation_that_fills_the_context_says_so_and_goes_on_when_cleared(say, answer):
    outcome = say("x " * 100, "one", "/clear", "one")
    assert outcome.status == 0
    assert "leave no room" in outcome.err
    assert "/clear" in outcome.err
    # What did not fit is no part of the conversation.
    assert outcome.out == f"{answer('<user>one' + chr(10) + '<assistant>')}\n" * 2


def test_a_model_without_a_chat_template_is_one_clear_error(say, packed):
    outcome = say("one", model=packed / "out")
    assert outcome.status == 1
    assert "no chat template" in outcome.err
    assert f"qtip generate {packed / 'out'} --prompt" in outcome.err
    assert "Traceback" not in outcome.err


def test_bad_settings_are_refused_before_a_model_is_loaded(say, tmp_path):
    outcome = say("one", options=("--top-p", 2), model=tmp_path / "nothing")
    assert outcome.status == 2
    assert "top-p" in outcome.err
