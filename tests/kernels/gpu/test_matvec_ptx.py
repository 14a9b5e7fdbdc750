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
from qtipcli_kernels.matvec import gpu
from qtipcli_kernels.spec import CODE_WEIGHTS_PER_STEP, MAX_BITS_PER_STEP, TrellisSpec

CHOSEN = [
    "sm_80:1mad-kV2-L16-V1:1", "sm_90:mul1-kV3-L16-V1:3", "sm_80:3inst-kV2-L16-V1:9", "sm_80:3inst-kV1-L10-V1:1",
    "sm_90:mcg-kV7-L16-V1:1", "sm_80:1mad-kV8-L12-V1:2", "sm_80:mul1-kV5-L16-V1:16", "sm_80:hyb-kV4-L16-V2:1",
    "sm_90:hyb-kV3-L13-V2:8", "sm_80:hyb2-kV7-L16-V2:2", "sm_80:hyb2-kV4-L16-V2:16", "sm_80:hyb-kV8-L16-V2:1",
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

OUTPUTS, INPUTS, CHUNK = 17 * 16, 27 * 16, 16
"""17 rows of tiles, one more than a program's; 27 columns: two chunks, of four trips and of two and three tiles."""


def compiled(cases: list[str], out: Path) -> Path:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["kernels", *sys.path])
    script = Path(__file__).with_name("ptx_of_matvec.py")
    done = subprocess.run([sys.executable, script, out, *cases], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def launch(text: str, spec: TrellisSpec, x: torch.Tensor, trellis: torch.Tensor, lut: torch.Tensor | None, **options):
    """float32 [S, B, O] as gpu.partial_products arranges it, what is never written being NaN; and the emulator's report."""
    tile_rows, tile_columns = len(trellis), x.shape[1] // 16
    grid = (-(-tile_rows // (gpu.WARPS * lane.WARP_ROWS)), -(-tile_columns // CHUNK))
    partial = np.full((grid[1], len(x), tile_rows * 16), np.nan, np.float32)
    entries = np.zeros(1, np.uint32) if lut is None else lut.numpy().view(np.uint32).reshape(-1).copy()
    arrays = [lane.fragments(x).numpy(), trellis.numpy().view(np.uint32), entries, partial]
    operands = [*arrays, tile_rows, tile_columns, CHUNK, len(x)]
    report = ptx.launch(text, grid, gpu.WARPS, [*operands, float(lane.UNIT.get(spec.code, 1.0))], **options)
    return torch.from_numpy(partial), report


def check(case: str, text: str) -> None:
    _, spec_name, batch = case.split(":")
    spec, rows = spec_of(spec_name), int(batch)
    trellis, lut = packed(spec, OUTPUTS, INPUTS), table(spec)
    weight = reference.decode(trellis, spec, lut)
    columns = torch.randint(0, INPUTS, (rows,), generator=torch.Generator().manual_seed(rows))
    ones = torch.zeros(rows, INPUTS, dtype=torch.float16)
    ones[torch.arange(rows), columns] = 1
    partial, _ = launch(text, spec, ones, trellis, lut)
    assert torch.equal(partial.sum(0), weight[:, columns].T)
    x = x_rows(rows, INPUTS).half()
    partial, _ = launch(text, spec, x, trellis, lut)
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
    _, report = launch(text, spec, x, packed(spec, OUTPUTS, INPUTS), table(spec), profile=True)
    # Every warp of the two programs, whether or not its rows exist, looks four pairs up in each tile of its chunk.
    lookups = 2 * gpu.WARPS * lane.WARP_ROWS * (INPUTS // 16) * 4
    stores = report.traffic.shared_requests - lookups
    # Sixteen bytes for each of 32 lanes, four wavefronts, until the four programs have their 16 copies of 512 entries.
    assert stores == 4 * (512 * lane.LUT_COPIES * 4) // (16 * 32)
    assert report.traffic.shared_wavefronts - 4 * stores <= 2 * lookups


@pytest.mark.slow
def test_every_code_at_every_rate(tmp_path):
    compiled(EVERY, tmp_path)
    for case in EVERY:
        check(case, (tmp_path / f"{case}.ptx").read_text())
