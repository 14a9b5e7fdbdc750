"""`qtip push` from end to end against a loopback server in the place of the Hub.

The oracles: the pushed directory itself, byte by byte and by its logits, and what the server saw.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import push_kills
from hub.clients import Clients, Ended
from hub.loopback import Loopback
from safetensors.torch import load_file
from stages.fixtures import packed, text, tiny_model
from stages.tiny import FAST_OPTIONS, logits, one_thread

from qtipcli.cli.main import _run
from qtipcli.hub import card
from qtipcli.stages.card import record

__all__ = ["packed", "text", "tiny_model"]

NAME = "writer/tiny-2bit"
BASE_CARD = "---\nlicense: mit\nlanguage: [en, no]\n---\n# base\n"
RESULT = {"perplexity": 12.5, "tokens": 64, "protocol": {"data": "held-out", "windows": 2, "context": 32}}

LOGITS = """
import torch, qtipcli
from safetensors.torch import save_file
from stages.tiny import logits_of
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({name!r}, dtype=torch.float32, revision={revision!r}).eval()
save_file({{"logits": logits_of(model)}}, "loaded.safetensors")
"""


@pytest.fixture(scope="module")
def original(tiny_model: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a card and a licence, packed as `tiny-2bit` beside it in several shards; read only."""
    base = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("original") / "base"))
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE").write_text("do what you like\n")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}\n")
    command = ["pack", base, packed / "out.job", "--out", base.parent / "tiny-2bit", "--max-shard-size", "4KB"]
    with one_thread():
        assert _run([str(part) for part in command]) == 0
    return base


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of the packed model that a test may change."""
    return Path(shutil.copytree(original.parent / "tiny-2bit", tmp_path / "tiny-2bit"))


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with Loopback() as hub:
        yield hub


@pytest.fixture
def hub(server: Loopback) -> Loopback:
    server.clear()
    return server


@pytest.fixture(scope="module")
def client(server: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    folder = tmp_path_factory.mktemp("client")
    clients = Clients(server.environment(folder / "home"), folder)
    yield clients
    clients.close()


def url_of(ended: Ended) -> str:
    """The url that a successful push prints last."""
    assert ended.status == 0, ended.output
    return ended.output.splitlines()[-1]


def complaint(ended: Ended, *words: str, status: int = 1) -> str:
    """Checks that a command failed in two lines, `qtip: ...` with the words and a hint, and gives them."""
    assert ended.status == status, ended.output
    assert "Traceback" not in ended.output
    said, hint = ended.output.splitlines()[-2:]
    assert said.startswith("qtip: ") and hint.startswith("  hint: "), ended.output
    for word in words:
        assert word in said + hint, ended.output
    return said + hint


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def complete_uploads(hub: Loopback) -> Counter[str]:
    """Content -> how often all of it was sent."""
    return Counter(upload.oid for upload in hub.uploads if upload.complete)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_all_of_it_arrives_in_one_commit_and_loads_back_with_equal_logits(hub, client, model):
    assert len(shards(model)) > 3
    assert url_of(client.qtip("push", model, NAME)) == f"{hub.url}/{NAME}"
    local = files_of(model)
    local["README.md"] = card.with_section(local["README.md"].decode(), card.USE, card.use(NAME)).encode()
    remote = {path: content for path, (content, _) in hub.tree(NAME).items() if path != ".gitattributes"}
    assert remote == local
    assert "LICENSE" in remote and "additional_chat_templates/tool.jinja" in remote and "qtip.json" in remote
    assert len(hub.commits) == 1 and not hub.repositories[NAME].private
    loaded = client.python(LOGITS.format(name=NAME, revision="main"), token=None)
    assert loaded.status == 0, loaded.output
    with one_thread():
        assert torch.equal(load_file(client.folder / "loaded.safetensors")["logits"], logits(model))


def test_a_push_without_changes_sends_nothing_and_one_after_an_evaluation_the_card(hub, client, model):
    url_of(client.qtip("push", model, NAME))
    before = (len(hub.uploads), len(hub.commits))
    again = client.qtip("push", model, NAME, "--json")
    assert "nothing was sent" in again.output
    report = json.loads(again.output[again.output.index("{") :])
    assert report["sent"] == [] and report["commit"] is None and len(report["already_there"]) == len(files_of(model))
    assert (len(hub.uploads), len(hub.commits)) == before
    record(model, "someone/base", RESULT)
    url_of(client.qtip("push", model, NAME))
    assert len(hub.uploads) == before[0]
    assert hub.commits[-1].small.keys() == {"README.md", "qtip-eval.json"} and not hub.commits[-1].large
    assert b"| perplexity | 12.5 |" in hub.tree(NAME)["README.md"][0]


def test_a_killed_push_goes_on_and_sends_no_file_twice(hub, client, model):
    hub.hold(after_bytes=1000, upload=2)
    client.start("push", model, NAME)
    assert hub.held.wait(60)
    client.kill()
    hub.resume.set()
    assert len(complete_uploads(hub)) == 2 and not hub.commits
    assert set(hub.tree(NAME)) == {".gitattributes"}  # a reader finds nothing yet, not a part of it
    url_of(client.qtip("push", model, NAME))
    sent = complete_uploads(hub)
    assert set(sent.values()) == {1} and set(sent) == set(hub.commits[0].large.values())
    assert len(hub.uploads) == len(sent) + 1 and len(hub.commits) == 1  # the one that was cut off is the only one begun twice
    assert {name: hub.tree(NAME)[name][0] for name in files_of(model) if name != "README.md"} == {
        name: content for name, content in files_of(model).items() if name != "README.md"
    }


def test_large_files_may_be_asked_for_in_parts(hub, client, model):
    hub.part_bytes = 40_000
    url_of(client.qtip("push", model, NAME))
    assert any(path.endswith("/complete") for _, path in hub.requests)
    for shard in shards(model):
        assert hub.tree(NAME)[shard.name] == (shard.read_bytes(), True)


def test_a_revision_is_a_branch_and_main_stays_as_it_was(hub, client, model):
    url_of(client.qtip("push", model, NAME))
    before = hub.tree(NAME)
    other = Path(shutil.copytree(model, model.parent / "other"))
    assert (other / "LICENSE").write_text("changed\n")
    change_checksum(other, "LICENSE")
    assert url_of(client.qtip("push", other, NAME, "--revision", "3bit")) == f"{hub.url}/{NAME}/tree/3bit"
    assert hub.tree(NAME) == before
    assert hub.tree(NAME, "3bit")["LICENSE"][0] == b"changed\n"
    assert b'revision="3bit"' in hub.tree(NAME, "3bit")["README.md"][0]
    assert len(complete_uploads(hub)) == len(hub.commits[0].large)  # its weights were there already


def change_checksum(directory: Path, name: str) -> None:
    from qtipcli.job.files import sha256_file

    recorded = json.loads((directory / "qtip.json").read_text())
    recorded["sha256"][name] = sha256_file(directory / name)
    (directory / "qtip.json").write_text(json.dumps(recorded))


def test_shards_of_an_earlier_push_go_and_those_of_another_model_are_not_touched(hub, client, model, original, packed):
    url_of(client.qtip("push", model, NAME))
    whole = model.parent / "whole"
    ended = client.qtip("pack", original, packed / "out.job", "--out", whole, "--push-to", NAME, "--json")
    assert json.loads(ended.output[ended.output.index("{\n") :])["pushed"] == f"{hub.url}/{NAME}", ended.output
    assert [name for name in hub.tree(NAME) if name.endswith(".safetensors")] == ["model.safetensors"]
    assert sorted(hub.commits[-1].deleted) == [shard.name for shard in shards(model)]
    hub.add_commit(NAME, "main", {"model-00001-of-00001.safetensors": (b"mine", True)})
    before = len(hub.requests)
    complaint(client.qtip("push", model, NAME), "another model's weights", "model-00001-of-00001.safetensors", "--revision")
    assert not [path for method, path in hub.requests[before:] if method == "PUT" or "/commit/" in path]
    url_of(client.qtip("push", model, NAME, "--revision", "2bit"))
    assert "model-00001-of-00001.safetensors" not in hub.tree(NAME, "2bit")
    assert hub.tree(NAME) == {"model-00001-of-00001.safetensors": (b"mine", True)}  # main keeps its own


def test_a_pull_request_changes_no_branch_and_may_go_to_others(hub, client, model):
    url_of(client.qtip("push", model, NAME))
    before = hub.tree(NAME)
    record(model, None, RESULT)
    assert url_of(client.qtip("push", model, NAME, "--create-pr", token="hf_other_token")) == f"{hub.url}/{NAME}/discussions/1"
    assert hub.tree(NAME) == before and "qtip-eval.json" in hub.tree(NAME, "refs/pr/1")
    complaint(client.qtip("push", model, NAME, "--create-pr", "--revision", "2bit"), "--create-pr", "2bit", status=2)


def test_private_and_the_message_are_as_asked(hub, client, model):
    url_of(client.qtip("push", model, NAME, "--private", "--message", "first"))
    assert hub.repositories[NAME].private and hub.commits[0].message == "first"
    url_of(client.qtip("push", model, NAME, "--private"))
    url_of(client.qtip("push", model, "writer/public"))
    assert "bits a weight" in hub.commits[-1].message
    before = len(hub.commits)
    complaint(client.qtip("push", model, "writer/public", "--private"), "writer/public", "is public")
    assert len(hub.commits) == before


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, NAME, ["no token", "hf auth login"]),
        ("hf_unknown_token", NAME, ["does not accept the token", "hf auth login"]),
        ("hf_reader_token", "reader/x", ["reader can only read", "write access"]),
        ("hf_writer_token", "other/x", ["is of writer", "other", "--create-pr"]),
        ("hf_writer_token", "no-owner", ["no-owner", "OWNER/REPO"]),
        ("hf_writer_token", "a/b/c", ["a/b/c", "OWNER/REPO"]),
        ("hf_writer_token", "writer/--x y", ["--x y", "OWNER/REPO"]),
    ],
)
def test_what_cannot_end_well_is_refused_at_the_start(hub, client, model, original, text, token, name, words):
    complaint(client.qtip("push", model, name, token=token), *words)
    said = ("--data", text, "--out", "early", "--push-to", name)
    complaint(client.qtip("quantize", original, *FAST_OPTIONS, *said, token=token), *words)
    assert not list(client.folder.glob("early*")) and not list(client.folder.glob("*.hessians"))
    assert {path for _, path in hub.requests} <= {"/api/whoami-v2"} and not hub.repositories


def test_push_to_needs_a_packed_model(client, original, hub):
    ended = client.qtip("quantize", original, *FAST_OPTIONS, "--out", "early", "--no-pack", "--push-to", NAME)
    complaint(ended, "--push-to", "--no-pack", status=2)


def test_a_refused_connection_is_said_at_once(hub, client, model, server, tmp_path):
    program = f"""
import sys
from qtipcli.cli.main import _run
from qtipcli.hub import repository
import huggingface_hub.constants
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
assert huggingface_hub.HfApi().endpoint == "http://127.0.0.1:9"
repository.time.sleep = None
raise SystemExit(_run(["push", {str(model)!r}, {NAME!r}]))
"""
    ended = client.python(program)
    assert "http://127.0.0.1:9 cannot be reached" in ended.output and "qtip: " in ended.output
    assert ended.output.count("Traceback") == ended.output.count("SystemExit: 1") == 1  # of this program's own end


def test_a_server_error_that_passes_is_waited_for(hub, client, model):
    hub.fail("GET", "whoami", 503, times=2)
    hub.fail("POST", "repos/create", 500, times=1)
    hub.fail("PUT", "/store/", 500, times=1)
    hub.fail("POST", "/commit/", 502, times=3)
    hub.fail("GET", "/tree/", 429, times=1, **{"Retry-After": "0"})
    url_of(client.qtip("push", model, NAME))
    assert set(complete_uploads(hub).values()) == {1} and len(hub.commits) == 1


def test_a_server_error_for_ever_ends_with_what_to_do(hub, client, model):
    hub.fail("POST", "/commit/", 500)
    complaint(client.qtip("push", model, NAME), "500", "6 tries", NAME, "same command again")
    assert sum("/commit/" in path for _, path in hub.requests) == 6
    hub.clear()
    hub.fail("GET", "whoami", 500)
    complaint(client.qtip("push", model, NAME), "500", "6 tries")


def test_a_pull_request_is_not_opened_twice(hub, client, model):
    url_of(client.qtip("push", model, NAME))
    record(model, None, RESULT)
    hub.fail("POST", "/commit/", 500, times=1)
    complaint(client.qtip("push", model, NAME, "--create-pr"), "500", "same command again")
    assert sum("create_pr" not in path and "/commit/" in path for _, path in hub.requests) == 2


def test_permission_that_is_missing_later_is_named(hub, client, model):
    hub.fail("POST", "/commit/", 403, **{"X-Error-Message": "your token hf_writer_token may not"})
    said = complaint(client.qtip("push", model, NAME), "writer may not write to", "write access", "[token]")
    assert "hf_writer_token" not in said
    hub.fail("POST", "repos/create", 403)
    complaint(client.qtip("push", model, "writer/new"), "writer may not write to writer/new")


def test_a_damaged_directory_is_refused_before_anything_is_made(hub, client, model):
    content = bytearray(shards(model)[1].read_bytes())
    content[-1] ^= 1
    shards(model)[1].write_bytes(content)
    complaint(client.qtip("push", model, NAME), shards(model)[1].name, "damaged")
    assert not hub.repositories


def test_a_card_that_the_hub_refuses_is_named_before_anything_is_made(hub, client, model):
    text = (model / "README.md").read_text()
    (model / "README.md").write_text(text.replace("license: mit", "license: [not, one]"))
    complaint(client.qtip("push", model, NAME), "does not accept the card", "license", "README.md")
    assert not hub.repositories


def test_the_token_is_in_no_output_and_in_no_file(hub, client, model):
    outputs = [client.qtip("push", model, NAME, "--json", HF_HUB_VERBOSITY="error").output]
    record(model, None, RESULT)
    hub.fail("POST", "/commit/", 500)
    outputs.append(client.qtip("push", model, NAME).output)
    outputs.append(client.qtip("push", model, NAME, token="hf_unknown_token").output)
    assert all(outputs) and not [output for output in outputs if "hf_writer_token" in output or "hf_unknown_token" in output]
    for folder in (model, client.folder):
        for file in folder.rglob("*"):
            assert not file.is_file() or b"hf_writer_token" not in file.read_bytes(), file
    for content, _ in hub.tree(NAME).values():
        assert b"hf_writer_token" not in content


@pytest.mark.slow
def test_a_push_of_200_megabytes_killed_five_times_sends_no_file_twice(model, tmp_path):
    push_kills.enlarge(model, 200)
    figures = push_kills.run(model, 5, tmp_path)
    assert figures["statuses"] == [0, 0] and figures["commits"] == 1
    assert figures["files_sent_twice"] == 0 and figures["cut_off_uploads"] == 5
    assert figures["equal_files"] == figures["files"] - 1  # all but the card, which says where it was pushed
