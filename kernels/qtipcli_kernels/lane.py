"""Owns the PTX with which one lane of an NVIDIA GPU decodes its eight weights of a tile.

A tile's walk follows the A operand of `mma.m16n8k16` (packing.WALK_TO_TILE), so lane i owns weights 8 i .. 8 i + 7 of the walk
and needs nothing from its neighbours but the words where their bits meet. PTX, because what decides the speed cannot be said in
Triton: packed fp16, byte sums (`dp4a`), a table in shared memory that lanes address themselves, and the matrix instruction on
registers as they are. Every text takes one value a thread; kernels put it into `tl.inline_asm_elementwise`.

Source of the instructions' semantics: PTX ISA 8.5. Letters: L state bits, kV bits a step, V weights a step.
"""

from dataclasses import dataclass

from qtipcli_kernels import codes
from qtipcli_kernels.spec import HYB_INDEX_BITS, TILE_WEIGHTS, WORD_BITS, SpecError, TrellisSpec

WARP = 32
LANE_WEIGHTS = TILE_WEIGHTS // WARP


@dataclass(frozen=True, slots=True)
class Table:
    """HYB's table in shared memory, entry by entry: copy c of entry e is 32-bit word `copies` e + c, for the lanes c modulo
    `copies`.

    With 32 copies each lane has a bank to itself. With 16, in 32 KiB, bits 6..14 of h, which index the table, are the byte
    offset as they stand, and at most two lanes of a warp wait for each other. symbol: the array's name.
    """

    copies: int
    symbol: str

    @property
    def quads(self) -> int:
        """Stores of 16 bytes that fill it."""
        return (self.copies << HYB_INDEX_BITS) // 4

    def find(self) -> str:
        """PTX for the address of the table, $0. Outside every loop, before it is used: the text may have no scope."""
        return f"mov.u32 $0, {self.symbol};"

    def store(self) -> str:
        """PTX for four copies of entry $1 (fp16 pair) to byte $2 of the table. $0 is a value that nobody needs."""
        return "st.shared.v4.b32 [$2], {$1, $1, $1, $1}; mov.b32 $0, $1;"


class _DeclaredTable(Table):
    """An array of the kernel's own, of which there may be 48 KiB."""

    __slots__ = ()

    def find(self) -> str:
        return f".shared .align 16 .b8 {self.symbol}[{self.quads * 16}]; {Table.find(self)}"


SMALL_TABLE = _DeclaredTable(16, "qtip_lut")
WIDE_TABLE = Table(32, "global_smem")
"""In the shared memory that Triton asks for at a launch, under Triton's name: the kernel must have made it 64 KiB."""

FP16_OF_1024 = 0x6400
"""fp16's bits of 1024: adding an integer below 1024 to them adds it to the value."""

BYTE_SUM_OFFSET = 0xE5FE_E5FE
"""Two fp16 of -1534 = -(1024 + 510): takes the offset above and the mean of four bytes off again, exactly."""

MAX_WORDS = 3
"""Most words that a lane's bits lie in, over every spec there is."""

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


class Text:
    """Lines of PTX and the registers that they use, in a scope of their own."""

    _KINDS = {"r": "b32", "f": "f32", "h": "b16", "d": "b64", "p": "pred"}  # noqa: RUF012

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts = dict.fromkeys(self._KINDS, 0)

    def register(self, kind: str = "r") -> str:
        """A new register: "r" of 32 bits, "f" a float32, "h" of 16 bits, "d" of 64, "p" a predicate."""
        self._counts[kind] += 1
        return f"{kind}q{self._counts[kind]}"

    def add(self, line: str) -> None:
        self._lines.append(f"{line};")

    def label(self, name: str) -> None:
        self._lines.append(f"{name}:")

    def result(self, operation: str, *operands: str | int, kind: str = "r") -> str:
        """A new register that holds what `operation` gives."""
        register = self.register(kind)
        self.add(f"{operation} {', '.join([register, *map(str, operands)])}")
        return register

    def copy(self, operand: str, kind: str = "r") -> str:
        """A new register that may be written, with the operand's value."""
        register = self.register(kind)
        self.add(f"mov.{self._KINDS[kind]} {register}, {operand}")
        return register

    def zero(self) -> str:
        """A new register that holds 0."""
        return self.copy("0")

    def predicate(self, comparison: str, operand: str, number: int) -> str:
        """A new predicate: how a signed integer compares."""
        return self.result(f"setp.{comparison}.s32", operand, number, kind="p")

    def both(self, first: str, second: str) -> str:
        """A new predicate that is true where two are."""
        return self.result("and.pred", first, second, kind="p")

    def block(self) -> str:
        declared = " ".join(f".reg .{type_} {kind}q<{self._counts[kind] + 1}>;" for kind, type_ in self._KINDS.items())
        return "\n".join(["{", declared, *self._lines, "}"])


def decode(text: Text, spec: TrellisSpec, aligned: list[str], table: Table, copy: str) -> list[str]:
    """The lane's eight weights as four registers of two fp16, in units of `UNIT`.

    aligned: its bits, from `_aligned`. copy: the byte offset of its copy of the table.
    """
    states = _states(text, spec, aligned)
    if spec.weights_per_step == 2:
        return [_hybrid(text, spec, state, table, copy) for state in states]
    if spec.code in ("1mad", "mul1"):
        sums = [_byte_sum(text, spec, state) for state in states]
        pairs = [text.result("prmt.b32", low, high, "0x5410") for low, high in zip(sums[::2], sums[1::2], strict=True)]
        offsets = text.result("mov.b32", f"{BYTE_SUM_OFFSET:#x}")  # packed fp16 takes registers only
        return [text.result("add.rn.f16x2", pair, offsets) for pair in pairs]
    if spec.code not in ("3inst", "mcg"):
        raise SpecError(f"no PTX decodes code {spec.code}")
    sums = [_half_sum(text, _half_pair(text, spec, state)) for state in states]
    return [text.result("mov.b32", f"{{{low}, {high}}}") for low, high in zip(sums[::2], sums[1::2], strict=True)]


def aligned(text: Text, spec: TrellisSpec, words: list[str], offset: str) -> list[str]:
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


def _states(text: Text, spec: TrellisSpec, aligned: list[str]) -> list[str]:
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


def _ending_at(text: Text, aligned: list[str], index: int, end: int) -> str:
    """Bits up to the `end`-th from the start of word `index`, in the low end of a register."""
    if end <= WORD_BITS:
        return text.result("shr.u32", aligned[index], WORD_BITS - end) if end < WORD_BITS else aligned[index]
    return text.result("shf.r.wrap.b32", aligned[index + 1], aligned[index], 2 * WORD_BITS - end)


def _byte_sum(text: Text, spec: TrellisSpec, state: str) -> str:
    if spec.code == "1mad":
        x = text.result("mad.lo.u32", state, codes.ONE_MAD_MULTIPLIER, codes.ONE_MAD_INCREMENT)
    else:
        x = text.result("mul.lo.u32", state, f"{codes.MUL1_MULTIPLIER:#x}")
    return text.result("dp4a.u32.u32", x, "0x01010101", f"{FP16_OF_1024:#x}")


def _half_pair(text: Text, spec: TrellisSpec, state: str) -> str:
    if spec.code == "3inst":
        x = text.result("mad.lo.u32", state, codes.THREE_INST_MULTIPLIER, codes.THREE_INST_INCREMENT)
    else:
        x = text.result("mul.lo.u32", state, f"{codes.MCG_MULTIPLIER:#x}")
    return text.result(
        "lop3.b32", x, f"{codes.HALF_PAIR_MASK:#x}", f"{codes.HALF_PAIR_XOR:#x}", _lop3(lambda a, b, c: (a & b) ^ c)
    )


def _half_sum(text: Text, pair: str) -> str:
    """The sum of two fp16 in one register: one instruction, which takes its operands from either half as they lie."""
    low, high = text.register("h"), text.register("h")
    text.add(f"mov.b32 {{{low}, {high}}}, {pair}")
    return text.result("add.rn.f16", high, low, kind="h")


def _hybrid(text: Text, spec: TrellisSpec, state: str, table: Table, copy: str) -> str:
    h = text.result("mad.lo.u32", state, state, state)
    # Bits 15 - Q .. 14 of h choose the entry, and where they stand they count 64 bytes.
    index_mask = f"{((1 << HYB_INDEX_BITS) - 1) << (15 - HYB_INDEX_BITS):#x}"
    if table.copies == 16:
        place = text.result("lop3.b32", h, index_mask, copy, _lop3(lambda a, b, c: (a & b) | c))
    else:
        place = text.result("mad.lo.u32", text.result("and.b32", h, index_mask), table.copies // 16, copy)
    # Where the table begins is the assembler's to say: Hopper keeps the first KiB of shared memory for itself. It is the same
    # for all lanes, so that the addition becomes part of the load.
    address = text.result("add.u32", place, text.result("mov.u32", table.symbol))
    entry = text.register()
    text.add(f"ld.shared.b32 {entry}, [{address}]")
    signs = 0x8000_8000 if spec.code == "hyb2" else 0x8000
    return text.result("lop3.b32", h, f"{signs:#x}", entry, _lop3(lambda a, b, c: (a & b) ^ c))


def _lop3(function) -> str:
    """The 8-bit table of a bitwise function of three operands (PTX ISA, lop3)."""
    return f"{function(0xF0, 0xCC, 0xAA):#x}"
