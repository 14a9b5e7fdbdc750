"""Owns the encoder on CPUs: the reference's tail-biting Viterbi as vector code that LLVM compiles for the machine at hand.

The minimum over predecessors does not depend on a state's low kV bits, so the costs kept between steps are one per value p of
the L - kV shared bits: m[p]. With p' the low L - kV bits of the new state j = d P + p', one step is

    m'[p'] = min over d of |x - code[d P + p']|^2 + m[(d P + p') >> kV]

and its argument d, at most a byte, is the back-pointer. Over p' the code and the result are contiguous, and m is read as runs
of 2^kV equal values: a short load and one shuffle. That access is what Numba's auto-vectoriser turns into gathers, so the step
is written as LLVM vectors; everything around it is plain Numba. Costs are float32, and nothing is pruned: the walk found is
optimal under the pins, as in `reference.py`.

Dimension key: N tiles, T steps, S = 2^L states, V values a step, P = 2^(L - kV), G tiles that one worker encodes side by side.
"""

import threading
from functools import lru_cache

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qtipcli_kernels.spec import TrellisSpec
from qtipcli_kernels.threads import for_ranges

LANES = 16
"""float32 values in one vector: a 512-bit register, or two or four narrower ones where LLVM splits it."""

GROUP = 2
"""G: tiles that share each load of the code, which is the largest stream that a step reads."""

MAX_UNROLLED_EDGES = 16
"""Up to this many predecessors the loop over them is written out; beyond it the code would outgrow the instruction cache."""

_thread = threading.local()

F32, I8 = ir.FloatType(), ir.IntType(8)
CONTRACT = ("contract",)
"""Lets a product and a sum become one fused multiply-add; nothing else is reordered."""


def encode(tiles: torch.Tensor, spec: TrellisSpec, table: torch.Tensor, fast: bool = False) -> torch.Tensor:
    """The walk nearest to each tile; the contract of `reference.encode`, on every core that Numba may use.

    Memory beyond the result: per core one history of G * T * P bytes (8 MiB at 2 bits, 16 MiB at most) and a few rows of P
    costs, whatever N is.
    """
    x_NTV = tiles.to(torch.float32).contiguous().numpy().reshape(len(tiles), spec.steps, spec.weights_per_step)
    code_VS = np.ascontiguousarray(table.to(torch.float32).numpy().T)
    states_NT = np.empty((len(tiles), spec.steps), np.int32)
    encode_group = _group_encoder(spec)

    def work(start: int, stop: int) -> None:
        encode_group(x_NTV, code_VS, states_NT, start, *_scratch(spec), fast)

    for_ranges(len(tiles), GROUP, work)
    return torch.from_numpy(states_NT)


def _scratch(spec: TrellisSpec) -> tuple[np.ndarray, np.ndarray]:
    """This thread's costs and back-pointers, kept for the next call: touching fresh megabytes costs as much as a tile."""
    if getattr(_thread, "spec", None) != spec:
        shared = 1 << spec.shared_bits
        _thread.spec = spec
        _thread.arrays = np.empty((2, GROUP, shared), np.float32), np.empty((spec.steps, GROUP, shared), np.uint8)
    return _thread.arrays


@intrinsic(prefer_literal=True)
def relax(typing_context, new_cost, choice, cost, code, x, step, state_bits, bits_per_step, values, keep_choice):
    """One step of the recurrence for G tiles: fills new_cost [G, P] and, if keep_choice is 1, the back-pointers choice [G, P].

    cost float32 [G, P]; code float32 [V, S]; x float32 [T, G, V], of which row `step` is read; the last four are constants.
    Module level with literal arguments, rather than a closure, so that Numba's on-disk cache recognises it.
    """
    signature = types.void(new_cost, choice, cost, code, x, step, state_bits, bits_per_step, values, keep_choice)
    constants = (state_bits, bits_per_step, values, keep_choice)
    if not all(isinstance(constant, types.Literal) for constant in constants):
        return None

    def codegen(context, builder, signature, arguments):
        arrays = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:5], arguments[:5], strict=True)
        ]
        _emit_relax(builder, arrays, arguments[5], *(constant.literal_value for constant in constants))
        return context.get_dummy_value()

    return signature, codegen


def _emit_relax(builder, arrays, step, state_bits: int, bits_per_step: int, values: int, keep_choice: int) -> None:
    """Emit the body of `relax`: a loop over vectors of p', and in it the minimum over all 2^kV predecessors."""
    new_base, choice_base, cost_base, code_base, x_base = arrays
    shared, edges = 1 << (state_bits - bits_per_step), 1 << bits_per_step
    lanes = min(LANES, shared)
    # How many different m a vector of new states reads; each serves 2^kV neighbouring lanes.
    distinct = max(1, lanes >> bits_per_step)
    vector, short, choices = ir.VectorType(F32, lanes), ir.VectorType(F32, distinct), ir.VectorType(I8, lanes)
    repeat = [lane * distinct // lanes for lane in range(lanes)]

    x_row = builder.mul(step, _i64(GROUP * values))
    x_GV = [
        [_splat(builder, builder.load(_at(builder, x_base, x_row, g * values + v)), lanes) for v in range(values)]
        for g in range(GROUP)
    ]
    best = [cgutils.alloca_once(builder, vector) for _ in range(GROUP)]
    chosen = [cgutils.alloca_once(builder, choices) for _ in range(GROUP)]

    def try_predecessor(p_new, d, first: bool) -> None:
        j = builder.add(builder.mul(d, _i64(shared)), p_new)
        code_V = [_load(builder, _at(builder, code_base, j, v << state_bits), vector) for v in range(values)]
        p_old = builder.lshr(j, _i64(bits_per_step))
        for g in range(GROUP):
            m = _load(builder, _at(builder, cost_base, p_old, g * shared), short)
            total = _shuffle(builder, m, repeat)
            for v in range(values):
                error = builder.fsub(x_GV[g][v], code_V[v], flags=CONTRACT)
                total = builder.fadd(builder.fmul(error, error, flags=CONTRACT), total, flags=CONTRACT)
            if first:
                builder.store(total, best[g])
                builder.store(ir.Constant(choices, [0] * lanes), chosen[g])
                continue
            less = builder.fcmp_ordered("<", total, builder.load(best[g]))
            builder.store(builder.select(less, total, builder.load(best[g])), best[g])
            if keep_choice:
                edge = _splat(builder, builder.trunc(d, I8), lanes)
                builder.store(builder.select(less, edge, builder.load(chosen[g])), chosen[g])

    with cgutils.for_range(builder, _i64(shared // lanes)) as vectors:
        p_new = builder.mul(vectors.index, _i64(lanes))
        try_predecessor(p_new, _i64(0), first=True)
        if edges <= MAX_UNROLLED_EDGES:
            for d in range(1, edges):
                try_predecessor(p_new, _i64(d), first=False)
        else:
            with cgutils.for_range(builder, _i64(edges - 1)) as others:
                try_predecessor(p_new, builder.add(others.index, _i64(1)), first=False)
        for g in range(GROUP):
            _store(builder, builder.load(best[g]), _at(builder, new_base, p_new, g * shared), align=4)
            if keep_choice:
                _store(builder, builder.load(chosen[g]), _at(builder, choice_base, p_new, g * shared), align=1)


def _i64(value: int):
    return ir.Constant(ir.IntType(64), value)


def _at(builder, base, index, offset: int):
    return builder.gep(base, [builder.add(index, _i64(offset))])


def _load(builder, pointer, kind):
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = 4
    return value


def _store(builder, value, pointer, align: int) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def _shuffle(builder, value, lanes: list[int]):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _splat(builder, scalar, lanes: int):
    single = ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined)
    return _shuffle(builder, builder.insert_element(single, scalar, ir.Constant(ir.IntType(32), 0)), [0] * lanes)


@lru_cache(maxsize=32)
def _group_encoder(spec: TrellisSpec):
    """The compiled encoder of one trellis for tiles `start` to `start + G`; it closes over integers only, for Numba's cache."""
    steps, half = spec.steps, spec.steps // 2
    state_bits, bits_per_step, values = spec.state_bits, spec.bits_per_step, spec.weights_per_step
    shared_bits = spec.shared_bits

    @numba.njit(nogil=True, cache=True)
    def encode_group(x_NTV, code_VS, states_NT, start, cost, choice, fast):
        x_TGV = np.empty((steps, GROUP, values), np.float32)
        for g in range(GROUP):
            # The last group may be short: its spare places repeat the last tile.
            x_TGV[:, g] = x_NTV[min(start + g, len(x_NTV) - 1)]

        # First pass, from half a ring before the seam (a quarter with `fast`) to as far behind it; only the part behind it
        # is walked back, so only there are choices kept.
        reach = half // 2 if fast else half
        cost[0] = 0.0
        now = 0
        for t in range(steps - reach, steps):
            relax(cost[1 - now], choice[0], cost[now], code_VS, x_TGV, t, state_bits, bits_per_step, values, 0)
            now = 1 - now
        for t in range(reach):
            relax(cost[1 - now], choice[t], cost[now], code_VS, x_TGV, t, state_bits, bits_per_step, values, 1)
            now = 1 - now
        seam_G = np.empty(GROUP, np.int64)
        for g in range(GROUP):
            p = np.argmin(cost[now, g])
            for t in range(reach - 1, -1, -1):
                p = ((np.int64(choice[t, g, p]) << shared_bits) | p) >> bits_per_step
            seam_G[g] = p

        # Second pass over the whole ring, both ends pinned to the bits found at the seam.
        cost[0] = np.inf
        for g in range(GROUP):
            cost[0, g, seam_G[g]] = 0.0
        now = 0
        for t in range(steps):
            relax(cost[1 - now], choice[t], cost[now], code_VS, x_TGV, t, state_bits, bits_per_step, values, 1)
            now = 1 - now
        for g in range(min(GROUP, len(x_NTV) - start)):
            p = seam_G[g]
            for t in range(steps - 1, -1, -1):
                state = (np.int64(choice[t, g, p]) << shared_bits) | p
                states_NT[start + g, t] = state
                p = state >> bits_per_step

    return encode_group
