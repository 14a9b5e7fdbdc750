"""Owns the PTX with which one lane of an NVIDIA GPU decodes its eight weights of a tile and multiplies them.

A tile's walk follows the A operand of `mma.m16n8k16` (packing.WALK_TO_TILE), so lane i owns weights 8 i .. 8 i + 7 of the walk
and needs nothing from its neighbours but the words where their bits meet. PTX, because what decides the speed cannot be said in
Triton: packed fp16, byte sums (`dp4a`), a table in shared memory that lanes address themselves, and the matrix instruction on
registers as they are. Every text below takes one value a thread; kernels put it into `tl.inline_asm_elementwise`.

Source of the instructions' semantics: PTX ISA 8.5. Letters: L state bits, kV bits a step, V weights a step.
"""

from qtipcli_kernels import codes
from qtipcli_kernels.spec import HYB_INDEX_BITS, TILE, TILE_WEIGHTS, WORD_BITS, SpecError, TrellisSpec

WARP = 32
LANE_WEIGHTS = TILE_WEIGHTS // WARP

LUT_COPIES = 16
"""Copies of HYB's table in shared memory, entry by entry: copy c of entry e is 32-bit word 16 e + c, whose bank depends on the
copy, so that at most two lanes of a warp wait for each other. Sixteen, because bits 6..14 of h, which index the table, then are
the byte address as they stand; and because it makes 32 KiB, where a kernel may declare 48."""

LUT_SYMBOL = "qtip_lut"

FP16_OF_1024 = 0x6400
"""fp16's bits of 1024: adding an integer below 1024 to them adds it to the value."""

BYTE_SUM_OFFSET = 0xE5FE_E5FE
"""Two fp16 of -1534 = -(1024 + 510): takes the offset above and the mean of four bytes off again, exactly."""

MAX_WORDS = 3
"""Most words that a lane's bits lie in, over every spec there is."""

ACCUMULATORS = 8
"""float32 registers a lane adds up in: four for each eight rows of x, of which one product takes up to sixteen."""

# "&": an output must not share a register with an operand that a later instruction of the text still reads.
MULTIPLY_CONSTRAINTS = ",".join(["=&f"] * ACCUMULATORS + ["l"] * MAX_WORDS + ["r"] * 2 + ["l"] * 2 + ["f"] * ACCUMULATORS)

UNIT = {"1mad": codes.BYTE_SUM_INVERSE_DEVIATION, "mul1": codes.BYTE_SUM_INVERSE_DEVIATION}
"""What one unit of a decoded fp16 stands for, where it is not 1: byte sums stay integers, which fp16 holds exactly."""


def served(spec: TrellisSpec) -> bool:
    """Whether there is PTX for `spec`: every code but `lut`, whose table does not fit into shared memory."""
    return spec.code != "lut"


def lane_bits(spec: TrellisSpec) -> int:
    """Bits of the ring that a lane's own weights take."""
    return LANE_WEIGHTS * spec.bits_per_step // spec.weights_per_step


def span(spec: TrellisSpec) -> int:
    """Bits that a lane reads: up to the end of its last window."""
    return lane_bits(spec) - spec.bits_per_step + spec.state_bits


def words_read(spec: TrellisSpec) -> int:
    """Most 32-bit words that any lane's bits lie in, from the word where they begin."""
    offsets = (lane * lane_bits(spec) % WORD_BITS for lane in range(WARP))
    return -(-(max(offsets) + span(spec)) // WORD_BITS)


def declare_table() -> str:
    """Declares the table in shared memory; $0 is its address. The kernel's first text, outside every loop: it has no scope."""
    size = (LUT_COPIES << HYB_INDEX_BITS) * 4
    return f".shared .align 16 .b8 {LUT_SYMBOL}[{size}]; mov.u32 $0, {LUT_SYMBOL};"


def store_table() -> str:
    """Four copies of entry $1 (fp16 pair) to byte $2 of the table. $0 is a value that nobody needs."""
    return "st.shared.v4.b32 [$2], {$1, $1, $1, $1}; mov.b32 $0, $1;"


def multiply(spec: TrellisSpec, columns: int, tiles: int) -> str:
    """The text that loads `tiles` tiles, decodes them and multiplies them with 8 or 16 `columns`, which are rows of x.

    `MULTIPLY_CONSTRAINTS` are its operands. Out: 8 accumulators, four for every eight columns. In: `MAX_WORDS` addresses of the
    lane's words in the first tile, of which `words_read` are read; the lane's bit offset in the first; the shared address of
    the lane's copy of the table; the address of its first fp16 pair of x for either eight columns; the accumulators.
    """
    text = _Text()
    operands = [f"${number}" for number in range(2 * ACCUMULATORS + MAX_WORDS + 4)]
    out, rest = operands[:ACCUMULATORS], operands[ACCUMULATORS:]
    addresses, (offset, table), x_addresses = rest[: words_read(spec)], rest[MAX_WORDS : MAX_WORDS + 2], rest[MAX_WORDS + 2 :]
    sums = rest[MAX_WORDS + 4 :]
    groups = columns // 8
    # All loads first: what a lane waits for is in flight together.
    words = [[text.load(address, tile * spec.words_per_tile * 4) for address in addresses] for tile in range(tiles)]
    # The B operand: for lane 4 g + c, inputs 2c, 2c + 1 and 2c + 8, 2c + 9 of row g of x.
    x = [
        [[text.load(x_addresses[group], (tile * TILE + half) * 2) for half in (0, TILE // 2)] for group in range(groups)]
        for tile in range(tiles)
    ]
    for tile in range(tiles):
        weights = _decode(text, spec, words[tile], offset, table)
        for group in range(groups):
            part = slice(4 * group, 4 * group + 4)
            into = out[part] if tile + 1 == tiles else [text.register("f") for _ in range(4)]
            lists = ", ".join(f"{{{', '.join(each)}}}" for each in (into, weights, x[tile][group], sums[part]))
            text.add(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {lists}")
            sums[part] = into
    for target, source in zip(out[4 * groups :], sums[4 * groups : ACCUMULATORS], strict=True):
        text.add(f"mov.f32 {target}, {source}")
    return text.block()


class _Text:
    """Lines of PTX and the registers that they use, in a scope of their own."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts = {"r": 0, "f": 0}

    def register(self, kind: str = "r") -> str:
        """A new register: "r" of 32 bits, "f" a float32."""
        self._counts[kind] += 1
        return f"{kind}q{self._counts[kind]}"

    def add(self, line: str) -> None:
        self._lines.append(f"{line};")

    def result(self, operation: str, *operands: str | int) -> str:
        """A new register that holds what `operation` gives."""
        register = self.register()
        self.add(f"{operation} {', '.join([register, *map(str, operands)])}")
        return register

    def load(self, address: str, offset: int) -> str:
        """A word that no kernel writes while this one runs."""
        return self.result("ld.global.nc.b32", f"[{address} + {offset}]")

    def block(self) -> str:
        declared = f".reg .b32 rq<{self._counts['r'] + 1}>; .reg .f32 fq<{self._counts['f'] + 1}>;"
        return "\n".join(["{", declared, *self._lines, "}"])


def _decode(text: _Text, spec: TrellisSpec, words: list[str], offset: str, table: str) -> list[str]:
    """The lane's eight weights as four registers of two fp16, in units of `UNIT`."""
    states = _states(text, spec, _aligned(text, spec, words, offset))
    if spec.weights_per_step == 2:
        return [_hybrid(text, spec, state, table) for state in states]
    if spec.code in ("1mad", "mul1"):
        sums = [_byte_sum(text, spec, state) for state in states]
        pairs = [text.result("prmt.b32", low, high, "0x5410") for low, high in zip(sums[::2], sums[1::2], strict=True)]
        offsets = text.result("mov.b32", f"{BYTE_SUM_OFFSET:#x}")  # packed fp16 takes registers only
        return [text.result("add.rn.f16x2", pair, offsets) for pair in pairs]
    if spec.code not in ("3inst", "mcg"):
        raise SpecError(f"no PTX decodes code {spec.code}")
    halves = [_half_pair(text, spec, state) for state in states]
    fragment = []
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        low = text.result("prmt.b32", first, second, "0x5410")
        high = text.result("prmt.b32", first, second, "0x7632")
        fragment.append(text.result("add.rn.f16x2", high, low))
    return fragment


def _aligned(text: _Text, spec: TrellisSpec, words: list[str], offset: str) -> list[str]:
    """Registers that hold the lane's bits from the first one on, most significant bit first."""
    if lane_bits(spec) % WORD_BITS == 0:
        return words
    aligned = []
    for index in range(-(-span(spec) // WORD_BITS)):
        if index + 1 < len(words):
            aligned.append(text.result("shf.l.wrap.b32", words[index + 1], words[index], offset))
        else:
            aligned.append(text.result("shl.b32", words[index], offset))
    return aligned


def _states(text: _Text, spec: TrellisSpec, aligned: list[str]) -> list[str]:
    """The lane's states. Bits above the L-th are those of the ring where the code does not see them, else 0."""
    shifted: dict[tuple[int, int], str] = {(index, 0): register for index, register in enumerate(aligned)}
    bits = spec.state_bits
    seen_whole = not (spec.code == "hyb" and bits == 16)
    states = []
    for step in range(LANE_WEIGHTS // spec.weights_per_step):
        index, first = divmod(step * spec.bits_per_step, WORD_BITS)
        if not seen_whole:
            states.append(_ending_at(text, aligned, index, first + bits))
        elif bits == 16 and first + 16 <= WORD_BITS:
            # Whole bytes of a shifted word: windows whose beginnings differ by eight bits share the shift.
            key = (index, first % 8)
            if key not in shifted:
                shifted[key] = text.result("shl.b32", aligned[index], first % 8)
            byte = first // 8
            states.append(text.result("prmt.b32", shifted[key], 0, {0: "0x4432", 1: "0x4421", 2: "0x4410"}[byte]))
        elif first + bits <= WORD_BITS:
            states.append(text.result("bfe.u32", aligned[index], WORD_BITS - first - bits, bits))
        else:
            top = text.result("shf.l.wrap.b32", aligned[index + 1], aligned[index], first)
            states.append(text.result("shr.u32", top, WORD_BITS - bits))
    return states


def _ending_at(text: _Text, aligned: list[str], index: int, end: int) -> str:
    """Bits up to the `end`-th from the start of word `index`, in the low end of a register."""
    if end <= WORD_BITS:
        return text.result("shr.u32", aligned[index], WORD_BITS - end) if end < WORD_BITS else aligned[index]
    return text.result("shf.r.wrap.b32", aligned[index + 1], aligned[index], 2 * WORD_BITS - end)


def _byte_sum(text: _Text, spec: TrellisSpec, state: str) -> str:
    if spec.code == "1mad":
        x = text.result("mad.lo.u32", state, codes.ONE_MAD_MULTIPLIER, codes.ONE_MAD_INCREMENT)
    else:
        x = text.result("mul.lo.u32", state, f"{codes.MUL1_MULTIPLIER:#x}")
    return text.result("dp4a.u32.u32", x, "0x01010101", f"{FP16_OF_1024:#x}")


def _half_pair(text: _Text, spec: TrellisSpec, state: str) -> str:
    if spec.code == "3inst":
        x = text.result("mad.lo.u32", state, codes.THREE_INST_MULTIPLIER, codes.THREE_INST_INCREMENT)
    else:
        x = text.result("mul.lo.u32", state, f"{codes.MCG_MULTIPLIER:#x}")
    return text.result(
        "lop3.b32", x, f"{codes.HALF_PAIR_MASK:#x}", f"{codes.HALF_PAIR_XOR:#x}", _lop3(lambda a, b, c: (a & b) ^ c)
    )


def _hybrid(text: _Text, spec: TrellisSpec, state: str, table: str) -> str:
    h = text.result("mad.lo.u32", state, state, state)
    # Bits 15 - Q .. 14 of h choose the entry; 16 copies of four bytes make them the byte address.
    index_mask = ((1 << HYB_INDEX_BITS) - 1) << (15 - HYB_INDEX_BITS)
    address = text.result("lop3.b32", h, f"{index_mask:#x}", table, _lop3(lambda a, b, c: (a & b) | c))
    entry = text.register()
    text.add(f"ld.shared.b32 {entry}, [{address}]")
    signs = 0x8000_8000 if spec.code == "hyb2" else 0x8000
    return text.result("lop3.b32", h, f"{signs:#x}", entry, _lop3(lambda a, b, c: (a & b) ^ c))


def _lop3(function) -> str:
    """The 8-bit table of a bitwise function of three operands (PTX ISA, lop3)."""
    return f"{function(0xF0, 0xCC, 0xAA):#x}"
