"""The doctor tries what it reports on."""

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
