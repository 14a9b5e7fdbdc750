"""The NVIDIA product kernel as it is compiled, run in the emulator (ptx.py): the interpreter cannot see PTX.

Oracle: the definition. Rows of x with a single one pick columns of the matrix, exactly; other rows no worse than twice torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from ptx_of_matvec import spec_of
from random_packed import name, packed, table, x_rows

from qtipcli_kernels import lane
from qtipcli_kernels.decode import reference
from qtipcli_kernels.fragments import fragments
from qtipcli_kernels.matvec import gpu, loop
from qtipcli_kernels.spec import CODE_WEIGHTS_PER_STEP, MAX_BITS_PER_STEP, TrellisSpec

WIDE = "sm_90:hyb-kV4-L16-V2:1:wide"

CHOSEN = [
    "sm_80:1mad-kV2-L16-V1:1", "sm_90:mul1-kV3-L16-V1:3", "sm_80:3inst-kV2-L16-V1:9", "sm_80:3inst-kV1-L10-V1:1",
    "sm_90:mcg-kV7-L16-V1:1", "sm_80:1mad-kV8-L12-V1:2", "sm_80:mul1-kV5-L16-V1:16", "sm_80:hyb-kV4-L16-V2:1",
    "sm_90:hyb-kV3-L13-V2:8", "sm_80:hyb2-kV7-L16-V2:2", "sm_80:hyb2-kV4-L16-V2:16", "sm_80:hyb-kV8-L16-V2:1",
    "sm_80:hyb2-kV5-L16-V2:3:wide", WIDE,
]  # fmt: skip
"""Every code, every way a window can lie in its words, one and two matrix instructions a tile, two architectures."""

EVERY = [
    f"sm_80:{name(TrellisSpec(code, bits_per_step, state_bits, v))}:{1 + bits_per_step % 3}"
    for code, several in CODE_WEIGHTS_PER_STEP.items()
    if code != "lut"
    for v in several
    for bits_per_step in range(v, MAX_BITS_PER_STEP + 1)
    for state_bits in (9, 16)
]

OUTPUTS, INPUTS, CHUNK = 5 * 16, 27 * 16, 4
"""Five rows of tiles, one more than a program's; 27 columns: two programs, of a warp's chunks one has three tiles, one none."""


def compiled(cases: list[str], out: Path) -> Path:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["kernels", *sys.path])
    script = Path(__file__).with_name("ptx_of_matvec.py")
    done = subprocess.run([sys.executable, script, out, *cases], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def launch(
    text: str, spec: TrellisSpec, x: torch.Tensor, trellis: torch.Tensor, lut: torch.Tensor | None, wide: bool, **options
):
    """float32 [S, B, O] as gpu.partial_products arranges it, what is never written being NaN; and the emulator's report."""
    tile_rows, tile_columns = len(trellis), x.shape[1] // 16
    warps = gpu.nvidia_arguments(spec, len(x), wide)["WARPS"]
    rows_a_program = warps // loop.WARP_PARTS * loop.WARP_ROWS
    grid = (-(-tile_rows // rows_a_program), -(-tile_columns // (CHUNK * loop.WARP_PARTS)))
    partial = np.full((grid[1], len(x), tile_rows * 16), np.nan, np.float32)
    entries = np.zeros(1, np.uint32) if lut is None else lut.numpy().view(np.uint32).reshape(-1).copy()
    arrays = [fragments(x).numpy(), trellis.numpy().view(np.uint32), entries, partial]
    operands = [*arrays, tile_rows, tile_columns, CHUNK, len(x)]
    report = ptx.launch(text, grid, warps, [*operands, float(lane.UNIT.get(spec.code, 1.0))], **options)
    return torch.from_numpy(partial), report


def check(case: str, text: str) -> None:
    _, spec_name, batch, *wide = case.split(":")
    spec, rows, wide = spec_of(spec_name), int(batch), bool(wide)
    trellis, lut = packed(spec, OUTPUTS, INPUTS), table(spec)
    weight = reference.decode(trellis, spec, lut)
    columns = torch.randint(0, INPUTS, (rows,), generator=torch.Generator().manual_seed(rows))
    ones = torch.zeros(rows, INPUTS, dtype=torch.float16)
    ones[torch.arange(rows), columns] = 1
    partial, _ = launch(text, spec, ones, trellis, lut, wide)
    assert torch.equal(partial.sum(0), weight[:, columns].T)
    x = x_rows(rows, INPUTS).half()
    partial, _ = launch(text, spec, x, trellis, lut, wide)
    exact = x.double() @ weight.double().T
    assert (partial.sum(0) - exact).norm() <= 2 * (x @ weight.half().T - exact).norm()


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Path:
    return compiled(CHOSEN, tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize("case", CHOSEN)
def test_the_compiled_kernel_is_the_definition(case, chosen):
    check(case, (chosen / f"{case}.ptx").read_text())


def test_lanes_wait_at_most_twice_for_the_table(chosen):
    """32 lanes, 16 copies: two wavefronts a request at most, counted over every lookup of the product."""
    case = "sm_80:hyb-kV4-L16-V2:1"
    spec = TrellisSpec("hyb", 4)
    text = (chosen / f"{case}.ptx").read_text()
    x = x_rows(1, INPUTS).half()
    _, report = launch(text, spec, x, packed(spec, OUTPUTS, INPUTS), table(spec), wide=False, profile=True)
    # Two programs one below the other have four rows of tiles each, whether or not they exist, and look up four pairs a tile.
    lookups = 2 * 4 * (INPUTS // 16) * 4
    # Each of the four programs: 16 copies of 512 entries, by 16 bytes for each of 32 lanes; and to add up, two stores and eight
    # loads of as much by each warp. Such a request takes four wavefronts.
    wide = 4 * (512 * 16 * 4 // (16 * 32) + gpu.WARPS * (2 + 8))
    assert report.traffic.shared_requests == lookups + wide
    assert report.traffic.shared_wavefronts - 4 * wide <= 2 * lookups


def test_with_the_wide_table_no_lane_waits(chosen):
    spec = TrellisSpec("hyb", 4)
    x = x_rows(1, INPUTS).half()
    _, report = launch(
        (chosen / f"{WIDE}.ptx").read_text(), spec, x, packed(spec, OUTPUTS, INPUTS), table(spec), wide=True, profile=True
    )
    # One program in each direction more than has rows: eight rows of tiles.
    lookups = 8 * (INPUTS // 16) * 4
    wide = 2 * (512 * 32 * 4 // (16 * 32) + gpu.WIDE_WARPS * (2 + 8))
    assert report.traffic.shared_requests == lookups + wide
    assert report.traffic.shared_wavefronts - 4 * wide == lookups


@pytest.mark.slow
def test_every_code_at_every_rate(tmp_path):
    compiled(EVERY, tmp_path)
    for case in EVERY:
        check(case, (tmp_path / f"{case}.ptx").read_text())
