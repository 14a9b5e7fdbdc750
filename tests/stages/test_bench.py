"""The benchmarks of codes and encoder: right figures, right keys, and no speed where a result is wrong."""

import pytest
import torch

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import bench
from qtipcli_kernels.spec import TrellisSpec


def test_distortion_approaches_but_never_beats_the_rate_distortion_bound():
    rows = bench.distortion(("1mad", "hyb"), (1.0, 2.0), tiles=24, state_bits=10)["rows"]
    assert [(row["code"], row["bits"]) for row in rows] == [("1mad", 1.0), ("1mad", 2.0), ("hyb", 1.0), ("hyb", 2.0)]
    for row in rows:
        # D(R) = 4^-R for a Gaussian source; Lloyd-Max, the best scalar quantizer, has .3634 and .1175 (method.md).
        assert row["bound"] == 4.0 ** -row["bits"]
        assert row["bound"] < row["mse"] < {1.0: 0.3634, 2.0: 0.1175}[row["bits"]]
        assert 0 < row["stderr"] < 0.1 * row["mse"]


def test_distortion_is_relative_to_the_variance_of_the_source():
    spec, source = TrellisSpec("3inst", 2, 8), torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    table_SV = torch.linspace(-2, 2, spec.states)[:, None]
    one, ten = (bench._distortion(factor * source, spec, table_SV, 1.0)["mse"] for factor in (1.0, 10.0))
    assert one == pytest.approx(ten, rel=1e-4)  # both are divided to the same tiles; float32 rounding alone differs


def test_encode_reports_a_ratio_and_memory_below_what_was_promised():
    report = bench.encode("3inst", 2.0, 8)
    (row,) = report["rows"]
    assert row["ratio"] == pytest.approx(row["weights_per_s"] / row["reference_weights_per_s"])
    # 4096 x 4096 float32 tiles and int32 states are 134 MB by themselves; 300 MB is the bound of the issue.
    assert 134 < row["peak_extra_MB"] < 300


def test_no_speed_is_given_for_an_encoder_that_is_wrong(monkeypatch):
    encode = bench.dispatch.encode
    monkeypatch.setattr(bench.dispatch, "encode", lambda tiles, spec, table: encode(-tiles, spec, table))
    with pytest.raises(QtipError, match="cost more"):
        bench.encode("3inst", 2.0, 8)


@pytest.mark.parametrize("text", ["4096", "4096x", "0x16", "4096x4100", "axb"])
def test_a_shape_that_cannot_be_packed_is_refused_by_name(text):
    with pytest.raises(SettingsError, match=text):
        bench.parse_shape(text)


def test_a_rate_that_a_code_lacks_names_the_nearest():
    with pytest.raises(SettingsError, match="2 and 3"):
        bench.distortion(("3inst",), (2.4,), tiles=2, state_bits=8)
