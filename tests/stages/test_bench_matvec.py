"""The product benchmark: what a row carries, and that a wrong product gets no speed."""

import pytest

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import bench_matvec
from qtipcli_kernels import dispatch


def test_a_row_carries_what_was_measured_and_its_ratio():
    report = bench_matvec.run(shapes=((64, 96),), codes=("1mad", "3inst"), bits=(2.0,), batches=(1, 3), seconds=0.01)
    assert [(row["code"], row["batch"]) for row in report["rows"]] == [("1mad", 1), ("1mad", 3), ("3inst", 1), ("3inst", 3)]
    for row in report["rows"]:
        assert (row["bits"], row["state_bits"], row["shape"]) == (2.0, 16, "64x96")
        assert row["ratio"] == row["baseline_microseconds"] / row["microseconds"]
        assert row["error"] <= bench_matvec.LARGEST_ERROR


def test_a_wrong_product_gets_no_speed(monkeypatch):
    right = dispatch.matvec
    monkeypatch.setattr(dispatch, "matvec", lambda *arguments: right(*arguments) * (1 + 2**-12))
    with pytest.raises(QtipError, match=r"wrong by .* no speed is given"):
        bench_matvec.run(shapes=((64, 96),), codes=("1mad",), seconds=0.01)


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        ({"shapes": ((64, 100),)}, "64x100 has no whole tiles"),
        ({"shapes": ((0, 64),)}, "0x64"),
        ({"codes": ("1mad",), "bits": (2.5,)}, r"2\.5 bits"),
        ({"batches": (0,)}, "no rows of x"),
        ({"batches": ()}, "no rows of x"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, fact):
    with pytest.raises(SettingsError, match=fact):
        bench_matvec.run(**asked)
