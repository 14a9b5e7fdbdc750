"""What the command line says: its commands, its start-up, its JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stages.fixtures import Qtip
from stages.tiny import FAST_OPTIONS, environment

COMMANDS = [
    "calibrate",
    "quantize",
    "pack",
    "finetune",
    "eval",
    "generate",
    "chat",
    "serve",
    "inspect",
    "push",
    "doctor",
    "demo",
    "bench",
]
LOOK = """
import sys
from qtipcli.cli.main import _run
status = _run(["--help"])
heavy = {"torch", "transformers", "numba", "datasets", "safetensors"} & set(sys.modules)
assert status == 0 and not heavy, (status, heavy)
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "calibrate" in done.stdout


def test_help_lists_the_commands_that_exist_and_no_stubs(qtip: Qtip) -> None:
    from qtipcli.cli.app import app

    outcome = qtip("--help")
    assert outcome.status == 0
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    names += [group.name for group in app.registered_groups]
    assert names == COMMANDS
    for name in COMMANDS:
        assert f" {name} " in outcome.out
        assert qtip(name, "--help").status == 0
    assert qtip("bench", "--help").status == 0


def test_help_shows_defaults_in_brackets(qtip: Qtip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes words in brackets for markup and drops them, unless they are escaped."""
    monkeypatch.setenv("COLUMNS", "300")
    assert "[the model's own, at most 2048]" in qtip("calibrate", "--help").out
    assert "[the one that DIRECTORY names]" in qtip("finetune", "--help").out
    assert "[a GPU where there is one]" in qtip("bench", "matvec", "--help").out


def test_the_version_is_one_line(qtip: Qtip) -> None:
    outcome = qtip("--version")
    assert outcome.status == 0
    assert outcome.out.startswith("qtip ")
    assert outcome.out.count("\n") == 1


def test_bad_usage_exits_with_two_and_names_the_option(qtip: Qtip) -> None:
    for arguments, word in ((("quantize",), "model"), (("quantize", "x", "--bitz", "2"), "--bitz"), (("frobnicate",), "frob")):
        outcome = qtip(*arguments)
        assert outcome.status == 2
        assert word in outcome.err
        assert "Traceback" not in outcome.err


def test_json_is_one_object_on_stdout(qtip: Qtip, quantize: Qtip, own_packed: Path, text: Path, tiny_model: Path) -> None:
    out = own_packed
    outcomes = {
        "inspect": qtip("inspect", out, "--json"),
        "doctor": qtip("doctor", "--json"),
        "generate": qtip("generate", out, "--prompt", "def f", "--tokens", "4", "--json"),
        "eval": qtip("eval", out, "--base", tiny_model, "--data", text, "--context", "32", "--windows", "4", "--json"),
        "quantize": quantize("--out", "new", "--json"),
    }
    reports = {}
    for name, outcome in outcomes.items():
        assert outcome.status == 0, (name, outcome.err)
        reports[name] = json.loads(outcome.out)
        assert isinstance(reports[name], dict)
    assert len(reports["inspect"]["rows"]) == 14
    assert reports["inspect"]["rows"] == reports["quantize"]["rows"]
    assert reports["generate"]["tokens"] == 4
    figures = "perplexity base_perplexity perplexity_ratio kl_mean kl_median kl_p99 kl_max top1_agreement tokens protocol"
    assert set(figures.split()) | {"bits_per_weight"} <= reports["eval"].keys()
    assert reports["eval"]["bits_per_weight"] == reports["inspect"]["bits_per_weight"]


def test_pack_adds_the_file_for_remote_code_with_its_checksum(qtip: Qtip, packed: Path, tiny_model: Path) -> None:
    command = ("pack", tiny_model, packed / "out.job", "--remote-code", "--out")
    assert qtip(*command, "coded").status == 0
    checked = json.loads(qtip("inspect", "coded", "--json").out)
    assert checked["checksums"] == json.loads(qtip("inspect", packed / "out", "--json").out)["checksums"] + 1
    assert json.loads(Path("coded/config.json").read_text())["auto_map"] == {"AutoConfig": "configuration_qtip.QtipAutoConfig"}
    assert "nothing was done" in qtip(*command, "coded").err
    # What was packed without it is not changed in silence.
    assert qtip(*command, packed / "out").status == 2


def test_a_plain_report_names_every_layer(qtip: Qtip, packed: Path) -> None:
    outcome = qtip("inspect", packed / "out")
    assert outcome.status == 0
    assert outcome.out.count("_proj") == 14
    assert "checksums right" in outcome.out
    assert not outcome.err


def test_the_layers_are_shown_as_they_are_done(quantize: Qtip) -> None:
    outcome = quantize("--out", "out")
    assert outcome.status == 0
    for word in (
        "layer",
        "shape",
        "bits",
        "relative proxy loss",
        "seconds",
        "left",
        "model.layers.1.mlp.down_proj",
        "64 x 100",
    ):
        assert word in outcome.err
    assert outcome.out.startswith("out: ")


def test_ctrl_c_saves_and_says_how_to_go_on(qtip: Qtip, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qtipcli", "quantize", tiny_model, *FAST_OPTIONS, "--data", text, "--out", "out"]
    process = subprocess.Popen(
        [*map(str, command)], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if "model.layers.0.self_attn.q_proj" in line:
            process.send_signal(signal.SIGINT)
            break
    said.append(process.stderr.read())
    assert process.wait(timeout=60) == 130
    assert "give the same command again to go on" in "".join(said)
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()
    again = qtip(*command[3:])
    assert again.status == 0, again.err
    assert "quantize (1 of 2 done before)" in again.err
    assert "calibrate" not in again.err
    assert again.out.startswith("out: ")
