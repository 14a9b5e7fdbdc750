"""How products are timed and what bounds them: turns, graphs and their fallback, rotation, bandwidth, the roofline's picture.

There is no GPU here: torch.cuda is replaced by a clock that the products themselves advance.
"""

import contextlib
import struct

import pytest
import torch

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages import limits, plot, timing

GPU = torch.device("cuda", 0)


class FakeCuda:
    """A clock in microseconds, and graphs that replay what was called while they were captured."""

    def __init__(self, monkeypatch, refuse=False):
        self.now, self.refuse, self.capturing, self.replays = 0.0, refuse, None, 0
        for name in ("Event", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name.lower()))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)

    def product(self, microseconds, seen=None):
        def call():
            if self.capturing is None:
                self.now += microseconds
            else:
                self.capturing.append(microseconds)
            if seen is not None:
                seen.append(microseconds)

        return call

    def event(self, enable_timing):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        return Event()

    def cudagraph(self):
        clock = self

        class Graph:
            calls = ()

            def replay(self):
                clock.replays += 1
                clock.now += sum(self.calls)

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph):
        if self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing\nlong advice")
        self.capturing = []
        yield
        graph.calls, self.capturing = self.capturing, None


def test_on_a_gpu_a_turn_is_the_replay_of_a_graph(monkeypatch):
    clock = FakeCuda(monkeypatch)
    timings = timing.medians([[clock.product(50.0)], [clock.product(400.0)]], 0.01, GPU)
    assert timings.microseconds == pytest.approx((50.0, 400.0))
    assert timings.how == "CUDA events around graph replays"
    assert clock.replays > 2


def test_a_turn_goes_through_all_copies(monkeypatch):
    clock, seen = FakeCuda(monkeypatch), []
    rotation = [clock.product(90.0, seen), clock.product(110.0, seen), clock.product(100.0, seen)]
    turn = timing._Turn(rotation)
    # 2,000 us of about 90 us each: 22 calls, and the last ones are those that were captured.
    assert turn.calls == 22
    assert seen[-22:] == [90.0, 110.0, 100.0] * 7 + [90.0]
    assert turn.microseconds() == pytest.approx((7 * 300 + 90) / 22)


def test_what_cannot_be_captured_is_timed_without_and_says_so(monkeypatch):
    clock = FakeCuda(monkeypatch, refuse=True)
    timings = timing.medians([[clock.product(50.0)]], 0.0, GPU)
    assert timings.microseconds == pytest.approx((50.0,))
    assert "without graphs: RuntimeError: operation not permitted when stream is capturing" in timings.how
    assert "advice" not in timings.how


@pytest.mark.parametrize(
    ("cache", "matrix", "copies"), [(0, 10, 1), (100, 1000, 1), (100, 399, 2), (100, 100, 4), (10**9, 1, 512)]
)
def test_copies_fill_the_last_cache_four_times(cache, matrix, copies):
    assert timing.copies_needed(matrix, cache) == copies


def test_the_first_call_of_a_turn_is_not_counted_on_a_cpu(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "CALLS_IN_TURN", 2)

    def product(name, seconds):
        def call():
            # The first of each turn takes a hundred times as long.
            now[0] += seconds * (100 if calls[-1:] != [name] else 1)
            calls.append(name)

        return [call]

    timings = timing.medians([product("a", 1e-6), product("b", 3e-6)], 0.0, torch.device("cpu"))
    assert calls == ["a"] * 2 + ["b"] * 2
    assert timings.microseconds == pytest.approx((1.0, 3.0))
    assert timings.how == "wall clock"


def test_bandwidth_counts_both_directions(monkeypatch):
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 3_000_000})
    monkeypatch.setattr(limits, "_seconds", lambda call, device: 0.001)
    measured = limits.copy_bandwidth(torch.device("cpu"))
    assert measured["GB_per_s"] == pytest.approx(6.0)
    assert "read and bytes written" in measured["how"]


def test_the_instruction_rate_is_known_by_a_gpu_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert limits.lane_operations(GPU) == 33e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    assert limits.lane_operations(GPU) is None
    assert limits.lane_operations(torch.device("cpu")) is None
    assert limits.weights_limit("hyb", 33e12) == 33e12 / 4.0
    assert limits.weights_limit("lut", 33e12) is None
    assert limits.weights_limit("hyb", None) is None


def report(rate=None, **changes):
    row = {
        "code": "1mad",
        "bits": 2.0,
        "batch": 1,
        "microseconds": 9.0,
        "weights_per_s": 2e10,
        "ratio": 2.0,
        "baseline": "float16",
    }
    rows = [row | changes, row | {"code": "hyb", "bits": 4.0, "batch": 4} | changes]
    return {"device": "a device", "copy": {"GB_per_s": 25.0}, "lane_operations_per_s": rate, "rows": rows}


@pytest.mark.parametrize("rate", [None, 1e11])
def test_a_roofline_is_a_png_of_some_size(tmp_path, rate):
    plot.roofline(report(rate), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800
    assert height > 500


def test_a_roofline_shows_rows_baseline_bandwidth_and_the_instruction_limit(tmp_path, monkeypatch):
    drawn = {}
    real = plot._matplotlib()

    def keep(**how):
        drawn["figure"] = real[0](**how)
        return drawn["figure"]

    monkeypatch.setattr(plot, "_matplotlib", lambda: (keep, real[1]))
    plot.roofline(report(1e11), tmp_path / "a.png")
    (axes,) = drawn["figure"].axes
    points = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
    # 2 bits are 4 weights a byte, 4 bits 2, 16 bits a half; the dense product had half the speed.
    assert points == {"1mad": [[4, 2e10]], "hyb": [[2, 2e10]], "torch float16": [[0.5, 1e10]] * 2}
    memory, *horizontal = axes.lines
    assert [y / x for x, y in memory.get_xydata()] == pytest.approx([25e9] * 2)
    assert sorted(line.get_ydata()[0] for line in horizontal) == pytest.approx([1e11 / 7.6, 1e11 / 4.0])
    assert {text.get_text() for text in axes.texts} == {"x4", "instructions: 1mad", "instructions: hyb"}


def test_without_a_speed_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(QtipError, match="no row has a speed"):
        plot.roofline(report(microseconds=None), tmp_path / "a.png")


@pytest.mark.parametrize(("name", "fact"), [("a.pdf", "no PNG"), ("a", "no PNG"), ("no/a.png", "no does not exist")])
def test_a_file_that_cannot_be_drawn_to_is_refused_before_the_measurement(tmp_path, monkeypatch, name, fact):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=fact):
        plot.check_target(tmp_path.relative_to(tmp_path) / name)


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(QtipError, match="pip install matplotlib"):
        plot.check_target(tmp_path / "a.png")
