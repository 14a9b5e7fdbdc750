"""Owns what `make test-gpu` measures: units of work in the order of their worth, each independent of the others.

A unit imports what it needs when it runs, so that a package that is missing costs only the units that use it. Rows are plain
JSON values.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Rows = Iterator[dict[str, Any]]

CODES = ("hyb", "hyb2", "1mad", "mul1", "3inst", "mcg", "lut")
PACKAGES = (
    "torch",
    "triton",
    "numba",
    "numpy",
    "transformers",
    "accelerate",
    "typer",
    "rich",
    "pydantic",
    "matplotlib",
    "pytest",
)


@dataclass(frozen=True)
class Sizes:
    """How large everything is. REAL is what the issue asks for; TINY lets the script itself be tested on a CPU."""

    device: str
    codes: tuple[str, ...]
    decoded: tuple[int, int]
    """Matrix whose decoding is compared bit for bit."""
    accuracy_bits: tuple[float, ...]
    accuracy_shapes: tuple[tuple[int, int], ...]
    accuracy_batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    matrix: tuple[int, int]
    bits: tuple[float, ...]
    batches: tuple[int, ...]
    prefill: int
    crossover: tuple[int, ...]
    crossover_codes: tuple[str, ...]
    encoder_codes: tuple[str, ...]
    encoder_state_bits: int
    model: str
    prompts: tuple[int, ...]
    tokens: int
    compiled: bool
    layer_models: tuple[str, ...]
    seconds: float
    tests: tuple[str, ...]


REAL = Sizes(
    device="cuda",
    codes=CODES,
    decoded=(8192, 12208),
    accuracy_bits=(2.0, 3.0, 4.0),
    accuracy_shapes=((4096, 4096), (1040, 2064)),
    accuracy_batches=(1, 3, 16),
    dtypes=("float16", "bfloat16"),
    matrix=(8192, 28672),
    bits=(2.0, 4.0),
    batches=(1, 16),
    prefill=2048,
    crossover=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256),
    crossover_codes=("hyb", "1mad", "3inst", "lut"),
    encoder_codes=("1mad", "hyb"),
    encoder_state_bits=16,
    model="llama-3.1-8b",
    prompts=(512, 2048),
    tokens=64,
    compiled=True,
    layer_models=("llama-3.1-8b", "qwen2.5-0.5b"),
    seconds=0.25,
    tests=("tests/kernels",),
)
"""1.0001e8 decoded weights; the rest are the issue's figures."""

TINY = Sizes(
    device="cpu",
    codes=("1mad", "lut"),
    decoded=(64, 48),
    accuracy_bits=(2.0,),
    accuracy_shapes=((64, 96),),
    accuracy_batches=(1, 3),
    dtypes=("float32",),
    matrix=(64, 96),
    bits=(2.0,),
    batches=(1,),
    prefill=8,
    crossover=(1, 4),
    crossover_codes=("1mad", "lut"),
    encoder_codes=("1mad",),
    encoder_state_bits=8,
    model=str(Path(__file__).parent / "tiny_config.json"),
    prompts=(8,),
    tokens=2,
    compiled=False,
    layer_models=(),
    seconds=0.01,
    tests=("tests/kernels/test_packing.py",),
)


@dataclass(frozen=True)
class Unit:
    """One piece of work. section, name: where its rows go and what it is called. limit: seconds until it is given up."""

    section: str
    name: str
    run: Callable[[], Rows]
    limit: float


def all_units(sizes: Sizes, only: Sequence[str] | None = None) -> list[Unit]:
    """Every unit, or those of the sections `only`, in the order in which they run; cheap, nothing is imported."""
    units = [Unit("environment", "environment", lambda: environment(sizes), 90)]
    units += [Unit("decode", code, lambda code=code: decode_equality(sizes, code), 60) for code in sizes.codes]
    for code in sizes.codes:
        for rate in sizes.bits:
            units.append(Unit("matvec", f"{code} {rate:g} bits", lambda c=code, r=rate: matvec(sizes, c, r), 60))
    units += [Unit("encoder", code, lambda code=code: encoder(sizes, code), 60) for code in sizes.encoder_codes]
    units.append(Unit("model", sizes.model, lambda: whole_model(sizes), 120))
    units += [Unit("prefill", code, lambda code=code: prefill(sizes, code), 60) for code in sizes.codes[:3]]
    units += [Unit("crossover", code, lambda code=code: crossover(sizes, code), 60) for code in sizes.crossover_codes]
    for code in sizes.codes:
        units.append(Unit("accuracy", code, lambda code=code: accuracy(sizes, code), 60))
    units += [Unit("tests", path, lambda path=path: kernel_tests(path), 150) for path in sizes.tests]
    units += [Unit("layers", name, lambda name=name: layers(sizes, name), 60) for name in sizes.layer_models]
    if sizes.compiled:  # last: compiling takes what time is left
        units.append(Unit("model compiled", sizes.model, lambda: whole_model(sizes, compiled=True), 240))
    return [unit for unit in units if not only or unit.section in only]


def environment(sizes: Sizes) -> Rows:
    """What this ran on, what is missing here, and how fast memory is."""
    row: dict[str, Any] = {"python": platform.python_version(), "commit": _commit(), "missing": []}
    for name in PACKAGES:
        try:
            row[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row["missing"].append(name)
    import torch

    if sizes.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "device": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "memory_GB": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "l2_MB": properties.L2_cache_size / 1e6,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    yield row  # first, should what follows fail
    from qtipcli.stages import limits
    from qtipcli_kernels import device as kernel_device
    from qtipcli_kernels import dispatch

    device = torch.device(sizes.device)
    yield {
        "copy": limits.copy_bandwidth(device),
        "lane_operations_per_s": limits.lane_operations(device),
        "implementation": dispatch.implementation(device),
        "why_no_kernels": kernel_device.why_not(device),
    }


def _commit() -> str | None:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def kernel_tests(path: str) -> Rows:
    """Run pytest on `path`: counts, and what failed. Raises RuntimeError where something did."""
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            path,
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            f"--junitxml={junit}",
        ]
        if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
            command += ["-n", "8"]  # compiling is what takes long
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
        if not junit.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode}:\n{tail}")
        suite = next(ElementTree.parse(junit).iter("testsuite"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}: {problem.get('message', '')[:400]}"
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    yield {"path": path, **counts, "seconds": float(suite.get("time", 0)), "failed": failed}
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}:\n{tail}")


def decode_equality(sizes: Sizes, code: str) -> Rows:
    """Decode a large matrix by kernel and by definition and compare the bits. Raises where one differs."""
    import torch

    from qtipcli_kernels import codes, dispatch, packing
    from qtipcli_kernels.decode import reference
    from qtipcli_kernels.spec import TILE, TrellisSpec

    spec = TrellisSpec.at_bits(code, 2.0)
    draw = torch.Generator(sizes.device).manual_seed(3)
    shape = packing.trellis_shape(*sizes.decoded, spec)
    trellis = torch.empty(shape, dtype=torch.int32, device=sizes.device).random_(-(2**31), 2**31 - 1, generator=draw)
    lut = codes.default_lut(spec)
    lut = None if lut is None else lut.to(sizes.device)
    found_OI = dispatch.decode(trellis, spec, lut)
    different = 0
    for outputs, strip_OI in reference.strips(trellis, spec, lut, max(1, (1 << 22) // (TILE * sizes.decoded[1]))):
        different += int((found_OI[outputs].view(torch.int32) != strip_OI.view(torch.int32)).sum())
    yield {"code": code, "bits": 2.0, "weights": found_OI.numel(), "different": different}
    if different:
        raise AssertionError(f"{different} of {found_OI.numel()} decoded weights are not those of the reference")


def accuracy(sizes: Sizes, code: str) -> Rows:
    """Error against float64 over torch's in the same dtype, and whether the same input gives the same bits."""
    import torch

    from qtipcli.stages import bench_matvec
    from qtipcli.stages.sizes import Matrix
    from qtipcli_kernels import dispatch
    from qtipcli_kernels.spec import TrellisSpec, offered_bits

    wrong = []
    for rate in (rate for rate in sizes.accuracy_bits if rate in offered_bits(code)):
        for outputs, inputs in sizes.accuracy_shapes:
            for dtype in sizes.dtypes:
                kind = getattr(torch, dtype)
                spec, matrix = TrellisSpec.at_bits(code, rate), Matrix((outputs,), inputs)
                case = bench_matvec.Case.draw(matrix, spec, torch.device(sizes.device), kind)
                xs = [case.x(batch, kind) for batch in sizes.accuracy_batches]
                found = [dispatch.matvec(x, case.trellis, spec, case.lut) for x in xs]
                again = [dispatch.matvec(x, case.trellis, spec, case.lut) for x in xs]
                errors = case.check(found, xs)
                same = all(torch.equal(*pair) for pair in zip(found, again, strict=True))
                yield {
                    "code": code, "bits": rate, "shape": matrix.shape, "dtype": dtype,
                    "batches": list(sizes.accuracy_batches), "errors": errors, "deterministic": same,
                }  # fmt: skip
                if not same or not max(errors) <= bench_matvec.LARGEST_ERROR:
                    wrong.append(f"{rate:g} bits, {matrix.shape}, {dtype}: errors {errors}, deterministic {same}")
    if wrong:
        raise AssertionError("; ".join(wrong))


def matvec(sizes: Sizes, code: str, rate: float) -> Rows:
    """The issue's matrix at every batch."""
    yield from _matvec_rows(sizes, ((sizes.matrix[0],), sizes.matrix[1]), code, (rate,), sizes.batches)


def prefill(sizes: Sizes, code: str) -> Rows:
    """As many rows as a long prompt has."""
    yield from _matvec_rows(sizes, ((sizes.matrix[0],), sizes.matrix[1]), code, (2.0,), (sizes.prefill,))


def layers(sizes: Sizes, name: str) -> Rows:
    """Every layer shape of a known model, 2 bits, batch 1."""
    from qtipcli.stages.sizes import sizes_of

    for matrix in sizes_of(name).matrices():
        for code in sizes.codes[:1]:
            for row in _matvec_rows(sizes, (matrix.parts, matrix.inputs, matrix.layer), code, (2.0,), (1,)):
                yield {"model": name, **row}


def _matvec_rows(sizes: Sizes, matrix: tuple, code: str, bits: tuple[float, ...], batches: tuple[int, ...]) -> Rows:
    from qtipcli.stages import bench_matvec
    from qtipcli.stages.sizes import Matrix

    report = bench_matvec.run(
        (Matrix(*matrix),), (code,), bits, batches, seconds=sizes.seconds, device=sizes.device, dtype=sizes.dtypes[0]
    )
    common = {"timing": report["timing"], "copy_GB_per_s": report["copy"]["GB_per_s"], "notes": report["notes"]}
    yield from ({**row, **common} for row in report["rows"])
    if report["wrong"]:
        raise AssertionError("; ".join(report["wrong"]))


def crossover(sizes: Sizes, code: str) -> Rows:
    """Fused decode and product, against decoding to a buffer and the library's product: which is faster from which batch on."""
    import torch
    from torch.nn import functional

    from qtipcli.stages import bench_matvec, limits, timing
    from qtipcli.stages.sizes import Matrix
    from qtipcli_kernels.spec import TrellisSpec

    device, kind = torch.device(sizes.device), getattr(torch, sizes.dtypes[0])
    spec, matrix = TrellisSpec.at_bits(code, 2.0), Matrix((sizes.matrix[0],), sizes.matrix[1])
    case = bench_matvec.Case.draw(matrix, spec, device, kind)
    fused, decode = _ways(sizes, case, kind)
    trellises = bench_matvec.copies(case.trellis, limits.last_cache_bytes(device))
    for batch in (batch for batch in sizes.crossover if code != "lut" or batch <= 4):  # its kernel is slow beyond measure
        x = case.x(batch, kind)
        fused_us, decoded_us = timing.medians(
            (
                [lambda t=t: fused(x, t) for t in trellises],  # noqa: B023, called before the next round
                [lambda t=t: functional.linear(x, decode(t)) for t in trellises],  # noqa: B023
            ),
            sizes.seconds,
            device,
        ).microseconds
        yield {"code": code, "shape": matrix.shape, "batch": batch, "fused_us": fused_us, "decoded_us": decoded_us}


def _ways(sizes: Sizes, case: Any, kind: Any) -> tuple[Callable, Callable]:
    """(fused product of any batch, decoder), the kernels themselves and not what dispatch would choose."""
    import torch

    from qtipcli_kernels import dispatch

    if sizes.device == "cpu":
        return (
            lambda x, trellis: dispatch.matvec(x, trellis, case.spec, case.lut),
            lambda trellis: dispatch.decode(trellis, case.spec, case.lut),
        )
    from qtipcli_kernels.decode import gpu as decode_gpu
    from qtipcli_kernels.matvec import gpu as matvec_gpu

    def fused(x: torch.Tensor, trellis: torch.Tensor) -> torch.Tensor:
        parts = x.split(matvec_gpu.MAX_ROWS)
        return torch.cat([matvec_gpu.matvec(part, trellis, case.spec, case.lut) for part in parts]).to(kind)

    return fused, lambda trellis: decode_gpu.decode(trellis, case.spec, case.lut, kind)


def encoder(sizes: Sizes, code: str) -> Rows:
    """Weights a second at 2 bits."""
    from qtipcli.stages import bench

    yield from bench.encode(code, 2.0, sizes.encoder_state_bits, sizes.device)["rows"]


def whole_model(sizes: Sizes, compiled: bool = False) -> Rows:
    """A packed model of real size with random weights, against the same decoded to 16 bits."""
    from qtipcli.stages import bench, bench_model

    code = sizes.codes[0]
    asked = bench_model.Asked(
        sizes.prompts[:1] if compiled else sizes.prompts, sizes.tokens, 4 * sizes.seconds, compiled=compiled
    )
    packing = bench.packing_of(code, 2.0, 16, "full")
    report = bench_model.run(None, None, sizes.model, *packing, device=sizes.device, asked=asked)
    common = {key: report[key] for key in ("model", "original", "dtype", "bits_per_weight", "implementation", "notes")}
    yield from ({"code": code, **common, **row} for row in report["rows"])
