"""Text generation: what is streamed, where it ends, how it is drawn. The oracle is transformers' own generate."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtipcli  # noqa: F401, registers the format
from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages.generate import UNFINISHED, Generator, Stop, _Watch
from qtipcli.stages.sampling import Sampling
from stages.fixtures import Qtip
from stages.tiny import DEMO_MODEL

PROMPT = "def function_1(x):"
GREEDY = Sampling(tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def generator(packed: Path) -> Generator:
    return Generator(packed / "out")


@pytest.fixture(scope="module")
def expected(packed: Path) -> str:
    """Twelve greedy tokens after PROMPT, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(packed / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(packed / "out")
    ids = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_that_of_transformers_and_streams_whole(generator, expected):
    pieces = []
    answer = generator.answer(PROMPT, GREEDY, pieces.append)
    assert answer.text == "".join(pieces) == expected
    assert len(pieces) > 3
    assert (answer.tokens, answer.ended) == (12, "length")
    assert answer.prompt_tokens == len(generator.tokenizer(PROMPT)["input_ids"])
    assert answer.tokens_per_s > 0
    assert answer.seconds_to_first > 0


def test_a_prompt_that_goes_on_from_the_last_answer_reuses_its_keys_and_values(generator, monkeypatch):
    """To the same text as a model that reads it all anew."""
    generator.answer(PROMPT, replace(GREEDY, tokens=1))
    longer = PROMPT + "\n    return x"
    read = generator.tokenizer(PROMPT)["input_ids"]
    assert generator.tokenizer(longer)["input_ids"][: len(read)] == read
    widths = []
    forward = generator.model.forward

    def counting(input_ids=None, **options):
        widths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(generator.model, "forward", counting)
    again = generator.answer(longer, GREEDY)
    assert widths[0] == again.prompt_tokens - len(read)
    generator._cache = None
    widths.clear()
    assert generator.answer(longer, GREEDY).text == again.text
    assert widths[0] == again.prompt_tokens


@pytest.mark.parametrize("length", [1, 3, 9])
def test_an_answer_ends_before_a_stop_string_and_never_shows_its_beginning(generator, expected, length):
    """Nine characters are several tokens."""
    middle = len(expected) // 2
    string = expected[middle : middle + length]
    pieces = []
    answer = generator.answer(PROMPT, replace(GREEDY, stop=("never said", string)), pieces.append)
    assert answer.ended == "stop"
    assert answer.text == "".join(pieces) == expected[: expected.find(string)]
    assert answer.tokens < 12


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown_in_the_end(generator, expected):
    answer = generator.answer(PROMPT, replace(GREEDY, stop=(expected[-2:] + "and no more",)))
    assert (answer.text, answer.ended) == (expected, "length")


def test_an_end_token_ends_the_answer(generator, expected, monkeypatch):
    ids = generator.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    fifth = generator.model.generate(ids, max_new_tokens=5, do_sample=False)[0, -1].item()
    monkeypatch.setattr(generator.model.generation_config, "eos_token_id", [fifth])
    answer = generator.answer(PROMPT, GREEDY)
    assert answer.ended == "eos"
    assert answer.tokens <= 5


def test_an_answer_that_is_stopped_keeps_what_was_said(generator, expected):
    stop, pieces = Stop(), []

    def listen(piece: str) -> None:
        pieces.append(piece)
        stop.asked = len(pieces) == 3

    answer = generator.answer(PROMPT, GREEDY, listen, stop=stop)
    assert answer.ended == "interrupted"
    assert answer.text == "".join(pieces)
    assert expected.startswith(answer.text)
    assert answer.tokens < 12


def test_characters_of_several_tokens_are_shown_whole():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "x = 'é 😀'\n# ü\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    pieces = []
    watch = _Watch(tokenizer, 0, (), pieces.append, Stop())
    for end in range(1, ids.shape[1] + 1):
        watch(ids[:, :end], None)
    watch.finish()
    assert "".join(pieces) == watch.text == text
    assert not any(UNFINISHED in piece for piece in pieces)


def draw(generator: Generator, **changes: object) -> str:
    sampling = replace(Sampling(tokens=12, temperature=1.0), **changes)
    torch.manual_seed(sampling.seed)
    return generator.answer(PROMPT, sampling).text


def test_a_seed_draws_the_same_text_and_another_another(generator):
    assert draw(generator) == draw(generator)
    assert draw(generator) != draw(generator, seed=1)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_sampling_from_the_likeliest_token_alone_is_greedy(generator, expected, narrow):
    assert draw(generator, **narrow) == expected


def test_a_repetition_penalty_changes_what_is_said(generator, expected):
    assert generator.answer(PROMPT, replace(GREEDY, repetition_penalty=5.0)).text != expected


def test_what_was_not_chosen_is_the_models_own_and_never_transformers_fifty_tokens(generator):
    own = generator.model.generation_config
    assert Sampling().arguments(own) == {
        "do_sample": False,
        "repetition_penalty": 1.0,
        **dict.fromkeys(("temperature", "top_p", "top_k")),
    }
    assert Sampling(temperature=0.5).arguments(own)["top_k"] == 0
    file = type(own)(do_sample=True, temperature=0.6, top_p=0.9, top_k=40, repetition_penalty=1.1)
    stated = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    assert Sampling().arguments(file) == stated
    assert Sampling(top_p=0.5).arguments(file) == stated | {"top_p": 0.5}
    assert not Sampling(temperature=0.0).arguments(file)["do_sample"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_bad_usage(wrong):
    with pytest.raises(SettingsError):
        Sampling(**wrong)


def test_a_prompt_that_fills_the_context_is_refused_and_one_that_nearly_does_gets_what_is_left(generator):
    assert generator.context == 64
    words = "x " * 200
    with pytest.raises(QtipError, match="leave no room"):
        generator.answer(words, GREEDY)
    with pytest.raises(QtipError, match="prompt is empty"):
        generator.answer("", GREEDY)
    ids = generator.tokenizer(words)["input_ids"][:60]
    assert generator.answer(generator.tokenizer.decode(ids), GREEDY).tokens <= 4


def test_the_command_prints_the_prompt_the_text_and_the_speed(qtip: Qtip, packed: Path, expected: str) -> None:
    outcome = qtip("generate", packed / "out", "--prompt", PROMPT, "--tokens", 12)
    assert outcome.out == PROMPT + expected + "\n"
    assert "12 tokens, " in outcome.err
    assert "tokens/s" in outcome.err


def test_the_command_answers_by_the_chat_template(qtip: Qtip, talking: Path) -> None:
    said = qtip("generate", talking, "--prompt", "hi", "--chat", "--system", "short", "--tokens", 5, "--json")
    assert json.loads(said.out)["prompt"] == "<system>short\n<user>hi\n<assistant>"


def test_ctrl_c_ends_the_command_with_its_status_and_what_was_said(
    qtip: Qtip, packed: Path, expected: str, interrupted_at_once: None
) -> None:
    before = signal.getsignal(signal.SIGINT)
    outcome = qtip("generate", packed / "out", "--prompt", PROMPT, "--tokens", 12)
    assert outcome.status == 130
    text = outcome.out.removeprefix(PROMPT).rstrip("\n")
    assert text
    assert expected.startswith(text)
    assert text != expected
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_without_a_template_says_what_to_use_instead(qtip: Qtip, packed: Path) -> None:
    outcome = qtip("generate", packed / "out", "--prompt", "hi", "--chat")
    assert outcome.status == 1
    assert "no chat template" in outcome.err


def test_a_template_that_refuses_is_named(qtip: Qtip, talking: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(talking, strict)
    (strict / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}")
    outcome = qtip("generate", strict, "--prompt", "hi", "--chat")
    assert outcome.status == 1
    assert "no system, please" in outcome.err
    assert "Traceback" not in outcome.err
