"""The doctor tries what it reports on."""

import torch

from qtipcli.stages import doctor


def test_every_line_is_fine_on_a_machine_that_runs_the_tests():
    rows = {row["what"]: row for row in doctor.run()["rows"]}
    assert rows["CPU kernels"]["fine"], rows["CPU kernels"]["value"]
    assert rows["torch"]["fine"]


def test_a_kernel_that_does_not_run_is_reported_not_raised(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("LLVM is missing")

    monkeypatch.setattr(doctor.dispatch, "encode", broken)
    row = next(row for row in doctor.run()["rows"] if row["what"] == "CPU kernels")
    assert not row["fine"]
    assert "LLVM is missing" in row["value"]


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "5.9.0")
    assert not doctor._package("transformers")["fine"]


def test_a_gpu_without_kernels_is_a_problem_with_its_reason(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(doctor, "why_not", lambda device: "it has compute capability 7.5")
    row = doctor.run()["rows"][-1]
    assert not row["fine"]
    assert "Tesla T4" in row["value"] and "torch reference" in row["value"] and "7.5" in row["value"]


def test_a_gpu_whose_kernels_fail_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(doctor, "why_not", lambda device: None)

    def broken(*_: object) -> None:
        raise RuntimeError("ptxas is missing")

    monkeypatch.setattr(doctor.dispatch, "matvec", broken)
    monkeypatch.setattr(doctor.torch, "ones", lambda *_, **options: None)
    monkeypatch.setattr(doctor.torch, "zeros", lambda *_, device="cpu", **options: torch.empty(0))
    row = doctor._gpu()
    assert not row["fine"]
    assert row["value"] == "H200: its kernels failed: ptxas is missing"
