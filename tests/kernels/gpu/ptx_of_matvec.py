"""Owns the compilation of the NVIDIA product kernel to PTX, in a process that does not interpret: a text for each case.

python ptx_of_matvec.py OUT sm_80:hyb-kV4-L16-V2:1 ... [:wide for the wide table]
"""

import sys
from pathlib import Path

from qtipcli_kernels.compiling import TARGETS, CompileCase, compile_case
from qtipcli_kernels.matvec import gpu
from qtipcli_kernels.spec import TrellisSpec

POINTERS = {"x_ptr": "*fp16", "trellis_ptr": "*u32", "lut_ptr": "*u32", "partial_ptr": "*fp32"}
NUMBERS = dict.fromkeys(("tile_rows", "tile_columns", "chunk", "batch"), "i32") | {"unit": "fp32"}


def spec_of(name: str) -> TrellisSpec:
    """The inverse of random_packed.name."""
    code, bits_per_step, state_bits, weights_per_step = name.split("-")
    return TrellisSpec(code, int(bits_per_step[2:]), int(state_bits[1:]), int(weights_per_step[1:]))


def main(out: Path, cases: list[str]) -> None:
    for case in cases:
        target, name, batch, *wide = case.split(":")
        arguments = gpu.nvidia_arguments(spec_of(name), int(batch), bool(wide))
        described = CompileCase(
            case, gpu._nvidia_kernel, POINTERS | NUMBERS, arguments, arguments["WARPS"], divisible=tuple(POINTERS)
        )
        (out / f"{case}.ptx").write_text(compile_case(described, TARGETS[target]).asm["ptx"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
