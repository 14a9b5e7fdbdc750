"""The product benchmark: what a row carries, that odd sizes are padded, and that a wrong product gets no speed."""

import pytest
import torch
from torch.nn import functional

from qtipcli.errors import SettingsError
from qtipcli.stages import bench_matvec, limits
from qtipcli.stages.sizes import Matrix
from qtipcli_kernels import dispatch
from qtipcli_kernels.decode import reference
from qtipcli_kernels.spec import TrellisSpec

SMALL = Matrix((64,), 96)
ODD = Matrix((37, 20), 100, "two odd ones")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 1 << 16})


def run(*matrices, **asked):
    return bench_matvec.run(matrices or (SMALL,), **{"codes": ("1mad",), "seconds": 0.01, "device": "cpu"} | asked)


def test_a_row_carries_what_was_measured_and_its_ratios():
    report = run(codes=("1mad", "3inst"), batches=(1, 3))
    assert [(row["code"], row["batch"]) for row in report["rows"]] == [("1mad", 1), ("1mad", 3), ("3inst", 1), ("3inst", 3)]
    assert (report["dtype"], report["wrong"], report["notes"], report["timing"]) == ("float32", [], [], "wall clock")
    for row in report["rows"]:
        assert (row["bits"], row["state_bits"], row["shape"], row["padded"]) == (2.0, 16, "64x96", "64x96")
        assert row["ratio"] == row["baseline_microseconds"] / row["microseconds"]
        assert row["float32_ratio"] == row["float32_microseconds"] / row["microseconds"]
        # 64 * 96 weights of 2 bits are 1,536 bytes.
        assert row["GB_per_s"] == pytest.approx(1536 / row["microseconds"] / 1e3)
        assert row["bandwidth_share"] == pytest.approx(row["GB_per_s"] / report["copy"]["GB_per_s"])
        assert row["weights_per_s"] == pytest.approx(64 * 96 / row["microseconds"] * 1e6)
        assert row["limit_share"] is None
        assert row["implementation"] == dispatch.implementation("cpu")
        assert 0 < row["error"] <= bench_matvec.LARGEST_ERROR
    assert set(bench_matvec.TABLE_COLUMNS) <= report["rows"][0].keys()


def test_where_the_instruction_rate_is_known_the_share_of_it_is_given(monkeypatch):
    monkeypatch.setattr(limits, "lane_operations", lambda device: 7.6e9)
    row = run()["rows"][0]
    assert row["limit_share"] == pytest.approx(row["weights_per_s"] / 1e9)  # 7.6 operations a weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_sizes_are_padded_and_the_dense_product_is_not(dtype):
    (row,) = run(ODD, dtype=dtype)["rows"]
    # Each part has whole tiles of its own: 48 + 32 outputs.
    assert (row["layer"], row["shape"], row["padded"]) == ("two odd ones", "57x100", "80x112")
    assert row["GB_per_s"] == pytest.approx(80 * 112 * 2 / 8 / row["microseconds"] / 1e3)
    assert ("float32_ratio" in row) == (dtype == "float32")
    case = bench_matvec.Case.draw(ODD, TrellisSpec("1mad", 2), CPU, torch.bfloat16)
    x = case.x(2, torch.bfloat16)
    assert x.shape == (2, 112)
    assert not x[:, 100:].any()
    (error,) = case.check([dispatch.matvec(x, case.trellis, case.spec)], [x])
    assert error <= bench_matvec.LARGEST_ERROR
    decoded = reference.decode(case.trellis, case.spec)
    rows = [*range(37), *range(48, 68)]
    assert torch.equal(case.half_OI, decoded[rows, :100].to(torch.bfloat16))


def test_the_error_is_that_of_the_whole_matrix_however_it_is_cut(monkeypatch):
    case = bench_matvec.Case.draw(Matrix((160,), 96), TrellisSpec("mul1", 3), CPU, torch.float32)
    x = case.x(3, torch.float32)
    found = dispatch.matvec(x, case.trellis, case.spec)
    weight = reference.decode(case.trellis, case.spec)
    exact = x.double() @ weight.double().T
    plain = (functional.linear(x, weight) - exact).norm()
    monkeypatch.setattr(dispatch, "STRIP_WEIGHTS", 3 * 16 * 96)
    # Products of a strip may be summed in another order by the library than those of the whole matrix.
    assert case.check([found], [x])[0] == pytest.approx(float((found - exact).norm() / plain), rel=0.5)
    assert torch.equal(case.float_OI, weight)


@pytest.mark.parametrize("wrong", [lambda y: y * (1 + 2**-12), lambda y: y * float("nan"), lambda y: y.roll(1, -1)])
def test_a_wrong_product_gets_no_speed_and_the_others_do(monkeypatch, wrong):
    right = dispatch.matvec
    monkeypatch.setattr(
        dispatch,
        "matvec",
        lambda x, trellis, spec, lut: (wrong if spec.code == "1mad" else torch.clone)(right(x, trellis, spec, lut)),
    )
    report = run(codes=("1mad", "mul1"))
    bad, good = report["rows"]
    assert len(report["wrong"]) == 1
    assert "1mad at 2 bits, 64x96, batch 1, is wrong by" in report["wrong"][0]
    for key in ("microseconds", "GB_per_s", "bandwidth_share", "weights_per_s", "ratio", "baseline_microseconds"):
        assert bad[key] is None
        assert good[key] > 0


def test_a_product_that_no_kernel_serves_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "implementation", lambda device: "reference")
    report = run()
    assert report["rows"][0]["implementation"] == "reference"
    assert "slow reference, not by a kernel" in report["notes"][0]


def test_copies_of_a_small_matrix_are_rotated_over(monkeypatch):
    monkeypatch.setattr(limits, "last_cache_bytes", lambda device: 4000)
    seen = []
    monkeypatch.setattr(
        bench_matvec.timing,
        "medians",
        lambda rotations, seconds, device: (
            seen.extend(rotations) or bench_matvec.timing.Timings((1.0,) * len(rotations), "not")
        ),
    )
    row = run()["rows"][0]
    packed, dense, _ = seen
    # 1,536 bytes packed and 12,288 dense, to fill 4 * 4,000.
    assert (len(packed), len(dense)) == (11, 2)
    assert len({call.args[1].data_ptr() for call in packed}) == 11
    assert all(torch.equal(call.args[1], packed[0].args[1]) for call in packed)
    assert row["from_memory"] is True


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        ({"codes": ("1mad",), "bits": (2.5,)}, r"2\.5 bits"),
        ({"codes": ("2mad",)}, "2mad"),
        ({"batches": (0,)}, "no rows of x"),
        ({"batches": ()}, "no rows of x"),
        ({"dtype": "float16"}, "'float16' on cpu.*float32 or bfloat16"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, fact):
    with pytest.raises(SettingsError, match=fact):
        run(**asked)
