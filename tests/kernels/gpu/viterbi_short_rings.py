"""Owns encoder kernels for the PTX emulator, with rings of 8 weights: one of 256 would take it minutes."""

from collections.abc import Iterator
from dataclasses import replace

from qtipcli_kernels.compiling import CompileCase
from qtipcli_kernels.spec import TrellisSpec
from qtipcli_kernels.viterbi import gpu

RING = 8
"""Weights of a tile here: at 2 bits still bits enough for a walk at L = 14 to come through any state."""

SPECS = {"blocks": TrellisSpec("mul1", 2, 14), "shared": TrellisSpec("lut", 4, 14, weights_per_step=2)}
"""Costs in several blocks; costs that each belong to two threads. Two warps, the fewest that exchange costs."""


def compile_cases() -> Iterator[CompileCase]:
    """The kernels for SPECS, by name."""
    at_16 = {case.name: case for case in gpu.compile_cases()}
    for name, spec in SPECS.items():
        case = at_16[f"viterbi kV{spec.bits_per_step} V{spec.weights_per_step} L16"]
        steps = RING // spec.weights_per_step
        constants = gpu._constants(spec, steps // 2) | {"STEPS": steps}
        yield replace(case, name=name, constexprs=constants, num_warps=gpu._warps(spec))
