"""Owns the encoder on GPUs: the reference's tail-biting Viterbi as one Triton program a tile, its costs in registers.

As in `cpu.py`, the costs kept between two steps are one per value p of the L - kV shared bits. The 2^L states are taken in I
chunks of B neighbours. The states of chunk i follow the R = B / 2^kV costs of row i of m [I, R], each of which serves 2^kV
neighbours. A thread holds all I rows at its places r, so that a step computes without moving data; what it made, in runs of
2^kV neighbours, then goes once through shared memory to become the next step's rows: the one layout conversion of a step.

Costs are float32 without a sign, so that they order as their bits do. The lowest kV bits of each are given to the choice d of
its predecessor: a minimum then carries its argument, and ties go to the smallest d. The code is read as float16.

Dimension key: N tiles, T steps, S = 2^L states, V values a step, I chunks or rows, B states a chunk, R = B / C costs a row,
C = 2^kV states that follow one cost, P = 2^(L - kV) = I R costs, H blocks of B new costs, W words of choices a step.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl

from qtipcli_kernels.codes import BYTE_SUM_INVERSE_DEVIATION
from qtipcli_kernels.compiling import CompileCase
from qtipcli_kernels.device import check
from qtipcli_kernels.spec import MIN_STATE_BITS, TrellisSpec

MAX_ROWS = 16
"""I from L = 12 on: the choices of 16 rows at 1, 2 and 4 bits are a word of 16, 32 and 64 bits."""

REGISTERS = 128
"""Registers a thread on NVIDIA; left alone, the compiler takes up to 255 and halves the programs on a multiprocessor."""

RESIDENT_WARPS = 16
"""Warps that a multiprocessor holds at once: with 128 registers a thread they fill its 65,536."""

INTERPRETED_PROGRAMS = 2
"""Programs in the interpreter: fewer than a test's tiles, so that there too a program takes several."""

LARGEST_CODE_BITS = 15
"""The kernel's unit makes the code's largest value 2^14 to 2^15: of a smaller one's float16 nothing is lost then either."""

LARGEST = 2.0**55
"""Largest |weight| told apart, in the kernel's unit: 256 squares of it stay below UNREACHED."""

UNREACHED = tl.constexpr(0x7B80_0000)
"""Bits of the float32 2^120: the cost of the states that no walk pinned at the seam comes through."""


def encode(tiles: torch.Tensor, spec: TrellisSpec, table: torch.Tensor, fast: bool = False) -> torch.Tensor:
    """The walk nearest to each tile; the contract of `reference.encode`.

    Costs are compared with 23 - kV bits after the point, and the table is rounded to float16, which holds every default table
    exactly. At L = 16 the walks cost what the reference's do at 1 to 4 bits a weight and 0.014 % more at 8 (1MAD); a random
    float32 table loses 0.4 % at 8 bits a weight. A NaN among the weights counts as 0, an infinity as 2^40 times the code's
    largest value.

    Memory beyond the result and a copy of the tiles: at most 2 MiB of choices a multiprocessor, whatever N is. A tile's walk
    depends on nothing but the tile. Raises DeviceError where Triton cannot run on the tensors' device.
    """
    check(tiles=tiles, table=table)
    states = torch.empty(len(tiles), spec.steps, dtype=torch.int32, device=tiles.device)
    if len(tiles) == 0:
        return states
    x, code_VS = _scaled(tiles, spec, table)
    programs = min(len(tiles), _programs(tiles.device, _warps(spec)))
    choices = torch.empty(programs * spec.steps * _words_per_step(spec) + 1, dtype=_word_type(spec), device=tiles.device)
    reach = spec.steps // 4 if fast else spec.steps // 2
    options = {"num_warps": _warps(spec), "num_stages": 1}
    if tiles.is_cuda and torch.version.hip is None:
        options["maxnreg"] = REGISTERS
    _encode_kernel[(programs,)](x, code_VS, choices, states, len(tiles), **_constants(spec, reach), **options)
    return states


def _scaled(tiles: torch.Tensor, spec: TrellisSpec, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights float32 [N, 256] and the code float16 [V, S], both in the unit in which the kernel computes.

    With it float16 holds any table's range; and 1MAD's and mul1's values, integers times a constant, are integers times a
    power of two, which it holds exactly.
    """
    unit = BYTE_SUM_INVERSE_DEVIATION if spec.code in ("1mad", "mul1") else 1.0
    code = table.to(torch.float32) / unit
    shift = LARGEST_CODE_BITS - torch.frexp(code.abs().amax()).exponent  # stays on the device: no synchronisation
    code_VS = torch.ldexp(code, shift).T.to(torch.float16).contiguous()
    x = torch.ldexp(tiles.to(torch.float32) / unit, shift)
    return torch.nan_to_num(x, nan=0.0).clamp(-LARGEST, LARGEST).contiguous(), code_VS


def _warps(spec: TrellisSpec) -> int:
    """Warps a program: 256 states a thread, 64 or fewer costs among its 128 registers; half of both at 1 bit a step."""
    states_a_warp = 13 if spec.bits_per_step > 1 else 12
    return 1 << max(0, spec.state_bits - states_a_warp)


def _programs(device: torch.device, warps: int) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return _multiprocessors(device) * (RESIDENT_WARPS // warps)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _chunk(spec: TrellisSpec) -> int:
    """B: at least 256, so that the 2^kV states which follow one cost are never more."""
    return max(spec.states // MAX_ROWS, 1 << MIN_STATE_BITS)


def _rows_per_word(spec: TrellisSpec) -> int:
    return min(spec.states // _chunk(spec), MAX_ROWS if spec.bits_per_step <= 4 else 4)


def _words_per_step(spec: TrellisSpec) -> int:
    return (1 << spec.shared_bits) // _rows_per_word(spec)


def _word_type(spec: TrellisSpec) -> torch.dtype:
    return {1: torch.int16, 3: torch.int64, 4: torch.int64}.get(spec.bits_per_step, torch.int32)


def _constants(spec: TrellisSpec, reach: int) -> dict[str, int]:
    """The kernel's compile-time arguments. reach: steps on either side of the seam that the first pass sees."""
    return {
        "REACH": reach,
        "STEPS": spec.steps,
        "VALUES": spec.weights_per_step,
        "STATE_BITS": spec.state_bits,
        "STEP_BITS": spec.bits_per_step,
        "CHUNK": _chunk(spec),
        "ROWS_PER_WORD": _rows_per_word(spec),
    }


@triton.jit(do_not_specialize=["count"])
def _encode_kernel(
    x_ptr,
    code_ptr,
    choices_ptr,
    states_ptr,
    count,
    REACH: tl.constexpr,
    STEPS: tl.constexpr,
    VALUES: tl.constexpr,
    STATE_BITS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS_PER_WORD: tl.constexpr,
):
    """x float32 [N, T, V], code float16 [V, S], choices [programs, T, W, R] for scratch -> states int32 [N, T]."""
    ROWS: tl.constexpr = (1 << STATE_BITS) // CHUNK
    R: tl.constexpr = CHUNK >> STEP_BITS
    STEP_WORDS: tl.constexpr = ROWS // ROWS_PER_WORD * R
    # The odd offset keeps the compiler from moving four words to one thread to store them at once.
    choices_ptr += tl.program_id(0).to(tl.int64) * (STEPS * STEP_WORDS) + 1
    # -2^kV in a register, by a load that never happens: an instruction takes one constant, and in `cost & mask | choice` that
    # is the choice.
    mask = tl.load(states_ptr, mask=count < 0, other=-1 << STEP_BITS)
    p_IR = tl.arange(0, ROWS)[:, None] * R + tl.arange(0, R)[None, :]
    zero = tl.full([], 0, tl.int64)
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        first_step = (zero + tile) * STEPS
        seam = tl.full([], -1, tl.int32)
        zeros_1R = tl.full([1, R], 0, tl.int32)
        # First pass: REACH steps before the seam and REACH behind it. Second: the whole ring, both ends pinned to the seam.
        for second in range(2):
            m_IR = zeros_1R | tl.where((p_IR == seam) | (seam < 0), 0, UNREACHED)
            start = REACH * (second - 1)
            stop = REACH + (STEPS - REACH) * second
            for step in range(start, stop):
                # The choices of the step before: here m has its rows. A pass's first are of no step, and its last replace them.
                before = (step + STEPS - 1) % STEPS
                _store_choices(choices_ptr + before * STEP_WORDS, m_IR, ROWS, R, STEP_BITS, ROWS_PER_WORD)
                now_ptr = x_ptr + (first_step + (step + STEPS) % STEPS) * VALUES
                m_IR = _advance(m_IR, code_ptr, now_ptr, mask, VALUES, STATE_BITS, STEP_BITS, CHUNK)
            _store_choices(choices_ptr + (stop - 1) * STEP_WORDS, m_IR, ROWS, R, STEP_BITS, ROWS_PER_WORD)
            tl.debug_barrier()  # other threads stored what is read now
            lowest = tl.min(tl.min(m_IR, 1), 0)
            cheapest = tl.min(tl.min(tl.where(m_IR == lowest, p_IR, ROWS * R), 1), 0)
            last = tl.where(seam < 0, cheapest, seam)
            seam = _trace(
                choices_ptr, states_ptr + first_step, last, stop, second > 0, ROWS, R, STATE_BITS, STEP_BITS, ROWS_PER_WORD
            )
            zeros_1R = _zeros_in_place(states_ptr, count, R, STEP_BITS)
            tl.debug_barrier()  # other threads read what is overwritten next


@triton.jit
def _advance(
    m_IR,
    code_ptr,
    x_ptr,
    mask,
    VALUES: tl.constexpr,
    STATE_BITS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The costs one step behind m, both int32 [I, R]: float32 bits of which the lowest kV are the choice."""
    ROWS: tl.constexpr = (1 << STATE_BITS) // CHUNK
    C: tl.constexpr = 1 << STEP_BITS
    R: tl.constexpr = CHUNK // C
    P: tl.constexpr = ROWS * R
    # State d P + p has predecessor d. A chunk i = d H + h is one d's h-th block of p; or, P being shorter than a chunk, it
    # is all p of D neighbouring d.
    H: tl.constexpr = P // CHUNK if P > CHUNK else 1
    D: tl.constexpr = CHUNK * H // P
    x_0 = tl.load(x_ptr)
    x_1 = tl.load(x_ptr + VALUES - 1)
    state_RC = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    h_H = tl.arange(0, H)[:, None, None]
    new_HIR = tl.full([H, ROWS // H, R], 0, tl.int32)
    for h in tl.static_range(H):
        best_RC = tl.full([R, C], 0x7FFF_FFFF, tl.int32)
        for d in tl.static_range(ROWS // H):
            chunk_ptr = code_ptr + (d * H + h) * CHUNK + state_RC
            cost_RC = tl.broadcast_to(_row(m_IR, d * H + h, ROWS).to(tl.float32, bitcast=True)[:, None], [R, C])
            error_RC = x_0 - tl.load(chunk_ptr).to(tl.float32)
            cost_RC = tl.fma(error_RC, error_RC, cost_RC)
            if VALUES == 2:
                error_RC = x_1 - tl.load(chunk_ptr + ROWS * CHUNK).to(tl.float32)
                cost_RC = tl.fma(error_RC, error_RC, cost_RC)
            best_RC = tl.minimum(best_RC, (cost_RC.to(tl.int32, bitcast=True) & mask) | (d * D))
        if H > 1:
            new_HIR = tl.where(h_H == h, tl.reshape(best_RC, [1, ROWS // H, R]), new_HIR)
        elif D > 1:
            best_P = tl.min(tl.reshape(best_RC, [D, P]) | tl.arange(0, D)[:, None], 0)
            new_HIR = tl.reshape(best_P, [H, ROWS, R])
        else:
            new_HIR = tl.reshape(best_RC, [H, ROWS, R])
    return tl.reshape(new_HIR, [ROWS, R])


@triton.jit
def _row(m_IR, i: tl.constexpr, ROWS: tl.constexpr):
    """Row i of m, [R]. Where a thread holds all rows this costs nothing: it adds constant zeros to one register."""
    if ROWS == 1:
        return tl.reshape(m_IR, [m_IR.shape[1]])
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == i, m_IR, 0), 0)


@triton.jit
def _zeros_in_place(any_ptr, count, R: tl.constexpr, STEP_BITS: tl.constexpr):
    """Zeros [1, R] in the layout that m shall have: with it a thread has the rows that its states follow.

    Triton lays values out as the loads that they come from, and a value carried around a loop as the load that it meets
    first: this one. Place r belongs to one thread, or to as many as share C states, of which each loads 8 float16 at once.
    Nothing is loaded, as `count` is not negative, which the compiler cannot know.
    """
    SHARING: tl.constexpr = (1 << STEP_BITS) // 8 if STEP_BITS > 3 else 1
    place_1R = tl.arange(0, 1)[:, None] + tl.arange(0, R * SHARING)[None, :]
    # An odd address: otherwise a thread would have four neighbouring places.
    zeros_1R = tl.load(any_ptr + 1 + place_1R, mask=place_1R < -count, other=0)
    return tl.sum(tl.reshape(zeros_1R, [1, R, SHARING]), 2)


@triton.jit
def _store_choices(words_ptr, m_IR, ROWS: tl.constexpr, R: tl.constexpr, STEP_BITS: tl.constexpr, ROWS_PER_WORD: tl.constexpr):
    """Store the choices of m's costs, [W, R]: word (w, r) has row w ROWS_PER_WORD + j, place r at its bits j kV."""
    BITS: tl.constexpr = 64 if ROWS_PER_WORD * STEP_BITS > 32 else 32
    word_type: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    for w in tl.static_range(ROWS // ROWS_PER_WORD):
        word_R = tl.full([R], 0, word_type)
        for j in tl.static_range(ROWS_PER_WORD):
            # One funnel shift, by which the lowest kV bits of a cost come in at the top.
            row_R = _row(m_IR, w * ROWS_PER_WORD + j, ROWS).to(tl.uint32, bitcast=True).to(word_type)
            word_R = (word_R >> STEP_BITS) | (row_R << (BITS - STEP_BITS))
        word_R = word_R >> (BITS - ROWS_PER_WORD * STEP_BITS)
        tl.store(words_ptr + w * R + tl.arange(0, R), word_R.to(words_ptr.dtype.element_ty))


@triton.jit
def _trace(
    choices_ptr,
    states_ptr,
    p,
    steps,
    keep,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    STATE_BITS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    ROWS_PER_WORD: tl.constexpr,
):
    """Walk back from the shared bits p behind the last of `steps` to those before the first; store the states if `keep`.

    A word has the choices for all values of p's upper bits. Where these are as many as a step's, the word of the step before
    is known without waiting for this one's, and two steps take one trip to memory.
    """
    TOGETHER: tl.constexpr = 2 if (ROWS_PER_WORD == ROWS and ROWS >= (1 << STEP_BITS)) else 1
    SHARED_BITS: tl.constexpr = STATE_BITS - STEP_BITS
    for trip in range(steps // TOGETHER):
        t = steps - 1 - trip * TOGETHER
        word = tl.load(choices_ptr + (t * (ROWS // ROWS_PER_WORD) + p // (R * ROWS_PER_WORD)) * R + p % R)
        if TOGETHER == 2:
            word_before = tl.load(choices_ptr + (t - 1) * R + (p >> STEP_BITS) % R)
        state = (_choice(word, p // R, STEP_BITS, ROWS_PER_WORD) << SHARED_BITS) | p
        tl.store(states_ptr + t, state, mask=keep)
        p = state >> STEP_BITS
        if TOGETHER == 2:
            state = (_choice(word_before, p // R, STEP_BITS, ROWS_PER_WORD) << SHARED_BITS) | p
            tl.store(states_ptr + t - 1, state, mask=keep)
            p = state >> STEP_BITS
    return p


@triton.jit
def _choice(word, row, STEP_BITS: tl.constexpr, ROWS_PER_WORD: tl.constexpr):
    return (word >> (row % ROWS_PER_WORD * STEP_BITS)).to(tl.int32) & ((1 << STEP_BITS) - 1)


def compile_cases() -> Iterator[CompileCase]:
    """Every path through a step: several blocks of costs (1 to 3 bits), one (4), fewer than a chunk (8), no shared bits."""
    pointers = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
    shapes = ((1, 1, 16), (2, 1, 16), (3, 1, 16), (4, 1, 16), (4, 2, 16), (8, 2, 16), (8, 1, 8))
    for bits_per_step, weights_per_step, state_bits in shapes:
        spec = TrellisSpec("lut", bits_per_step, state_bits, weights_per_step)
        signature = {"x_ptr": "*fp32", "code_ptr": "*fp16", "choices_ptr": pointers[_word_type(spec)], "states_ptr": "*i32"}
        yield CompileCase(
            f"viterbi kV{bits_per_step} V{weights_per_step} L{state_bits}",
            _encode_kernel,
            signature | {"count": "i32"},
            _constants(spec, spec.steps // 2),
            _warps(spec),
            num_stages=1,
            divisible=tuple(signature),
            maxnreg=REGISTERS,
        )
