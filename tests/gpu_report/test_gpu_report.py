"""`make test-gpu` itself, on a CPU: its refusal without a GPU, a tiny run of everything, and that a failure costs one unit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stages.tiny import environment

from gpu_report import __main__ as command
from gpu_report import supervisor, units
from gpu_report.broken_units import UNITS
from gpu_report.figures import crossover_batches, figures, markdown

FAKE_WORKER = [sys.executable, "-m", "gpu_report.broken_units"]


def test_without_a_gpu_it_says_so_at_once_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == "make test-gpu: nothing was measured: torch sees no GPU on this machine\n"
    assert not said.out
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_the_kernels_cannot_use_is_refused_by_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("qtipcli_kernels.device.why_not", lambda device: "it has compute capability 7.5")
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "capability 7.5" in capsys.readouterr().err


def test_everything_runs_in_tiny_and_ends_in_one_json(tmp_path):
    asked = [sys.executable, "-m", "gpu_report", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("gpu-tiny-run-on-a-cpu-20")
    assert file.suffix == ".json"
    report = json.loads(file.read_text())
    assert report["complete"]
    assert not report["not_run"]
    sections = report["sections"]
    assert set(sections) == {unit.section for unit in units.all_units(units.REAL)} - {"layers", "model compiled"}
    for name, section in sections.items():
        assert section["rows"], name
        assert not section["failed"], name
    assert [row["different"] for row in sections["decode"]["rows"]] == [0, 0]
    assert sections["tests"]["rows"][0]["tests"] > 10
    assert sections["environment"]["rows"][0]["torch"] == torch.__version__
    assert "missing" in sections["environment"]["rows"][0]
    assert {row["measure"] for row in sections["model"]["rows"]} >= {"prefill of 8", "decode", "peak memory"}
    assert all(row["deterministic"] for row in sections["accuracy"]["rows"])
    measured = {row["figure"] for row in report["figures"] if row["measured"] is not None}
    assert "times torch FP16: 2 bits, batch 1, computed codes, slowest" in measured
    assert "| figure | asked |" in done.stdout


@pytest.fixture
def report(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return {"sections": {}}


def test_a_unit_that_fails_in_any_way_costs_only_itself(report):
    written = []
    supervisor.supervise(UNITS, FAKE_WORKER, report, lambda: written.append(json.dumps(report)), 120)
    values = {name: [row["value"] for row in section["rows"]] for name, section in report["sections"].items()}
    assert values == {"a": [0, 1, 2, 3], "b": [10], "c": [20, 30], "d": [40], "e": [50, 51]}
    failed = {each["unit"]: each["text"] for section in report["sections"].values() for each in section["failed"]}
    assert list(failed) == ["raises", "dies", "hangs", "leaves"]
    assert "ValueError: what went wrong" in failed["raises"]
    assert "Traceback" in failed["raises"]
    assert failed["dies"] == "the worker ended with status 7:\nlast words\n"
    assert failed["hangs"] == "ended after 1 s: it took longer than it may"
    assert "no such device" in failed["leaves"]
    assert report["not_run"] == []
    # What a kill at any moment leaves: after the first row, it was there.
    assert any('{"value": 0}' in text and '{"value": 1}' not in text for text in written)


@pytest.mark.parametrize(("answers", "begun"), [(True, [0, 1, 2]), (False, [0, 1])])
def test_a_worker_goes_on_after_a_failure_as_long_as_its_gpu_answers(monkeypatch, answers, begun):
    monkeypatch.setattr(supervisor, "_gpu_answers", lambda: answers)
    out = io.StringIO()
    assert supervisor.work(UNITS[:3], 0, out) == (0 if answers else 1)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [each["unit"] for each in said if each["event"] == "begin"] == begun


def test_what_does_not_fit_into_the_time_is_named(report):
    supervisor.supervise(UNITS[4:], [*FAKE_WORKER[:-1], "gpu_report.broken_units"], report, lambda: None, 0.0)
    assert report["not_run"] == ["c: hangs", "d: leaves", "e: last"]


def test_the_time_for_everything_ends_a_unit_that_is_under_way(report, monkeypatch):
    patient = [units.Unit("c", "hangs", lambda: iter(()), 60)] * 2
    sleeper = [sys.executable, "-c", 'import time; print(\'{"unit": 0, "event": "begin"}\', flush=True); time.sleep(600)']
    supervisor.supervise(patient, sleeper, report, lambda: None, 3.0)
    assert "the time for everything was up" in report["sections"]["c"]["failed"][0]["text"]
    assert report["not_run"] == ["c: hangs"]


def test_a_worker_that_cannot_start_fails_each_unit_with_its_words(report):
    broken = [sys.executable, "-c", "import no_such_package_of_ours"]
    supervisor.supervise(UNITS[:2], broken, report, lambda: None, 60)
    assert "No module named 'no_such_package_of_ours'" in report["sections"]["a"]["failed"][0]["text"]
    assert "No module named 'no_such_package_of_ours'" in report["sections"]["b"]["failed"][0]["text"]


def test_no_worker_outlives_its_supervisor_call(report, tmp_path):
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    supervisor.supervise(UNITS[:1], [sys.executable, "-c", script], report, lambda: None, 3.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_failing_kernel_tests_are_named(tmp_path):
    (tmp_path / "test_one.py").write_text("def test_right():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n")
    rows = units.kernel_tests(str(tmp_path / "test_one.py"))
    row = next(rows)
    assert (row["tests"], row["failures"], row["errors"]) == (2, 1, 0)
    assert "test_bad" in row["failed"][0]
    with pytest.raises(RuntimeError, match="status 1"):
        next(rows)


def test_tests_that_cannot_be_collected_are_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="pytest ended with status 4"):
        list(units.kernel_tests(str(tmp_path / "absent.py")))


def product(code, bits, batch, ratio):
    return {
        "code": code,
        "bits": bits,
        "batch": batch,
        "ratio": ratio,
        "error": 1.0,
        "bandwidth_share": 0.5,
        "limit_share": 0.25,
    }


def test_figures_are_held_against_what_was_asked():
    sections = {
        "decode": {"rows": [{"different": 0}, {"different": 3}]},
        "accuracy": {"rows": [{"errors": [0.9, 1.7]}]},
        "matvec": {
            "rows": [
                product("hyb", 2.0, 1, 3.0),
                product("1mad", 2.0, 1, 2.0),
                product("mcg", 2.0, 1, 1.4),
                product("hyb", 4.0, 1, None),
            ]
        },
        "prefill": {"rows": [{"ratio": 0.8}, {"ratio": 0.75}]},
        "encoder": {"rows": [{"weights_per_s": 30e6}, {"weights_per_s": 9e6}]},
        "model": {"rows": [{"measure": "decode", "ratio": 2.6}, {"measure": "weights", "ratio": 9.0}]},
    }
    found = {row["figure"]: (row["measured"], row["met"]) for row in figures(sections)}
    assert found == {
        "decoded weights that differ from the reference, of 10^8, worst code": (3, False),
        "matvec error over torch's, fp16 and bf16, worst": (1.7, True),
        "times torch FP16: 2 bits, batch 1, HYB": (3.0, True),
        "times torch FP16: 2 bits, batch 1, computed codes, slowest": (1.4, False),
        "times torch FP16: 4 bits, batch 1, HYB": (None, None),
        "times torch FP16: 4 bits, batch 1, computed codes, slowest": (None, None),
        "times torch FP16: 2 bits, batch 16, HYB": (None, None),
        "times torch FP16: 2 bits, batch 16, computed codes, slowest": (None, None),
        "times torch FP16: 4 bits, batch 16, HYB": (None, None),
        "times torch FP16: 4 bits, batch 16, computed codes, slowest": (None, None),
        "prefill rows, times torch FP16, slowest": (0.75, True),
        "encoder, 2 bits, M weights/s, slowest code": (9.0, False),
        "8B model decode, times FP16, CUDA graphs": (2.6, True),
        "8B model decode, times FP16, torch.compile and CUDA graphs": (None, None),
    }
    assert "| times torch FP16: 2 bits, batch 1, HYB | 2.5 | 4 | 3 | yes |" in markdown(figures(sections)).splitlines()


def test_the_page_has_the_table_of_the_last_report():
    folder = Path(units.ROOT) / "docs" / "benchmarks"
    report = json.loads(max(folder.glob("gpu-*.json"), key=lambda file: file.stem[-10:]).read_text())
    assert markdown(figures(report["sections"])) in (folder / "gpu.md").read_text()


def test_the_crossover_is_the_batch_from_which_on_decoding_is_faster():
    def rows(code, *times):
        return [{"code": code, "batch": batch, "fused_us": fused, "decoded_us": decoded} for batch, fused, decoded in times]

    measured = [
        *rows("hyb", (1, 1, 9), (16, 5, 9), (32, 10, 9), (64, 20, 9)),
        *rows("1mad", (1, 1, 9), (16, 10, 9), (32, 5, 9)),  # slower again: a reading among others
    ]
    assert crossover_batches({"crossover": {"rows": measured}}) == {"hyb": 32, "1mad": None}


def test_a_device_name_becomes_a_part_of_a_file_name():
    assert command.slug("NVIDIA H200 (141GB)") == "nvidia-h200-141gb"
