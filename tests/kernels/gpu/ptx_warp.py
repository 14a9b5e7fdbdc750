"""Owns the PTX instructions in which the lanes of a warp work together: shuffles, votes, matrix loads and matrix products.

Every lane that such an instruction reads from must take part in it, else DivergedError. A product of matrices is summed in
float64 and rounded to the accumulator once: a GPU's tensor cores round more often, so that float results differ from its own in
the last bits (integer products are exact). Source: PTX ISA 8.5, chapter 9.7.
"""

import numpy as np
from ptx_alu import widen
from ptx_memory import WARP

Array = np.ndarray


class DivergedError(RuntimeError):
    """A lane reads from one that does not take part in the instruction."""


def _by_warp(machine, operand: tuple, dtype: type = np.uint32) -> Array:
    bits = np.broadcast_to(machine.value(operand, "b32"), machine.threads)
    return np.ascontiguousarray(bits).view(dtype).reshape(-1, WARP)


def _whole_warps(machine, op, lanes: Array) -> Array:
    """Which warps take part; all of a warp's lanes must, or none."""
    taking = lanes.reshape(-1, WARP)
    if np.any(taking.any(axis=1) != taking.all(axis=1)):
        raise DivergedError(f"not all lanes of a warp take part in {op.text}")
    return taking.all(axis=1)


def _shuffle(machine, op, lanes: Array) -> None:
    targets = op.operands[0][1] if op.operands[0][0] == "pair" else (op.operands[0],)
    value, b, c, _ = (_by_warp(machine, operand) for operand in op.operands[1:])
    lane, by = np.arange(WARP), (b & 31).astype(np.int64)
    clamp, segment = (c & 31).astype(np.int64), (c >> 8 & 31).astype(np.int64)
    last = (lane & segment) | (clamp & ~segment)
    mode = next(m for m in op.modifiers if m in ("up", "down", "bfly", "idx"))
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}[mode]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane)
    if np.any(lanes.reshape(-1, WARP) & ~np.take_along_axis(lanes.reshape(-1, WARP), source, axis=1)):
        raise DivergedError(f"a lane reads from one that is not there: {op.text}")
    results = (np.take_along_axis(value, source, axis=1), np.broadcast_to(inside, value.shape))
    for target, result in zip(targets, results, strict=False):
        machine.assign(target, result.reshape(-1), lanes)


def _vote(machine, op, lanes: Array) -> None:
    truth = np.broadcast_to(machine.value(op.operands[1], "pred"), machine.threads) & lanes
    votes, present = truth.reshape(-1, WARP), lanes.reshape(-1, WARP)
    if "ballot" in op.modifiers:
        result = (votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
    else:
        result = votes.any(axis=1) if "any" in op.modifiers else (votes | ~present).all(axis=1)
    machine.assign(op.operands[0], np.repeat(result, WARP), lanes)


def _reduce(machine, op, lanes: Array) -> None:
    _whole_warps(machine, op, lanes)
    kind = next(m for m in op.modifiers if m in ("add", "min", "max", "and", "or", "xor"))
    operation = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(kind) or getattr(np, f"bitwise_{kind}")
    values = _by_warp(machine, op.operands[1], np.int32 if op.types[-1] == "s32" else np.uint32)
    machine.assign(op.operands[0], np.repeat(operation.reduce(values, axis=1, dtype=values.dtype), WARP), lanes)


def _matrices(op) -> int:
    return next(int(m[1:]) for m in op.modifiers if m in ("x1", "x2", "x4"))


def _matrix_rows(machine, operand: tuple, count: int, lanes: Array) -> tuple[Array, Array]:
    """Addresses of the 8 * count rows of each warp, at the lanes that hold them: (all addresses, lanes that hold one)."""
    return machine.addresses(operand), lanes & (np.tile(np.arange(WARP), machine.threads // WARP) < 8 * count)


def _load_matrix(machine, op, lanes: Array) -> None:
    if "m8n8" not in op.modifiers or op.types[-1] != "b16":
        raise NotImplementedError(f"PTX instruction: {op.text}")
    _whole_warps(machine, op, lanes)
    targets = op.operands[0][1] if op.operands[0][0] == "vector" else (op.operands[0],)
    addresses, holders = _matrix_rows(machine, op.operands[1], len(targets), lanes)
    words = machine.shared.read(addresses, np.uint32, 4, holders)
    rows = np.ascontiguousarray(np.stack(words, axis=1)).view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
    if "trans" in op.modifiers:
        rows = rows.swapaxes(2, 3)
    for number, target in enumerate(targets):
        pairs = np.ascontiguousarray(rows[:, number]).view(np.uint32)  # warp, row, pair of columns: lane by lane
        machine.assign(target, pairs.reshape(-1), lanes)


def _store_matrix(machine, op, lanes: Array) -> None:
    if "m8n8" not in op.modifiers or op.types[-1] != "b16":
        raise NotImplementedError(f"PTX instruction: {op.text}")
    _whole_warps(machine, op, lanes)
    sources = op.operands[1][1] if op.operands[1][0] == "vector" else (op.operands[1],)
    rows = np.zeros((machine.threads // WARP, 4, 8, 8), dtype=np.uint16)
    for number, source in enumerate(sources):
        matrix = np.ascontiguousarray(_by_warp(machine, source)).view(np.uint16).reshape(-1, 8, 8)
        rows[:, number] = matrix.swapaxes(1, 2) if "trans" in op.modifiers else matrix
    words = rows.reshape(-1, 8).view(np.uint32)
    addresses, holders = _matrix_rows(machine, op.operands[0], len(sources), lanes)
    machine.shared.write(addresses, [np.ascontiguousarray(words[:, n]) for n in range(4)], holders)


_ELEMENTS = {"f16": np.float16, "bf16": np.uint16, "tf32": np.float32, "s8": np.int8, "u8": np.uint8}
"""Types of the operands A and B, as NumPy reads them from a register."""


def _operand_elements(machine, operand: tuple, type_name: str) -> Array:
    """Elements of a fragment: float64 (or int64) of shape (register, warp, lane, element)."""
    dtype = _ELEMENTS[type_name]
    registers = []
    for register in operand[1]:
        bits = _by_warp(machine, register)
        if type_name == "tf32":
            bits = bits & np.uint32(0xFFFFE000)  # the matrix instruction does not see the lowest 13 bits
        registers.append(bits.view(dtype).reshape(-1, WARP, 4 // np.dtype(dtype).itemsize))
    elements = np.stack(registers)
    return elements.astype(np.int64) if type_name in ("s8", "u8") else widen(elements, type_name)


def _product(machine, op, lanes: Array) -> None:
    """mma.m16n8k*: with p elements a register, lane 4 g + t holds columns p t + e (+ 4 p for the next register) of its rows."""
    d_type, a_type, b_type, c_type = op.types
    if "m16n8" not in op.modifiers[2][:5] or a_type not in _ELEMENTS or (d_type, c_type) not in (("f32",) * 2, ("s32",) * 2):
        raise NotImplementedError(f"PTX instruction: {op.text}")
    _whole_warps(machine, op, lanes)
    target, *sources = op.operands
    a = _operand_elements(machine, sources[0], a_type)
    b = _operand_elements(machine, sources[1], b_type)
    count_b, warps, _, p = b.shape
    if len(a) != 2 * count_b or op.modifiers[2] != f"m16n8k{4 * p * count_b}":
        raise NotImplementedError(f"registers and shape do not go together: {op.text}")
    # a: (k half, row half, warp, g, t, e) -> (warp, row half, g, k half, t, e);  b: (k half, warp, g, t, e) -> (warp, k, g)
    rows = a.reshape(count_b, 2, warps, 8, 4, p).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)
    columns = b.reshape(count_b, warps, 8, 4, p).transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)
    kind = np.int32 if d_type == "s32" else np.float32
    c = np.stack([_by_warp(machine, register, kind) for register in sources[2][1]])  # (row half x column parity, warp, lane)
    c = c.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    with np.errstate(all="ignore"):
        d = rows @ columns + c.astype(rows.dtype)
        if "satfinite" in op.modifiers:
            d = np.clip(d, -(2**31), 2**31 - 1)
        d = d.astype(kind).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    for register, value in zip(target[1], d, strict=True):
        machine.assign(register, np.ascontiguousarray(value), lanes)


WARP_INSTRUCTIONS = {
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _product,
}
"""Opcode -> function (machine, op, lanes)."""
