"""The PTX emulator's arithmetic: each kind of instruction against NumPy, torch or the manual's definition."""

import numpy as np
import pytest
import torch
from ptx_programs import compute, integers


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def halves(draw, count=512, scale=4.0):
    return (draw.standard_normal(count) * scale).astype(np.float16)


# ---- integers --------------------------------------------------------------------------------------------------------


WRAP = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


@pytest.mark.parametrize("kind", WRAP)
def test_integer_arithmetic_is_that_of_python_modulo_the_width(kind, draw):
    dtype, width = WRAP[kind], int(kind[1:])
    a, b, c = (integers(draw, dtype) for _ in range(3))
    exact = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]

    def wrapped(values):
        return np.array([value % 2**width for value in values], dtype=f"u{width // 8}").view(dtype)

    assert (compute(f"add.{kind} $0, $1, $2;", dtype, a, b) == wrapped(x + y for x, y, _ in exact)).all()
    assert (compute(f"sub.{kind} $0, $1, $2;", dtype, a, b) == wrapped(x - y for x, y, _ in exact)).all()
    assert (compute(f"mul.lo.{kind} $0, $1, $2;", dtype, a, b) == wrapped(x * y for x, y, _ in exact)).all()
    assert (compute(f"mul.hi.{kind} $0, $1, $2;", dtype, a, b) == wrapped(x * y >> width for x, y, _ in exact)).all()
    assert (compute(f"mad.lo.{kind} $0, $1, $2, $3;", dtype, a, b, c) == wrapped(x * y + z for x, y, z in exact)).all()
    assert (compute(f"min.{kind} $0, $1, $2;", dtype, a, b) == np.minimum(a, b)).all()
    assert (compute(f"max.{kind} $0, $1, $2;", dtype, a, b) == np.maximum(a, b)).all()
    nonzero = np.where(b == 0, 3, b).astype(dtype)
    pairs = [(x, int(y)) for (x, _, _), y in zip(exact, nonzero, strict=True)]
    quotient = [abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1) for x, y in pairs]
    assert (compute(f"div.{kind} $0, $1, $2;", dtype, a, nonzero) == wrapped(quotient)).all()
    rest = wrapped(x - q * y for (x, y), q in zip(pairs, quotient, strict=True))
    assert (compute(f"rem.{kind} $0, $1, $2;", dtype, a, nonzero) == rest).all()


@pytest.mark.parametrize("kind", ["u32", "s32", "u16", "s16"])
def test_wide_products_have_twice_the_width(kind, draw):
    dtype, wide = WRAP[kind], WRAP[f"{kind[0]}{2 * int(kind[1:])}"]
    a, b, c = integers(draw, dtype), integers(draw, dtype), integers(draw, wide)
    assert (compute(f"mul.wide.{kind} $0, $1, $2;", wide, a, b) == a.astype(wide) * b.astype(wide)).all()
    assert (compute(f"mad.wide.{kind} $0, $1, $2, $3;", wide, a, b, c) == a.astype(wide) * b.astype(wide) + c).all()


def test_bitwise_instructions(draw):
    a, b, c = (integers(draw, np.uint32) for _ in range(3))
    assert (compute("and.b32 $0, $1, $2;", np.uint32, a, b) == a & b).all()
    assert (compute("or.b32 $0, $1, $2;", np.uint32, a, b) == a | b).all()
    assert (compute("xor.b32 $0, $1, -2;", np.uint32, a) == a ^ np.uint32(0xFFFFFFFE)).all()
    assert (compute("not.b32 $0, $1;", np.uint32, a) == ~a).all()
    assert (compute("popc.b32 $0, $1;", np.uint32, a) == [int(x).bit_count() for x in a]).all()
    assert (compute("clz.b32 $0, $1;", np.uint32, a) == [32 - int(x).bit_length() for x in a]).all()
    assert (compute("brev.b32 $0, $1;", np.uint32, a) == [int(f"{int(x):032b}"[::-1], 2) for x in a]).all()
    signed = a.view(np.int32)
    assert (compute("abs.s32 $0, $1;", np.int32, signed) == np.abs(signed)).all()
    assert (compute("neg.s32 $0, $1;", np.int32, signed) == -signed).all()
    for function in (lambda a, b, c: (a & b) ^ c, lambda a, b, c: (a & b) | (~a & c), lambda a, b, c: a & ~b | b ^ c):
        immediate = function(0xF0, 0xCC, 0xAA) & 0xFF
        assert (compute(f"lop3.b32 $0, $1, $2, $3, {immediate:#x};", np.uint32, a, b, c) == function(a, b, c)).all()


def test_shifts_clamp_their_counts(draw):
    a = integers(draw, np.uint32)
    counts = draw.choice(np.array([0, 1, 7, 31, 32, 33, 63, 64, 2**31, 2**32 - 1], dtype=np.uint32), len(a))
    pairs = [(int(x), min(int(n), 64)) for x, n in zip(a, counts, strict=True)]
    assert (compute("shl.b32 $0, $1, $2;", np.uint32, a, counts) == [(x << n) % 2**32 for x, n in pairs]).all()
    assert (compute("shr.u32 $0, $1, $2;", np.uint32, a, counts) == [x >> n for x, n in pairs]).all()
    signed = [(int(x), n) for x, (_, n) in zip(a.view(np.int32), pairs, strict=True)]
    assert (compute("shr.s32 $0, $1, $2;", np.int32, a.view(np.int32), counts) == [x >> n for x, n in signed]).all()
    wide = integers(draw, np.uint64)
    by = [(int(x), min(int(n), 64)) for x, n in zip(wide, counts, strict=True)]
    assert (compute("shl.b64 $0, $1, $2;", np.uint64, wide, counts) == [(x << n) % 2**64 for x, n in by]).all()
    assert (compute("shr.u64 $0, $1, $2;", np.uint64, wide, counts) == [x >> n for x, n in by]).all()


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode, draw):
    low, high = integers(draw, np.uint32), integers(draw, np.uint32)
    counts = draw.choice(np.array([0, 1, 13, 31, 32, 33, 45, 2**32 - 1], dtype=np.uint32), len(low))
    taken = [int(n) & 31 if mode == "wrap" else min(int(n), 32) for n in counts]
    both = [(int(h) << 32 | int(x), n) for h, x, n in zip(high, low, taken, strict=True)]
    left = compute(f"shf.l.{mode}.b32 $0, $1, $2, $3;", np.uint32, low, high, counts)
    assert (left == [x << n >> 32 & 0xFFFFFFFF for x, n in both]).all()
    right = compute(f"shf.r.{mode}.b32 $0, $1, $2, $3;", np.uint32, low, high, counts)
    assert (right == [x >> n & 0xFFFFFFFF for x, n in both]).all()


@pytest.mark.parametrize(("kind", "width"), [("u32", 32), ("s32", 32), ("u64", 64), ("s64", 64)])
def test_bit_fields_follow_the_manuals_loop(kind, width, draw):
    dtype = WRAP[kind]
    a, into = integers(draw, dtype), integers(draw, dtype)
    edges = np.array([0, 1, 5, 8, 20, 31, 32, 40, 63, 64, 255, 257], dtype=np.uint32)
    position, length = draw.choice(edges, len(a)), draw.choice(edges, len(a))

    def extract(x, at, count):
        at, count, bits = at & 255, count & 255, f"{x % 2**width:0{width}b}"[::-1]
        sign = "0" if kind[0] == "u" or count == 0 else bits[min(at + count - 1, width - 1)]
        return int("".join(bits[at + i] if i < count and at + i < width else sign for i in range(width))[::-1], 2)

    def insert(x, y, at, count):
        at, count, bits = at & 255, count & 255, list(f"{y % 2**width:0{width}b}"[::-1])
        for i in range(count):
            if at + i < width and i < width:
                bits[at + i] = str(x >> i & 1)
        return int("".join(bits)[::-1], 2)

    arguments = [tuple(map(int, row)) for row in zip(a, into, position, length, strict=True)]
    unsigned = f"u{width // 8}"
    expected = np.array([extract(x, at, n) for x, _, at, n in arguments], dtype=unsigned).view(dtype)
    assert (compute(f"bfe.{kind} $0, $1, $2, $3;", dtype, a, position, length) == expected).all()
    expected = np.array([insert(x % 2**width, y, at, n) for x, y, at, n in arguments], dtype=unsigned).view(dtype)
    assert (compute(f"bfi.b{width} $0, $1, $2, $3, $4;", dtype, a, into, position, length) == expected).all()


def test_prmt_picks_and_sign_extends_bytes(draw):
    a, b, control = (integers(draw, np.uint32) for _ in range(3))

    def permute(x, y, selector):
        data = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        picked = [(data[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
        return int.from_bytes(bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in picked), "little")

    expected = [permute(*map(int, row)) for row in zip(a, b, control, strict=True)]
    assert (compute("prmt.b32 $0, $1, $2, $3;", np.uint32, a, b, control) == expected).all()


@pytest.mark.parametrize(
    ("mode", "rows"),  # selected bytes, from the most significant of the result on, for controls 0 to 3 (PTX ISA, prmt)
    [
        ("f4e", ["3210", "4321", "5432", "6543"]),
        ("b4e", ["5670", "6701", "7012", "0123"]),
        ("rc8", ["0000", "1111", "2222", "3333"]),
        ("ecl", ["3210", "3211", "3222", "3333"]),
        ("ecr", ["0000", "1110", "2210", "3210"]),
        ("rc16", ["1010", "3232", "1010", "3232"]),
    ],
)
def test_prmts_special_modes(mode, rows):
    a, b = np.full(4, 0x13121110, dtype=np.uint32), np.full(4, 0x17161514, dtype=np.uint32)
    expected = [int("".join(f"1{digit}" for digit in row), 16) for row in rows]
    assert (compute(f"prmt.b32.{mode} $0, $1, $2, $3;", np.uint32, a, b, np.arange(4, dtype=np.uint32)) == expected).all()


@pytest.mark.parametrize("left", ["u32", "s32"])
@pytest.mark.parametrize("right", ["u32", "s32"])
def test_byte_dots_know_each_operands_sign(left, right, draw):
    a, b, c = (integers(draw, np.uint32) for _ in range(3))

    def parts(array, kind, size):
        return array.view(f"{'i' if kind == 's32' else 'u'}{size}").reshape(len(array), -1).astype(np.int64)

    total = (parts(a, left, 1) * parts(b, right, 1)).sum(1) + c
    assert (compute(f"dp4a.{left}.{right} $0, $1, $2, $3;", np.uint32, a, b, c) == total % 2**32).all()
    for half, chosen in (("lo", slice(0, 2)), ("hi", slice(2, 4))):
        total = (parts(a, left, 2) * parts(b, right, 1)[:, chosen]).sum(1) + c
        assert (compute(f"dp2a.{half}.{left}.{right} $0, $1, $2, $3;", np.uint32, a, b, c) == total % 2**32).all()


# ---- floats ----------------------------------------------------------------------------------------------------------


def test_half_arithmetic_rounds_once(draw):
    """Oracle: float64, in which sums and products of these fp16 are exact, rounded by NumPy."""
    a, b, c = (halves(draw) for _ in range(3))
    x, y, z = (array.astype(np.float64) for array in (a, b, c))
    assert (compute("add.rn.f16 $0, $1, $2;", np.float16, a, b) == (x + y).astype(np.float16)).all()
    assert (compute("mul.rn.f16 $0, $1, $2;", np.float16, a, b) == (x * y).astype(np.float16)).all()
    assert (compute("fma.rn.f16 $0, $1, $2, $3;", np.float16, a, b, c) == (x * y + z).astype(np.float16)).all()
    pairs = [array.view(np.uint32) for array in (a, b, c)]
    for instruction, expected in (("add.rn.f16x2", x + y), ("sub.f16x2", x - y), ("mul.f16x2", x * y)):
        found = compute(f"{instruction} $0, $1, $2;", np.uint32, *pairs[:2]).view(np.float16)
        assert (found == expected.astype(np.float16)).all()
    found = compute("fma.rn.f16x2 $0, $1, $2, $3;", np.uint32, *pairs).view(np.float16)
    assert (found == (x * y + z).astype(np.float16)).all()
    assert (compute("neg.f16x2 $0, $1;", np.uint32, pairs[0]).view(np.float16) == -a).all()
    assert (compute("max.f16x2 $0, $1, $2;", np.uint32, *pairs[:2]).view(np.float16) == np.maximum(a, b)).all()


def test_bfloat16_arithmetic_is_torchs(draw):
    a, b = (torch.from_numpy(draw.standard_normal(512)).to(torch.bfloat16) for _ in range(2))
    bits = [array.view(torch.int16).numpy().view(np.uint16) for array in (a, b)]
    for name, expected in (("add", a + b), ("mul", a * b), ("sub", a - b)):
        found = compute(f"{name}.rn.bf16 $0, $1, $2;", np.uint16, *bits)
        assert (found == expected.view(torch.int16).numpy().view(np.uint16)).all()
        pairs = [array.view(np.uint32) for array in bits]
        found = compute(f"{name}.rn.bf16x2 $0, $1, $2;", np.uint32, *pairs).view(np.uint16)
        assert (found == expected.view(torch.int16).numpy().view(np.uint16)).all()


def test_bfloat16_rounds_once():
    """1 + 2^-8 lies half way between two bf16. What decides, 2^-40, is lost if the value becomes a float32 on its way."""
    one, above, half = 0x3F80, 0x3F81, 0x3B80  # 1, 1 + 2^-7, 2^-8
    for more, expected in ((2.0**-40, above), (0.0, one), (-(2.0**-40), one)):
        assert compute("cvt.rn.bf16.f64 $0, $1;", np.uint16, np.array([1 + 2.0**-8 + more]))[0] == expected
    vectors = [np.array([bits], dtype=np.uint16) for bits in (half, one, one)]
    assert compute("fma.rn.bf16 $0, $1, $2, $3;", np.uint16, *vectors)[0] == one
    vectors = [np.array([bits], dtype=np.uint16) for bits in (half, above, one)]
    assert compute("fma.rn.bf16 $0, $1, $2, $3;", np.uint16, *vectors)[0] == above


def test_single_arithmetic_is_numpys(draw):
    a, b = (draw.standard_normal(512).astype(np.float32) for _ in range(2))
    assert (compute("add.f32 $0, $1, $2;", np.float32, a, b) == a + b).all()
    assert (compute("mul.rn.f32 $0, $1, $2;", np.float32, a, b) == a * b).all()
    assert (compute("div.rn.f32 $0, $1, $2;", np.float32, a, b) == a / b).all()
    assert (compute("sqrt.rn.f32 $0, $1;", np.float32, np.abs(a)) == np.sqrt(np.abs(a))).all()
    assert (compute("add.f32 $0, $1, 0f3FC00000;", np.float32, a) == a + np.float32(1.5)).all()
    assert (compute("mul.f32 $0, $1, 0.1;", np.float32, a) == a * np.float32(0.1)).all()
    np.testing.assert_allclose(compute("ex2.approx.f32 $0, $1;", np.float32, a), np.exp2(a), rtol=1e-6)
    wide = draw.standard_normal(512)
    assert (compute("add.f64 $0, $1, $2;", np.float64, wide, wide[::-1].copy()) == wide + wide[::-1]).all()


def test_fma_rounds_the_exact_sum():
    """(1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 is a tie of two float32: an addend far below float64's reach decides it."""
    a = np.full(3, 1 + 2**-12, dtype=np.float32)
    c = np.array([2.0**-80, 0, -(2.0**-80)], dtype=np.float32)
    even = np.float32(1 + 2**-11)
    found = compute("fma.rn.f32 $0, $1, $2, $3;", np.float32, a, a, c)
    assert found.tolist() == [np.nextafter(even, np.float32(2)), even, even]


def test_rounding_toward_zero_saturation_and_flushing():
    x = np.array([1 + 2**-11 + 2**-20, -(1 + 2**-11 + 2**-20), 0.1, 70000.0], dtype=np.float32)
    assert compute("cvt.rz.f16.f32 $0, $1;", np.float16, x).tolist()[:2] == [1.0, -1.0]
    assert compute("cvt.rn.f16.f32 $0, $1;", np.float16, x).tolist()[:2] == [1 + 2**-10, -(1 + 2**-10)]
    assert np.isinf(compute("cvt.rn.f16.f32 $0, $1;", np.float16, x)[3])
    assert compute("add.sat.f32 $0, $1, $1;", np.float32, x).tolist() == [1, 0, np.float32(0.1) * 2, 1]
    tiny = np.array([2.0**-130, -(2.0**-130), 2.0**-126], dtype=np.float32)
    assert compute("add.ftz.f32 $0, $1, 0f00000000;", np.float32, tiny).tolist() == [0, 0, 2.0**-126]
    assert compute("add.f32 $0, $1, 0f00000000;", np.float32, tiny).tolist() == tiny.tolist()


def test_minimum_prefers_numbers_to_nan():
    nan = np.array([np.nan, 1, np.nan], dtype=np.float32)
    other = np.array([2, np.nan, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(compute("min.f32 $0, $1, $2;", np.float32, nan, other), [2, 1, np.nan])
    np.testing.assert_array_equal(compute("max.NaN.f32 $0, $1, $2;", np.float32, nan, other), [np.nan] * 3)


def test_conversions(draw):
    x = np.array([0.5, 1.5, 2.5, -0.5, -2.7, 3e9, -3e9, np.nan, 300.0, -129.0], dtype=np.float32)
    largest, least = 2**31 - 1, -(2**31)
    assert compute("cvt.rni.s32.f32 $0, $1;", np.int32, x).tolist() == [0, 2, 2, 0, -3, largest, least, 0, 300, -129]
    assert compute("cvt.rzi.s32.f32 $0, $1;", np.int32, x).tolist() == [0, 1, 2, 0, -2, largest, least, 0, 300, -129]
    assert compute("cvt.rmi.s32.f32 $0, $1;", np.int32, x).tolist() == [0, 1, 2, -1, -3, largest, least, 0, 300, -129]
    assert compute("cvt.rpi.u32.f32 $0, $1;", np.uint32, x).tolist() == [1, 2, 3, 0, 0, 3000000000, 0, 0, 300, 0]
    whole = integers(draw, np.int32)
    assert (compute("cvt.rn.f32.s32 $0, $1;", np.float32, whole) == whole.astype(np.float32)).all()
    assert (compute("cvt.s64.s32 $0, $1;", np.int64, whole) == whole).all()
    assert (compute("cvt.u64.u32 $0, $1;", np.uint64, whole.view(np.uint32)) == whole.view(np.uint32)).all()
    assert (compute("cvt.u16.u32 $0, $1;", np.uint16, whole.view(np.uint32)) == whole.astype(np.uint16)).all()
    assert (compute("cvt.s32.s8 $0, $1;", np.int32, whole) == whole.astype(np.int8)).all()
    assert (compute("cvt.sat.s8.s32 $0, $1;", np.int32, whole).astype(np.int8) == np.clip(whole, -128, 127)).all()
    half = halves(draw)
    assert (compute("cvt.f32.f16 $0, $1;", np.float32, half) == half.astype(np.float32)).all()
    single = draw.standard_normal(512).astype(np.float32)
    pair = compute("cvt.rn.f16x2.f32 $0, $1, $2;", np.uint32, single, single[::-1].copy()).view(np.float16).reshape(-1, 2)
    assert (pair[:, 1] == single.astype(np.float16)).all()  # the first operand is the upper half
    assert (pair[:, 0] == single[::-1].astype(np.float16)).all()
    brain = torch.from_numpy(single).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (compute("cvt.rn.bf16.f32 $0, $1;", np.uint16, single) == brain).all()
    assert (compute("cvt.rn.bf16x2.f32 $0, $1, $2;", np.uint32, single, single) == brain * np.uint32(0x10001)).all()
    assert compute("cvt.rn.f32.u64 $0, $1;", np.float32, np.array([2**53 + 2**29 + 1], dtype=np.uint64))[0] == 2**53 + 2**30
