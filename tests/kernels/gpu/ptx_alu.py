"""Owns what PTX's arithmetic instructions compute, as functions of NumPy arrays; the emulator (ptx.py) feeds them.

A value of type f16 is a float16 array and of f32 a float32 array; bf16 has no NumPy type and stays uint16 bits; packed types
(f16x2, bf16x2) have a last axis of two. Rounding is exact: every operation is computed in float64, where it is either exact or
(fma) rounded to odd, and then rounded once. Approximate instructions (ex2.approx, div.full, ...) give the nearest value, which
a GPU misses by a few units in the last place. NaNs have no particular bits. Source: PTX ISA 8.5, chapter 9.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Modifiers = tuple[str, ...]


def bits_of(type_name: str) -> int:
    """Width of a PTX type; a packed type's is the whole pair's."""
    if type_name == "pred":
        return 1
    return 32 if type_name.endswith("x2") or type_name == "tf32" else int(type_name.lstrip("usbf"))


def dtype_of(type_name: str) -> type:
    """NumPy's type for a value of a PTX type (bf16: its bits; a packed type: one half's)."""
    if type_name == "pred":
        return np.bool_
    if type_name in ("f16", "f16x2"):
        return np.float16
    if type_name in ("bf16", "bf16x2"):
        return np.uint16
    width = bits_of(type_name)
    kind = {"u": "u", "b": "u", "s": "i", "f": "f", "t": "f"}[type_name[0]]
    return np.dtype(f"{kind}{width // 8}").type


def is_float(type_name: str) -> bool:
    return type_name.startswith(("f", "bf", "tf"))


def widen(x: Array, type_name: str) -> Array:
    """Floating-point values as float64."""
    if type_name.startswith("bf16"):
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def narrow(x: Array, type_name: str, modifiers: Modifiers = ()) -> Array:
    """float64 rounded once to a floating-point type: to nearest even, or toward zero (`rz`)."""
    if "sat" in modifiers:
        x = np.where(np.isnan(x), 0.0, np.clip(x, 0.0, 1.0))
    if "relu" in modifiers:
        x = np.where(x < 0, 0.0, x)
    if type_name == "f64":
        return x
    if type_name.startswith("bf16"):
        return _narrow_bf16(x, modifiers)
    dtype = dtype_of(type_name)
    rounded = x.astype(dtype)
    if "rz" in modifiers:
        rounded = np.where(np.abs(rounded.astype(np.float64)) > np.abs(x), np.nextafter(rounded, dtype(0)), rounded)
    return _flush(rounded) if "ftz" in modifiers and dtype == np.float32 else rounded


def _narrow_bf16(x: Array, modifiers: Modifiers) -> Array:
    single = x.astype(np.float32)
    inexact = (single.astype(np.float64) != x) & np.isfinite(single)
    even = (single.view(np.uint32) & 1) == 0
    toward = np.where(single.astype(np.float64) < x, np.float32(np.inf), np.float32(-np.inf))
    bits = np.where(inexact & even, np.nextafter(single, toward), single).view(np.uint32)  # rounded to odd
    nearest = bits if "rz" in modifiers else bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(x), 0x7FFF, nearest >> 16).astype(np.uint16)


def _flush(x: Array) -> Array:
    """Subnormal float32 as zero of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _floats(type_name: str, modifiers: Modifiers, operands: tuple[Array, ...]) -> list[Array]:
    if "ftz" in modifiers and type_name == "f32":
        operands = tuple(_flush(x) for x in operands)
    return [widen(x, type_name) for x in operands]


def _sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, its last bit set where the sum is inexact, so that rounding it again rounds the true sum."""
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    finite = np.isfinite(total)
    even = (np.atleast_1d(total).view(np.uint64) & 1).reshape(total.shape) == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(finite & even & (error != 0), nudged, total)


def _arithmetic(on_floats: Callable, on_integers: Callable) -> Callable:
    def run(type_name: str, modifiers: Modifiers, *operands: Array) -> Array:
        if is_float(type_name):
            return narrow(on_floats(*_floats(type_name, modifiers, operands)), type_name, modifiers)
        if "sat" in modifiers:
            limits = np.iinfo(dtype_of(type_name))
            exact = on_integers(*(x.astype(np.int64) for x in operands))
            return np.clip(exact, limits.min, limits.max).astype(dtype_of(type_name))
        return on_integers(*operands)

    return run


def _product(type_name: str, modifiers: Modifiers, a: Array, b: Array) -> Array:
    if is_float(type_name):
        return narrow(np.multiply(*_floats(type_name, modifiers, (a, b))), type_name, modifiers)
    if "wide" in modifiers:
        wide = dtype_of(f"{type_name[0]}{2 * bits_of(type_name)}")
        return a.astype(wide) * b.astype(wide)
    if "hi" in modifiers:
        width = bits_of(type_name)
        wide = object if width == 64 else np.dtype(f"{a.dtype.kind}8")
        exact = a.astype(wide) * b.astype(wide)
        return (exact >> np.array(width, dtype=wide)).astype(dtype_of(type_name))
    return a * b


def _multiply_add(type_name: str, modifiers: Modifiers, a: Array, b: Array, c: Array) -> Array:
    if is_float(type_name):
        a, b, c = _floats(type_name, modifiers, (a, b, c))
        return narrow(_sum_to_odd(a * b, c), type_name, modifiers)  # the product of two narrow floats is exact in float64
    return _product(type_name, modifiers, a, b) + c


def _quotient(type_name: str, modifiers: Modifiers, a: Array, b: Array) -> Array:
    if is_float(type_name):
        return narrow(np.divide(*_floats(type_name, modifiers, (a, b))), type_name, modifiers)
    wide = object if bits_of(type_name) == 64 else np.int64
    magnitude = np.abs(a.astype(wide)) // np.maximum(np.abs(b.astype(wide)), 1)  # by zero: unspecified
    return np.where((a < 0) != (b < 0), -magnitude, magnitude).astype(dtype_of(type_name))


def _remainder(type_name: str, modifiers: Modifiers, a: Array, b: Array) -> Array:
    return a - _quotient(type_name, modifiers, a, b) * b


def _extreme(of_numbers: Callable, of_all: Callable) -> Callable:
    def run(type_name: str, modifiers: Modifiers, *operands: Array) -> Array:
        if not is_float(type_name):
            found = of_all(*operands)
            return np.maximum(found, 0) if "relu" in modifiers else found
        choose = of_all if "NaN" in modifiers else of_numbers  # a NaN loses against a number, unless .NaN is asked for
        a, b = _floats(type_name, modifiers, operands)
        return narrow(choose(a, b), type_name)

    return run


def _signed(on_float_bits: Callable, on_integers: Callable) -> Callable:
    def run(type_name: str, modifiers: Modifiers, a: Array) -> Array:
        if not is_float(type_name):
            return on_integers(a)
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        sign = unsigned.type(1 << (8 * a.dtype.itemsize - 1))
        return on_float_bits(np.ascontiguousarray(a).view(unsigned), sign).view(a.dtype)

    return run


def _shift_left(type_name: str, modifiers: Modifiers, a: Array, count: Array) -> Array:
    width = bits_of(type_name)
    shifted = a.astype(np.uint64) << np.minimum(count, 63).astype(np.uint64)
    return np.where(count >= width, 0, shifted).astype(dtype_of(type_name))


def _shift_right(type_name: str, modifiers: Modifiers, a: Array, count: Array) -> Array:
    width = bits_of(type_name)
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if type_name[0] == "s" else np.where(count >= width, 0, shifted).astype(a.dtype)


def _funnel(type_name: str, modifiers: Modifiers, low: Array, high: Array, count: Array) -> Array:
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    by = (np.minimum(count, 32) if "clamp" in modifiers else count & 31).astype(np.uint64)
    return ((both << by) >> np.uint64(32) if "l" in modifiers else both >> by).astype(np.uint32)


def _ones(count: Array) -> Array:
    """uint64 with the lowest `count` (up to 64) bits set."""
    count = count.astype(np.uint64)
    return np.where(count >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1))


def _extract(type_name: str, modifiers: Modifiers, a: Array, position: Array, length: Array) -> Array:
    width = bits_of(type_name)
    position, length = np.broadcast_arrays(position & 0xFF, length & 0xFF)
    source = a.astype(dtype_of(f"u{width}")).astype(np.uint64)
    mask = _ones(np.minimum(length, np.maximum(width - position.astype(np.int64), 0)))
    field = np.where(position >= width, 0, source >> np.minimum(position, 63).astype(np.uint64)) & mask
    if type_name[0] == "s":
        sign_at = np.minimum(position + length.astype(np.int64) - 1, width - 1)
        negative = (length > 0) & ((source >> np.maximum(sign_at, 0).astype(np.uint64)) & np.uint64(1) == 1)
        field = np.where(negative, field | ~mask, field)
    return (field & _ones(np.array(width))).astype(dtype_of(f"u{width}")).view(dtype_of(type_name))


def _insert(type_name: str, modifiers: Modifiers, field: Array, into: Array, position: Array, length: Array) -> Array:
    position, length = (position & 0xFF).astype(np.uint64), length & 0xFF
    place = np.minimum(position, np.uint64(63))
    mask = np.where(position < bits_of(type_name), _ones(length) << place, np.uint64(0))
    inserted = (field.astype(np.uint64) << place) & mask
    return (inserted | (into.astype(np.uint64) & ~mask)).astype(dtype_of(type_name))


_SELECTORS = {
    "f4e": lambda s: [(s + i) & 7 for i in range(4)],
    "b4e": lambda s: [(s - i) & 7 for i in range(4)],
    "rc8": lambda s: [s] * 4,
    "ecl": lambda s: [np.maximum(s, i) for i in range(4)],
    "ecr": lambda s: [np.minimum(s, i) for i in range(4)],
    "rc16": lambda s: [(s & 1) * 2 + i % 2 for i in range(4)],
}
"""prmt's special modes: the control's two low bits -> which byte of {b, a} goes to each byte of the result."""


def _permute(type_name: str, modifiers: Modifiers, a: Array, b: Array, control: Array) -> Array:
    a, b, control = np.broadcast_arrays(a, b, control)
    both = ((b.astype(np.uint64) << np.uint64(32)) | a)[..., None] >> (8 * np.arange(8, dtype=np.uint64)) & np.uint64(0xFF)
    mode = next((m for m in modifiers if m in _SELECTORS), None)
    if mode:
        nibbles = _SELECTORS[mode](control.astype(np.int64) & 3)
    else:
        nibbles = [control.astype(np.int64) >> (4 * i) & 15 for i in range(4)]
    result = np.uint64(0)
    for i, nibble in enumerate(nibbles):
        byte = np.take_along_axis(both, np.asarray(nibble & 7)[..., None], axis=-1)[..., 0]
        byte = np.where(nibble & 8 != 0, np.where(byte & np.uint64(0x80) != 0, np.uint64(0xFF), np.uint64(0)), byte)
        result = result | byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _logic3(type_name: str, modifiers: Modifiers, a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), dtype=np.uint32)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _dot_bytes(modifiers: Modifiers, a: Array, b: Array, c: Array, two: bool) -> Array:
    types = [m for m in modifiers if m in ("u32", "s32")]
    signs = ["i" if t == "s32" else "u" for t in types]
    elements = np.broadcast_to(a, c.shape)
    left = np.ascontiguousarray(elements).view(f"{signs[0]}{2 if two else 1}").reshape(*c.shape, -1).astype(np.int64)
    right = np.ascontiguousarray(np.broadcast_to(b, c.shape)).view(f"{signs[1]}1").reshape(*c.shape, 4).astype(np.int64)
    if two:
        right = right[..., 2:] if "hi" in modifiers else right[..., :2]
    return ((left * right).sum(-1) + c.view(np.int32)).astype(np.uint32)


def _leading_zeros(type_name: str, modifiers: Modifiers, a: Array) -> Array:
    return np.array([bits_of(type_name) - int(x).bit_length() for x in a.flat], dtype=np.uint32)


def _reverse(type_name: str, modifiers: Modifiers, a: Array) -> Array:
    width = bits_of(type_name)
    return np.array([int(f"{int(x):0{width}b}"[::-1], 2) for x in a.flat], dtype=dtype_of(type_name))


def _approximate(function: Callable) -> Callable:
    return lambda t, m, *x: narrow(function(*_floats(t, m, x)), t, m)


ALU: dict[str, Callable] = {
    "add": _arithmetic(np.add, lambda a, b: a + b),
    "sub": _arithmetic(np.subtract, lambda a, b: a - b),
    "mul": _product,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _quotient,
    "rem": _remainder,
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "abs": _signed(lambda bits, sign: bits & ~sign, np.abs),
    "neg": _signed(lambda bits, sign: bits ^ sign, np.negative),
    "and": lambda t, m, a, b: a & b,
    "or": lambda t, m, a, b: a | b,
    "xor": lambda t, m, a, b: a ^ b,
    "not": lambda t, m, a: ~a,
    "cnot": lambda t, m, a: (a == 0).astype(a.dtype),
    "shl": _shift_left,
    "shr": _shift_right,
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _logic3,
    "popc": lambda t, m, a: np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1).sum(axis=1, dtype=np.uint32),
    "clz": _leading_zeros,
    "brev": _reverse,
    "copysign": lambda t, m, a, b: np.copysign(b, a),
    "sqrt": _approximate(np.sqrt),
    "rsqrt": _approximate(lambda a: 1 / np.sqrt(a)),
    "rcp": _approximate(lambda a: 1 / a),
    "ex2": _approximate(np.exp2),
    "lg2": _approximate(np.log2),
    "sin": _approximate(np.sin),
    "cos": _approximate(np.cos),
    "tanh": _approximate(np.tanh),
}
"""Opcode -> function (type, modifiers, operands of that type) -> value. Shift counts and field positions are uint32."""

COUNT_OPERANDS = {"shl": (1,), "shr": (1,), "shf": (2,), "bfe": (1, 2), "bfi": (2, 3)}
"""Operands that are uint32 whatever the instruction's type."""

BYTE_DOTS = {
    "dp4a": lambda modifiers, a, b, c: _dot_bytes(modifiers, a, b, c, two=False),
    "dp2a": lambda modifiers, a, b, c: _dot_bytes(modifiers, a, b, c, two=True),
}

COMPARE: dict[str, Callable] = {
    **dict.fromkeys(("eq", "equ"), np.equal),
    **dict.fromkeys(("ne", "neu"), np.not_equal),
    **dict.fromkeys(("lt", "ltu", "lo"), np.less),
    **dict.fromkeys(("le", "leu", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "gtu", "hi"), np.greater),
    **dict.fromkeys(("ge", "geu", "hs"), np.greater_equal),
    "num": lambda a, b: np.ones(np.broadcast_shapes(a.shape, b.shape), dtype=bool),
    "nan": lambda a, b: np.zeros(np.broadcast_shapes(a.shape, b.shape), dtype=bool),
}


def compare(operator: str, type_name: str, a: Array, b: Array) -> Array:
    """setp: a comparison of floats is false with a NaN, unless the operator ends in u (or is nan)."""
    if not is_float(type_name):
        return COMPARE[operator](a, b)
    a, b = widen(a, type_name), widen(b, type_name)
    unordered = np.isnan(a) | np.isnan(b)
    with_nan = operator == "nan" or operator in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    return np.where(unordered, with_nan, COMPARE[operator](a, b))


def convert(to: str, from_: str, modifiers: Modifiers, a: Array) -> Array:
    """cvt between scalar types."""
    if is_float(from_):
        x = _floats(from_, modifiers, (a,))[0]
        for modifier, rounding in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            if modifier in modifiers:
                x = rounding(x)
        if to == "tf32":
            return _to_tf32(x, modifiers)
        if is_float(to):
            return narrow(x, to, modifiers)
        return _to_integer(x, dtype_of(to))
    if is_float(to):
        if from_ in ("u64", "s64"):
            single_rounding = np.array([_odd_float(int(v)) for v in a.flat]).reshape(a.shape)
            return narrow(single_rounding, to, modifiers)
        return narrow(a.astype(np.float64), to, modifiers)
    if "sat" in modifiers:
        limits = np.iinfo(dtype_of(to))
        return np.array([min(max(int(v), limits.min), limits.max) for v in a.flat]).astype(dtype_of(to)).reshape(a.shape)
    return a.astype(dtype_of(to))


def _to_integer(x: Array, dtype: type) -> Array:
    """Out of range gives the nearest integer, NaN gives 0."""
    limits = np.iinfo(dtype)
    inside = np.where(np.isnan(x) | (x <= limits.min) | (x >= limits.max), 0.0, x).astype(dtype)
    return np.select([x <= limits.min, x >= limits.max], [dtype(limits.min), dtype(limits.max)], inside).astype(dtype)


def _odd_float(value: int) -> float:
    """An integer of up to 64 bits as float64 rounded to odd, for a later single rounding."""
    spare = max(abs(value).bit_length() - 53, 0)
    kept = abs(value) >> spare
    kept |= int(abs(value) != kept << spare)
    return float(kept << spare) * (-1 if value < 0 else 1)


def _to_tf32(x: Array, modifiers: Modifiers) -> Array:
    bits = x.astype(np.float32).view(np.uint32)
    half = {"rna": np.uint32(0x1000), "rn": 0x0FFF + ((bits >> 13) & 1), "rz": np.uint32(0)}
    mode = next(m for m in ("rna", "rn", "rz") if m in modifiers)
    return ((bits + half[mode]) & np.uint32(0xFFFFE000)).view(np.float32)
