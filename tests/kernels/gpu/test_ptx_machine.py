"""The PTX emulator's machine: predicates, memory, branches and warps against the manual's definition; and what it refuses."""

import numpy as np
import ptx
import pytest
from ptx_programs import DYNAMIC, compute, integers, program


@pytest.fixture
def draw():
    return np.random.default_rng(0)


# ---- predicates, moves, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["lt", "le", "eq", "ne", "ltu", "neu"])
def test_comparisons_with_nan(operator):
    ordered = len(operator) == 2
    a = np.array([1, 2, 2, np.nan], dtype=np.float32)
    b = np.array([2, 1, 2, 1], dtype=np.float32)
    numbers = {"lt": [1, 0, 0], "le": [1, 0, 1], "eq": [0, 0, 1], "ne": [1, 1, 0]}[operator[:2]]
    body = f"setp.{operator}.f32 %p1, $1, $2; selp.b32 $0, 1, 0, %p1;"
    assert compute(body, np.uint32, a, b).tolist() == [*numbers, int(not ordered)]


def test_comparisons_know_signs_and_join_with_predicates():
    a, b = np.array([-1, 1, 5, 7], dtype=np.int32), np.array([1, -1, 6, 7], dtype=np.int32)
    selected = "selp.b32 $0, 1, 0, %p1;"
    assert compute(f"setp.lt.s32 %p1, $1, $2; {selected}", np.int32, a, b).tolist() == [1, 0, 1, 0]
    assert compute(f"setp.lt.u32 %p1, $1, $2; {selected}", np.int32, a, b).tolist() == [0, 1, 1, 0]
    assert compute(f"setp.hs.u32 %p1, $1, $2; {selected}", np.int32, a, b).tolist() == [1, 0, 0, 1]
    joined = f"setp.gt.s32 %p2, $1, 4; setp.lt.and.s32 %p1, $1, $2, %p2; {selected}"
    assert compute(joined, np.int32, a, b).tolist() == [0, 0, 1, 0]
    both = "setp.eq.s32 %p1|%p2, $1, $2; not.pred %p3, %p2; and.pred %p1, %p1, %p3; selp.b32 $0, 1, 0, %p1;"
    assert compute(both, np.int32, a, b).tolist() == [0, 0, 0, 1]
    assert compute("mov.b32 $0, 9; setp.eq.s32 %p1, $1, $2; @!%p1 mov.b32 $0, 4;", np.int32, a, b).tolist() == [4, 4, 4, 9]


def test_moves_pack_and_unpack(draw):
    a = integers(draw, np.uint32)
    swapped = compute("mov.b32 {%h8, %h9}, $1; mov.b32 $0, {%h9, %h8};", np.uint32, a)
    assert (swapped == (a >> 16 | a << 16)).all()
    wide = integers(draw, np.uint64)
    assert (compute("mov.b64 {_, %r9}, $1; mov.b32 $0, %r9;", np.uint32, wide) == wide >> np.uint64(32)).all()
    swapped = compute("mov.b64 {%r8, %r9}, $1; mov.b64 $0, {%r9, %r8};", np.uint64, wide)
    assert (swapped == (wide >> np.uint64(32) | wide << np.uint64(32))).all()


def test_memory_has_vectors_and_extends_bytes(draw):
    source = integers(draw, np.int8, 32 * 16)
    out = np.zeros(32 * 8, dtype=np.int32)
    body = """add.s64 %at, %in0, %off16; ld.global.nc.L1::no_allocate.v4.b32 {%r1, %r2, %r3, %r4}, [%at];
              ld.global.s8 %r5, [%at + 15]; ld.global.u8 %r6, [%at+15]; ld.global.v2.b64 {%d1, %d2}, [%at];
              shl.b64 %d3, %i, 5; add.s64 %at, %out, %d3; st.global.v4.b32 [%at + 0], {%r1, %r2, %r3, %r4};
              st.global.v2.b32 [%at + 16], {%r5, %r6}; st.global.b64 [ %at + 24 ], %d2;"""
    ptx.launch(program(body, 1), (1,), 1, [source, out])
    rows, words = out.reshape(32, 8), source.view(np.int32).reshape(32, 4)
    assert (rows[:, :4] == words).all()
    assert (rows[:, 6:] == words[:, 2:]).all()
    assert (rows[:, 4] == source.reshape(32, 16)[:, 15]).all()
    assert (rows[:, 5] == source.view(np.uint8).reshape(32, 16)[:, 15]).all()


def test_inline_assembly_has_registers_and_labels_of_its_own():
    """Two blocks in a third that declare the same names; a thread loops as often as its number, so they leave one by one."""
    block = """{{ .reg .b32 n, sum; .reg .pred more; mov.b32 n, %tid; mov.b32 sum, 0;
        again: setp.gt.s32 more, n, 0; @!more bra done; add.s32 sum, sum, {step}; sub.s32 n, n, 1; bra.uni again;
        done: mov.b32 {target}, sum; }}"""
    inner = block.format(step=3, target="%r1") + block.format(step=5, target="%r2")
    body = f"{{ .reg .b32 sum; mov.b32 sum, 1000; {inner} add.s32 %r2, %r2, sum; }}"
    body += "add.s32 %r3, %r1, %r2; add.s64 %at, %out, %off4; st.global.b32 [%at], %r3;"
    out = np.zeros(64, dtype=np.int32)
    report = ptx.launch(program(body, 0), (1,), 2, [out])
    assert (out == 1000 + 8 * np.arange(64)).all()
    assert report.by_opcode["sub"] == 2 * (31 + 63)  # a warp goes on until its last lane is done


def test_shared_memory_declared_in_a_block_and_outside():
    body = """{ .shared .align 4 .b8 first[4]; mov.u32 %r1, first; st.shared.b32 [%r1], -1; }
        { .shared .align 16 .b8 mine[256]; mov.u32 %r1, mine; }
        mov.u32 %r2, dynamic; shl.b32 %r3, %tid, 2; add.s32 %r4, %r1, %r3; add.s32 %r5, %r2, %r3; add.s32 %r6, %tid, 100;
        st.shared.b32 [%r4], %tid; st.shared.b32 [%r5], %r6; bar.sync 0; xor.b32 %r3, %r3, 128;
        add.s32 %r4, %r1, %r3; add.s32 %r5, %r2, %r3; ld.shared.b32 %r7, [%r4]; ld.shared.b32 %r8, [%r5];
        mad.lo.s32 %r9, %r8, 1000, %r7; add.s64 %at, %out, %off4; st.global.b32 [%at], %r9;"""
    out = np.zeros(64, dtype=np.int32)
    ptx.launch(program(body, 0, DYNAMIC), (1,), 2, [out], shared_bytes=256)
    other = np.arange(64) ^ 32
    assert (out == (other + 100) * 1000 + other).all()


# ---- warps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_follow_the_manuals_loop(mode, width):
    """Sources out of the segment give the lane's own value and a false predicate (PTX ISA, shfl.sync)."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    values = np.arange(64, dtype=np.uint32) * 7
    by = np.arange(64, dtype=np.uint32) % 5
    body = f"shfl.sync.{mode}.b32 %r9|%p1, $1, $2, {clamp}, -1; selp.b32 %r8, 1000, 0, %p1; add.s32 $0, %r9, %r8;"
    found = compute(body, np.uint32, values, by)
    for thread in range(64):
        lane, first = thread % 32, thread - thread % 32
        segment, bits = lane // width * width, int(by[thread])
        source = {"up": lane - bits, "down": lane + bits, "bfly": lane ^ bits, "idx": segment + bits % width}[mode]
        inside = segment <= source < segment + width
        assert found[thread] == values[first + source if inside else thread] + 1000 * inside


def test_votes_and_warp_reductions(draw):
    a = integers(draw, np.int32, 64)
    ballot = compute("setp.gt.s32 %p1, $1, 0; vote.sync.ballot.b32 $0, %p1, -1;", np.uint32, a)
    expected = [sum(1 << lane for lane in range(32) if a[first + lane] > 0) for first in (0, 32)]
    assert (ballot.reshape(2, 32) == np.array(expected, dtype=np.uint32)[:, None]).all()
    small = a % 1000
    total = compute("redux.sync.add.s32 $0, $1, -1;", np.int32, small).reshape(2, 32)
    assert (total == small.reshape(2, 32).sum(1)[:, None]).all()
    largest = compute("redux.sync.max.s32 $0, $1, -1;", np.int32, a).reshape(2, 32)
    assert (largest == a.reshape(2, 32).max(1)[:, None]).all()


def fragment(matrix: np.ndarray, elements: int, register: int, role: str) -> np.ndarray:
    """One register of 32 lanes, from the manual's figures: role A holds rows, B columns; `elements` lie in a register."""
    lanes = np.zeros((32, elements), dtype=matrix.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for element in range(elements):
            inner = thread * elements + element
            if role == "A":
                lanes[lane, element] = matrix[group + 8 * (register % 2), inner + 4 * elements * (register // 2)]
            else:
                lanes[lane, element] = matrix[inner + 4 * elements * register, group]
    return lanes.reshape(-1).view(np.uint32)


MMA = [("f16", 16, 2), ("f16", 8, 2), ("bf16", 16, 2), ("s8", 32, 4), ("u8", 32, 4), ("s8", 16, 4), ("tf32", 8, 1)]


@pytest.mark.parametrize(("kind", "inner", "elements"), MMA)
def test_matrix_products(kind, inner, elements, draw):
    """Against float64 within float32's rounding, integers exactly; operands laid out by the manual's figures, lane by lane."""
    whole = kind in ("s8", "u8")
    if whole:
        a, b = (integers(draw, np.int8 if kind == "s8" else np.uint8, 16 * inner) for _ in "ab")
        exact = [x.astype(np.float64) for x in (a, b)]
    else:
        values = [draw.standard_normal(16 * inner).astype(np.float32) for _ in "ab"]
        if kind == "f16":
            a, b = (x.astype(np.float16) for x in values)
            exact = [x.astype(np.float64) for x in (a, b)]
        else:
            cut = 16 if kind == "bf16" else 13
            words = [x.view(np.uint32) >> cut << cut for x in values]
            exact = [x.view(np.float32).astype(np.float64) for x in words]
            a, b = (
                ((x >> 16).astype(np.uint16) for x in words) if kind == "bf16" else values
            )  # tf32: the instruction drops what does not fit
    a, b = a.reshape(16, inner), b.reshape(inner, 16)[:, :8]
    c = draw.integers(-99, 99, (16, 8)).astype(np.int32 if whole else np.float32)
    count = inner // (4 * elements)
    inputs = [fragment(np.ascontiguousarray(a), elements, n, "A") for n in range(2 * count)]
    inputs += [fragment(np.ascontiguousarray(b), elements, n, "B") for n in range(count)]
    rows, columns = np.arange(32) // 4, np.arange(32) % 4 * 2
    for n in range(4):
        inputs.append(c[rows + 8 * (n // 2), columns + n % 2].view(np.uint32))
    loads = "".join(f"add.s64 %at, %in{n}, %off4; ld.global.b32 %r{n}, [%at];" for n in range(len(inputs)))
    name = f"m16n8k{inner}.row.col.{'s32' if whole else 'f32'}.{kind}.{kind}.{'s32' if whole else 'f32'}"
    registers = [f"%r{n}" for n in range(len(inputs))]
    lists = (registers[: 2 * count], registers[2 * count : 3 * count], registers[3 * count :])
    texts = ["{" + ", ".join(each) + "}" for each in lists]
    body = f"{loads} mma.sync.aligned.{name} {{%r20, %r21, %r22, %r23}}, {texts[0]}, {texts[1]}, {texts[2]};"
    body += "add.s64 %at, %out, %off16; st.global.v4.b32 [%at], {%r20, %r21, %r22, %r23};"
    out = np.zeros((32, 4), dtype=c.dtype)
    ptx.launch(program(body, len(inputs)), (1,), 1, [*inputs, out])
    expected = exact[0].reshape(16, inner) @ exact[1].reshape(inner, 16)[:, :8] + c
    for n in range(4):
        found, want = out[:, n], expected[rows + 8 * (n // 2), columns + n % 2]
        assert (found == want).all() if whole else np.abs(found - want).max() <= 1e-5


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_to_and_from_shared_memory(transposed, draw):
    """ldmatrix gives lane 4 r + c row r's columns 2c and 2c + 1 of each 8 x 8 matrix; stmatrix is its inverse."""
    source = draw.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    trans = ".trans" if transposed else ""
    body = f"""mov.u32 %r1, dynamic; shl.b32 %r2, %tid, 4; add.s32 %r3, %r1, %r2; add.s64 %at, %in0, %off16;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%at]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r3];
        add.s64 %at, %out, %off16; st.global.v4.b32 [%at], {{%r8, %r9, %r10, %r11}}; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {{%r8, %r9, %r10, %r11}}; bar.sync 0;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3]; st.global.v4.b32 [%at + 512], {{%r4, %r5, %r6, %r7}};"""
    out = np.zeros((2, 32, 4, 2), dtype=np.uint16)
    ptx.launch(program(body, 1, DYNAMIC), (1,), 1, [source, out], shared_bytes=512)
    for lane in range(32):
        row, pair = divmod(lane, 4)
        for matrix in range(4):
            seen = source[matrix].T if transposed else source[matrix]
            assert out[0, lane, matrix].tolist() == seen[row, 2 * pair : 2 * pair + 2].tolist()
    assert (out[1].reshape(-1) == source.reshape(-1)).all()


# ---- what must not pass ----------------------------------------------------------------------------------------------


def run(body: str, *arrays: np.ndarray, warps: int = 1, shared_bytes: int = 1024) -> None:
    start = "mov.u32 %r1, dynamic; shl.b32 %r2, %tid, 2; add.s32 %r3, %r1, %r2;"
    text = program(start + body, len(arrays) - 1, DYNAMIC)
    ptx.launch(text, (1,), warps, list(arrays), shared_bytes=shared_bytes)


WORDS = np.arange(64, dtype=np.int32)


def test_an_address_outside_of_the_arrays_is_a_fault():
    with pytest.raises(ptx.MemoryAccessError, match="argument array 0, which has 124"):
        run("add.s64 %at, %in0, %off4; ld.global.b32 %r4, [%at];", WORDS[:31].copy(), WORDS)
    with pytest.raises(ptx.MemoryAccessError, match="lies in no array"):
        run("ld.global.b32 %r4, [%off4];", WORDS, WORDS)
    with pytest.raises(ptx.MemoryAccessError, match="0x440: the CTA has 1088"):
        run("st.shared.b32 [%r3], %tid;", WORDS, shared_bytes=64)


def test_a_predicate_guards_the_address():
    guarded = "setp.lt.s32 %p1, %tid, 31; add.s64 %at, %in0, %off4; @%p1 ld.global.b32 %r4, [%at];"
    run(guarded, WORDS[:31].copy(), WORDS)


def test_misaligned_accesses_are_faults():
    with pytest.raises(ptx.MemoryAccessError, match="misaligned"):
        run("add.s64 %at, %in0, %off4; ld.global.v2.b32 {%r4, %r5}, [%at];", WORDS, WORDS)
    with pytest.raises(ptx.MemoryAccessError, match="misaligned"):
        run("st.shared.b32 [%r3 + 2], %tid;", WORDS)


def test_shared_memory_must_be_written_before_it_is_read():
    with pytest.raises(ptx.MemoryAccessError, match="before it is written"):
        run("ld.shared.b32 %r4, [%r3];", WORDS)


EXCHANGE = "st.shared.b32 [%r3], %tid; {barrier} xor.b32 %r4, %r3, {flip}; ld.shared.b32 %r5, [%r4];"


def test_a_missing_barrier_is_a_fault_between_warps_only():
    with pytest.raises(ptx.MemoryAccessError, match="no barrier between a write"):
        run(EXCHANGE.format(barrier="", flip=128), WORDS, warps=2)
    run(EXCHANGE.format(barrier="bar.sync 0;", flip=128), WORDS, warps=2)
    run(EXCHANGE.format(barrier="", flip=64), WORDS, warps=2)  # within the warp


def test_overwriting_what_another_warp_reads_is_a_fault():
    loop = EXCHANGE.format(barrier="bar.sync 0;", flip=128) + "{barrier} st.shared.b32 [%r3], %r5;"
    with pytest.raises(ptx.MemoryAccessError, match="no barrier between a read"):
        run(loop.format(barrier=""), WORDS, warps=2)
    run(loop.format(barrier="bar.sync 0;"), WORDS, warps=2)


def test_two_values_for_one_place_are_a_fault():
    with pytest.raises(ptx.MemoryAccessError, match="different values"):
        run("st.global.b32 [%out], %tid;", WORDS.copy())
    run("mov.b32 %r4, 7; st.global.b32 [%out], %r4;", WORDS.copy())


COPY = """add.s64 %at, %in0, %off16; shl.b32 %r4, %tid, 4; add.s32 %r4, %r4, %r1;
    setp.lt.s32 %p1, %tid, 16; selp.b32 %r5, 16, 0, %p1;
    cp.async.cg.shared.global [ %r4 + 0 ], [ %at + 0 ], 0x10, {size}; cp.async.commit_group; {wait} bar.sync 0;
    ld.shared.b32 %r6, [%r4]; add.s64 %at, %out, %off4; st.global.b32 [%at], %r6;"""


def test_asynchronous_copies_arrive_when_they_are_waited_for():
    source, out = np.arange(128, dtype=np.int32), np.zeros(32, dtype=np.int32)
    run(COPY.format(size="0x10", wait="cp.async.wait_group 0;"), source, out)
    assert (out == source[::4]).all()
    with pytest.raises(ptx.MemoryAccessError, match="before it is written"):
        run(COPY.format(size="0x10", wait="cp.async.wait_group 1;"), source, out)
    # A size of zero reads nothing (here: beyond the array) and writes zeros.
    run(COPY.format(size="%r5", wait="cp.async.wait_all;"), source[:64].copy(), out)
    assert (out == np.where(np.arange(32) < 16, 4 * np.arange(32), 0)).all()


def test_a_barrier_that_some_leave_out_is_a_deadlock():
    with pytest.raises(ptx.DeadlockError, match="different barriers"):
        run("setp.lt.s32 %p1, %tid, 32; @%p1 bra other; bar.sync 0; bra.uni end; other: bar.sync 0; end:", WORDS, warps=2)


def test_lanes_that_are_absent_cannot_be_read():
    with pytest.raises(ptx.DivergedError, match="shfl"):
        run("setp.lt.s32 %p1, %tid, 16; @%p1 shfl.sync.bfly.b32 %r4, %tid, 16, 31, -1;", WORDS)
    with pytest.raises(ptx.DivergedError, match="mma"):
        mma = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r10}, {%r4, %r5, %r6, %r7};"
        run(f"setp.lt.s32 %p1, %tid, 16; @%p1 {mma}", WORDS)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("wgmma.fence.sync.aligned;", "wgmma"),
        ("atom.global.add.u32 %r4, [%out], 1;", "atom"),
        ("mov.u64 %d1, %clock64;", "clock64"),
    ],
)
def test_what_the_emulator_does_not_know_is_named(text, named):
    with pytest.raises(NotImplementedError, match=named):
        run(text, WORDS)


def test_arguments_must_fit():
    with pytest.raises(TypeError, match="takes 1 arguments"):
        ptx.launch(program("", 0), (1,), 1, [WORDS, WORDS])
    with pytest.raises(TypeError, match="contiguous"):
        ptx.launch(program("", 0), (1,), 1, [WORDS[::2]])


def test_profile_counts_bank_conflicts_and_sectors():
    """Lanes that write 32 words apart all meet in one bank; a warp that reads 4 bytes a lane in a row reads 4 sectors."""
    body = "mov.u32 %r1, dynamic; shl.b32 %r2, %tid, {shift}; add.s32 %r3, %r1, %r2; st.shared.b32 [%r3], %tid;"
    body += "add.s64 %at, %out, %off4; st.global.b32 [%at], %tid;"
    for shift, wavefronts in ((2, 1), (3, 2), (7, 32)):
        text = program(body.format(shift=shift), 0, DYNAMIC)
        traffic = ptx.launch(text, (1,), 1, [WORDS.copy()], shared_bytes=4096, profile=True).traffic
        assert (traffic.shared_requests, traffic.shared_wavefronts, traffic.shared_wavefronts_least) == (1, wavefronts, 1)
        assert (traffic.global_requests, traffic.global_sectors) == (1, 4)
