"""`qtip serve` with a packed model, asked over HTTP as an OpenAI client does. The oracle is transformers' generate.

The server's libraries are an extra, and installed for tests; without them most of this is skipped.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub.conftest import free_port  # noqa: F401, a fixture
from stages.fixtures import Qtip
from stages.tiny import environment
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

import qtipcli  # noqa: F401, registers the format

needs_server = pytest.mark.skipif(not is_serve_available(), reason="needs qtipcli[serve]: fastapi, uvicorn, openai")

STARTING_SECONDS = 150
"""On a busy machine importing the server takes half a minute."""

QUESTION = [{"role": "user", "content": "one"}]


@pytest.fixture
def server(talking: Path, free_port: int, tmp_path: Path) -> Iterator[tuple[int, str]]:  # noqa: F811
    """(port, model) of `qtip serve` on this machine."""
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "qtipcli", "serve", str(talking), "--port", str(free_port), "--dtype", "float32"]
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + STARTING_SECONDS
        while not answers(free_port):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.3)
        yield free_port, str(talking)
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(port: int, model: str, **options: object) -> http.client.HTTPResponse:
    body = {"model": model, "messages": QUESTION, "max_tokens": 6, "temperature": 0, **options}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return response


@needs_server
def test_it_answers_whole_and_in_pieces_with_the_models_own_words(server: tuple[int, str], talking: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(talking, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(talking)
    ids = tokenizer("<user>one\n<assistant>", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    whole = json.loads(ask(*server).read())
    assert whole["choices"][0]["message"]["content"] == expected
    lines = ask(*server, stream=True).read().decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1


def test_without_its_libraries_it_says_what_to_install(qtip: Qtip, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtipcli.stages.serve.is_serve_available", lambda: False)
    outcome = qtip("serve", packed / "out", "--port", 1)
    assert outcome.status == 1
    assert "pip install 'qtipcli[serve]'" in outcome.err


def test_a_model_that_is_not_there_is_an_error_before_anything_starts(qtip: Qtip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtipcli.stages.serve.is_serve_available", lambda: True)
    outcome = qtip("serve", "./nothing")
    assert outcome.status == 1
    assert "./nothing does not exist" in outcome.err


@needs_server
def test_an_option_that_transformers_does_not_know_is_bad_usage(qtip: Qtip, packed: Path) -> None:
    outcome = qtip("serve", packed / "out", "--frobnicate")
    assert outcome.status == 2
    assert "--frobnicate" in outcome.err
