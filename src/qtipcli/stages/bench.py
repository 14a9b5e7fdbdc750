"""Owns the benchmarks of codes and encoder: distortion, weights per second, peak memory; and which device one runs on."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qtipcli.errors import QtipError, SettingsError
from qtipcli.quant.scale import rms, source_scale
from qtipcli.quant.transform import Transform
from qtipcli.stages.progress import Silent, Watcher
from qtipcli_kernels import dispatch, packing
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.spec import CODE_WEIGHTS_PER_STEP, MIN_STATE_BITS, TILE_WEIGHTS, SpecError, TrellisSpec, offered_bits
from qtipcli_kernels.viterbi import reference

SEED = 1

CODES = tuple(CODE_WEIGHTS_PER_STEP)
BITS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)

SCALE_STEPS = (-0.1, -0.05, 0.0, 0.05, 0.1)
"""What `--scales` adds to the table's scale."""

ENCODE_ROUNDS = 5
ENCODE_TILES, REFERENCE_TILES = 64, 2
"""Tiles in one timing of the encoder and of the reference, which is slower by two orders."""

MEMORY_MATRIX = 4096
"""Rows and columns of the matrix whose encoding's memory is measured."""


GPU_ENCODE_SECONDS = 0.3
"""About how long one timing of the encoder on a GPU takes; the number of tiles follows from it."""

GPU_FIRST_TILES, GPU_CHECKED_TILES = 256, 32
"""Tiles of the first, short timing there, and those whose walks are compared with the CPU encoder's."""

MOST_EXCESS = 0.003
"""Largest share by which a GPU's walks, costs kept in 16 bits, may differ from the CPU's: under half of what `fast` costs."""

DTYPES = {"cuda": ("float16", "bfloat16"), "cpu": ("float32", "bfloat16")}
"""Of activations, by device type; the first one is the default."""


def device_name(device: torch.device | None = None) -> str:
    """What a report says it ran on."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from qtipcli.stages.doctor import cpu_name  # asks LLVM, which a GPU does not need

    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def chosen_device(name: str | None) -> torch.device:
    """The device asked for; a GPU where there is one if None. Raises SettingsError where there is no such device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise SettingsError(f"there is no device {name!r}", "give cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if int(match[1] or 0) >= gpus:
        raise SettingsError(f"there is no device {name}: torch sees {gpus} GPUs", "give --device cpu, or see qtip doctor")
    torch.cuda.set_device(int(match[1] or 0))
    return torch.device("cuda", torch.cuda.current_device())


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The activations' dtype asked for, the device's default if None. Raises SettingsError that lists what there is."""
    offered = DTYPES[device.type]
    if name is not None and name not in offered:
        raise SettingsError(f"products are not measured in {name!r} on {device.type}", f"give {' or '.join(offered)}")
    return getattr(torch, name or offered[0])


def distortion(
    codes: tuple[str, ...] | None,
    bits: tuple[float, ...] | None,
    tiles: int,
    state_bits: int,
    search_scales: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Mean squared error per weight of i.i.d. N(0, 1) tiles, relative to their variance.

    Returns {"device", "rows"}: code, bits, state_bits, scale (rms of the source over rms of the code), mse, stderr, bound.
    """
    watcher = watcher or Silent()
    specs = _specs(codes, bits, state_bits)
    source = torch.randn(tiles, TILE_WEIGHTS, generator=torch.Generator().manual_seed(SEED))
    rows = []
    watcher.begin("distortion", len(specs))
    for spec in specs:
        table_SV = tabulate(spec)
        start = source_scale(spec)
        scales = [round(start + step, 3) for step in SCALE_STEPS] if search_scales else [start]
        rows.append(min((_distortion(source, spec, table_SV, scale) for scale in scales), key=lambda row: row["mse"]))
        watcher.advance(f"{spec.code} {spec.bits:g} bits: {rows[-1]['mse']:.5f}")
    return {"device": device_name(), "rows": rows}


def _specs(codes: tuple[str, ...] | None, bits: tuple[float, ...] | None, state_bits: int) -> list[TrellisSpec]:
    """Every code at every rate; rates that a code lacks are left out unless both were asked for by name."""
    try:
        return [
            TrellisSpec.at_bits(code, rate, state_bits)
            for code in codes or CODES
            for rate in bits or BITS
            if (codes and bits) or rate in offered_bits(code)
        ]
    except SpecError as error:
        raise SettingsError(str(error), "qtip bench distortion --help") from error


def _distortion(source: torch.Tensor, spec: TrellisSpec, table_SV: torch.Tensor, scale: float) -> dict[str, Any]:
    step_size = rms(source) / (scale * rms(table_SV))
    tiles = source / step_size
    states = dispatch.encode(tiles, spec, table_SV)
    variance = float(tiles.square().mean(dtype=torch.float64))
    per_tile = reference.distortion(tiles, states, table_SV) / TILE_WEIGHTS / variance
    return {
        "code": spec.code,
        "bits": spec.bits,
        "state_bits": spec.state_bits,
        "weights_per_step": spec.weights_per_step,
        "scale": scale,
        "mse": float(per_tile.mean()),
        "stderr": float(per_tile.std() / len(per_tile) ** 0.5),
        "bound": 4.0**-spec.bits,
    }


def encode(code: str, bits: float, state_bits: int, device: str = "cpu") -> dict[str, Any]:
    """The encoder against the textbook gather formulation, in turns in one run; medians. On a GPU, its rate alone.

    Returns {"device", "rows"}: code, bits, state_bits, weights_per_s, reference_weights_per_s, ratio, peak_extra_MB; on a GPU
    code, bits, state_bits, weights_per_s, tiles, excess_distortion (over the CPU's walks), peak_extra_MB, implementation.
    Raises QtipError, and gives no speed, where the walks are not as good as they must be.
    """
    try:
        spec = TrellisSpec.at_bits(code, bits, state_bits)
    except SpecError as error:
        raise SettingsError(str(error), "qtip bench encode --help") from error
    where = chosen_device(device)
    if where.type != "cpu":
        return {"device": device_name(where), "rows": [_encode_on_gpu(spec, where)]}
    table_SV = tabulate(spec)
    tiles = torch.randn(ENCODE_TILES, TILE_WEIGHTS, generator=torch.Generator().manual_seed(SEED)) * rms(table_SV)
    few = tiles[:REFERENCE_TILES]
    dispatch.encode(few, spec, table_SV)  # compiles
    fast_s, slow_s = [], []
    for _ in range(ENCODE_ROUNDS):
        states, seconds = _timed(lambda: dispatch.encode(tiles, spec, table_SV))
        fast_s.append(seconds / tiles.numel())
        expected, seconds = _timed(lambda: reference.encode(few, spec, table_SV))
        slow_s.append(seconds / few.numel())
    found_cost = reference.distortion(few, states[:REFERENCE_TILES], table_SV)
    expected_cost = reference.distortion(few, expected, table_SV)
    if not torch.allclose(found_cost, expected_cost, rtol=1e-6):
        raise QtipError("the encoder's walks cost more than the reference's: no speed is given", "report this as a bug")
    fast, slow = 1 / statistics.median(fast_s), 1 / statistics.median(slow_s)
    row = {
        "code": code,
        "bits": bits,
        "state_bits": state_bits,
        "weights_per_s": fast,
        "reference_weights_per_s": slow,
        "ratio": fast / slow,
        "peak_extra_MB": _peak_extra_megabytes(spec),
    }
    return {"device": device_name(), "rows": [row]}


def _encode_on_gpu(spec: TrellisSpec, device: torch.device) -> dict[str, Any]:
    table_SV = tabulate(spec)
    table = table_SV.to(device)
    draw = torch.Generator(device).manual_seed(SEED)

    def gaussian(count: int) -> torch.Tensor:
        return torch.randn(count, TILE_WEIGHTS, generator=draw, device=device) * rms(table_SV)

    few = gaussian(GPU_CHECKED_TILES)
    found = dispatch.encode(few, spec, table).cpu()  # compiles
    expected = dispatch.encode(few.cpu(), spec, table_SV)
    costs = [float(reference.distortion(few.cpu(), states, table_SV).sum()) for states in (found, expected)]
    excess = costs[0] / costs[1] - 1
    packing.pack(found, spec)  # refuses what is no walk
    if not abs(excess) <= MOST_EXCESS:
        raise QtipError(
            f"the GPU encoder's walks cost {excess:+.2%} against the CPU's: no speed is given", "report this as a bug"
        )
    tiles = gaussian(GPU_FIRST_TILES)
    seconds = _gpu_seconds(lambda: dispatch.encode(tiles, spec, table))
    tiles = gaussian(GPU_FIRST_TILES * max(1, min(512, round(GPU_ENCODE_SECONDS / seconds))))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds = statistics.median(_gpu_seconds(lambda: dispatch.encode(tiles, spec, table)) for _ in range(ENCODE_ROUNDS))
    return {
        "code": spec.code,
        "bits": spec.bits,
        "state_bits": spec.state_bits,
        "weights_per_s": tiles.numel() / seconds,
        "tiles": len(tiles),
        "excess_distortion": excess,
        "peak_extra_MB": (torch.cuda.max_memory_allocated(device) - before) / 1e6,
        "implementation": dispatch.implementation(device),
    }


def _gpu_seconds(call: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _timed(call: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def _peak_extra_megabytes(spec: TrellisSpec) -> float:
    """Peak memory of encoding a whole 4096 x 4096 matrix, beyond the matrix, measured in a process of its own."""
    script = f"""
from qtipcli.stages.bench import encoding_peak
from qtipcli_kernels.spec import TrellisSpec
spec = TrellisSpec({spec.code!r}, {spec.bits_per_step}, {spec.state_bits}, {spec.weights_per_step})
print(encoding_peak(spec, {MEMORY_MATRIX}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise QtipError(f"the memory measurement failed: {done.stderr.strip().splitlines()[-1]}", "report this as a bug")
    return float(done.stdout)


def encoding_peak(spec: TrellisSpec, size: int) -> float:
    """Encode every tile of a size x size matrix; returns the megabytes (1e6 bytes) by which the process's peak grew.

    All tiles are encoded with the smallest trellis of the same rate, which takes seconds instead of minutes and whose tiles and
    states are as large; then some with `spec`, whose scratch memory is larger and comes on top.
    """
    from qtipcli_kernels.threads import thread_count

    small = TrellisSpec(spec.code, spec.bits_per_step, MIN_STATE_BITS, spec.weights_per_step)
    for each in (spec, small):
        dispatch.encode(torch.zeros(1, TILE_WEIGHTS), each)  # compiles, which takes memory of its own
    weight_OI = torch.randn(size, size)
    before = _peak_bytes()
    tiles = packing.tiles_from_matrix(weight_OI)
    states = dispatch.encode(tiles, small)
    dispatch.encode(tiles[: 8 * thread_count()], spec)
    grown = _peak_bytes() - before
    del states
    return grown / 1e6


def _peak_bytes() -> int:
    """Most memory that this process has held so far. Not getrusage, whose figure a child inherits from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (4096, 11008), any positive sizes. Raises SettingsError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise SettingsError(f"{text!r} is not a shape", "give OUTPUTSxINPUTS, such as 4096x11008")
    return int(match[1]), int(match[2])


def packing_of(code: str, bits: float, state_bits: int, transform: str) -> tuple[TrellisSpec, Transform]:
    """How a random model is packed, from what was typed. Raises SettingsError."""
    try:
        return TrellisSpec.at_bits(code, bits, state_bits), Transform.parse(transform)
    except (SpecError, QtipError) as error:
        raise SettingsError(str(error), "qtip bench model --help") from error
