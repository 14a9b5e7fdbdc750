"""Owns the PTX with which one lane of an NVIDIA GPU decodes its eight weights of a tile and multiplies them.

A tile's walk follows the A operand of `mma.m16n8k16` (packing.WALK_TO_TILE), so lane i owns weights 8 i .. 8 i + 7 of the walk
and needs nothing from its neighbours but the words where their bits meet. PTX, because what decides the speed cannot be said in
Triton: packed fp16, byte sums (`dp4a`), a table in shared memory that lanes address themselves, and the matrix instruction on
registers as they are. Every text below takes one value a thread; kernels put it into `tl.inline_asm_elementwise`.

Source of the instructions' semantics: PTX ISA 8.5. Letters: L state bits, kV bits a step, V weights a step.
"""

from dataclasses import dataclass

import torch

from qtipcli_kernels import codes
from qtipcli_kernels.spec import HYB_INDEX_BITS, TILE, TILE_WEIGHTS, WORD_BITS, SpecError, TrellisSpec

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

SUMS_SYMBOL = "qtip_sums"

FRAGMENT_INPUTS = 2 * TILE
FRAGMENT_BYTES = 2 * FRAGMENT_INPUTS
"""Inputs of a row of x whose order `fragments` changes among themselves, those of two tiles, and their bytes."""

FP16_OF_1024 = 0x6400
"""fp16's bits of 1024: adding an integer below 1024 to them adds it to the value."""

BYTE_SUM_OFFSET = 0xE5FE_E5FE
"""Two fp16 of -1534 = -(1024 + 510): takes the offset above and the mean of four bytes off again, exactly."""

MAX_WORDS = 3
"""Most words that a lane's bits lie in, over every spec there is."""

WARP_ROWS = 2
"""Rows of tiles that a warp multiplies side by side: they share the loads of x."""

WARP_PARTS = 4
"""Warps of a program that share rows of tiles and divide their inputs: what is left to add up afterwards is so much less."""

ACCUMULATORS = 8 * WARP_ROWS
"""float32 registers a lane adds up in: four for a row of tiles and eight rows of x, of which there are up to sixteen."""

# "&": an output must not share a register with an operand that a later instruction of the text still reads.
MULTIPLY_CONSTRAINTS = ",".join(["=&f"] * ACCUMULATORS + ["l"] * (MAX_WORDS + 1) + ["r"] * 2 + ["l"] * 2 + ["r"] * 5)

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


def multiply(spec: TrellisSpec, columns: int, tiles: int, warps: int, table: Table = SMALL_TABLE) -> str:
    """The text of the whole loop: load tiles of WARP_ROWS rows, decode them, multiply them with 8 or 16 `columns`, rows of x.

    `tiles` (even) of each row are a trip. What a trip reads is loaded by the one before it, each word as soon as the register
    that held the last one is free: an assembler that is given all loads at once moves each to just before its use, and lanes
    wait (measured on an H200, docs/benchmarks/kernels.md).

    `MULTIPLY_CONSTRAINTS` are its operands. Out: the accumulators, eight for each row of tiles, of which four are for every
    eight columns. In: `MAX_WORDS` addresses of the lane's words in the first tile, of which `words_read` are read; the bytes
    from a row of tiles to the next; the lane's bit offset in the first word; the byte offset of the lane's copy of the table;
    the address of its part of x (`fragments`) for either eight columns, and whether there are such rows of x; the number of
    trips; the tiles that remain after them; the number of the thread among those of its `warps` warps. WARP_PARTS neighbouring
    warps have parts of the same rows: in the end each has the sum of all.
    """
    if tiles % 2:
        raise ValueError(f"a trip of {tiles} tiles: x is read for two at a time")
    loop = _Loop(spec, columns, table)
    loop.trips(tiles)
    loop.rest()
    loop.add_parts(warps)
    return loop.text.block()


def fragments(x_BI: torch.Tensor) -> torch.Tensor:
    """Rows of x in the order in which lanes read them: [B, I] -> [B, I rounded up to 32].

    The B operand of lane 4 g + c has inputs 2c, 2c + 1, 2c + 8 and 2c + 9 of a tile; those of two neighbouring tiles follow one
    another, the 16 bytes that a lane loads at once. Of an odd number of tiles the last one's are eight apart; what lies between
    is never read.
    """
    missing = -x_BI.shape[1] % FRAGMENT_INPUTS
    padded = torch.nn.functional.pad(x_BI, (0, missing)) if missing else x_BI
    halves = padded.reshape(len(x_BI), -1, 2, 2, 4, 2)  # [row, pair of tiles, tile, half, c, parity]
    return halves.permute(0, 1, 4, 2, 3, 5).reshape(padded.shape)


class _Loop:
    """The parts of `multiply`'s text. Registers that trips hand to one another are written in place."""

    def __init__(self, spec: TrellisSpec, columns: int, table: Table) -> None:
        self.text = text = _Text()
        self._spec, self._layout, groups = spec, table, columns // 8
        operands = [f"${number}" for number in range(ACCUMULATORS + MAX_WORDS + 10)]
        sums, words, rest = (operands[:ACCUMULATORS], operands[ACCUMULATORS:][:MAX_WORDS], operands[ACCUMULATORS + MAX_WORDS :])
        row_bytes, self._offset, self._copy, *rest = rest
        x, there, (self._trips, self._rest, self._thread) = rest[:2], rest[2:4], rest[4:]
        for total in sums:
            text.add(f"mov.f32 {total}, 0f00000000")
        self._sums = [[sums[8 * row + 4 * group :][:4] for group in range(groups)] for row in range(WARP_ROWS)]
        self._words = [[text.copy(address, "d") for address in words[: words_read(spec)]]]
        for _ in range(1, WARP_ROWS):
            self._words.append([text.result("add.s64", address, row_bytes, kind="d") for address in self._words[-1]])
        self._x = [text.copy(address, "d") for address in x[:groups]]
        self._there = [text.predicate("ne", operand, 0) for operand in there[:groups]]

    def trips(self, tiles: int) -> None:
        """As many trips of `tiles` tiles as are asked for."""
        text, size = self.text, self._spec.words_per_tile * 4
        left = self._of_the_warp(self._trips)
        words = [[[text.register() for _ in row] for row in self._words] for _ in range(tiles)]
        x = [[[text.zero() for _ in range(4)] for _ in self._x] for _ in range(tiles // 2)]
        more = text.predicate("gt", left, 0)
        see = [text.both(more, there) for there in self._there]
        for tile in range(tiles):
            for row in range(WARP_ROWS):
                self._load(more, row, words[tile][row], tile * size)
        for pair in range(tiles // 2):
            self._load_x(see, x[pair], pair * FRAGMENT_BYTES)
        text.add(f"@!{more} bra.uni END")
        text.label("TRIP")
        text.add(f"setp.gt.s32 {more}, {left}, 1")
        for register, there in zip(see, self._there, strict=True):
            text.add(f"and.pred {register}, {more}, {there}")
        text.add(f"sub.s32 {left}, {left}, 1")
        self._advance(tiles * size, tiles // 2 * FRAGMENT_BYTES)
        for tile in range(tiles):
            for row in range(WARP_ROWS):
                held = words[tile][row]
                aligned = _aligned(text, self._spec, held, self._offset)
                if aligned is not held:
                    self._load(more, row, held, tile * size)
                weights = _decode(text, self._spec, aligned, self._layout, self._copy)
                if aligned is held:
                    self._load(more, row, held, tile * size)
                self._multiply(row, weights, [part[tile % 2 * 2 :][:2] for part in x[tile // 2]])
            if tile % 2:
                self._load_x(see, x[tile // 2], tile // 2 * FRAGMENT_BYTES)
        text.add(f"@{more} bra.uni TRIP")
        text.label("END")

    def rest(self) -> None:
        """One tile of each row after the other."""
        text = self.text
        left, step = self._of_the_warp(self._rest), text.copy("8", "d")
        some = text.predicate("gt", left, 0)
        text.add(f"@!{some} bra.uni DONE")
        text.label("TILE")
        x = [[text.zero() for _ in range(2)] for _ in self._x]
        for registers, address, there in zip(x, self._x, self._there, strict=True):
            text.add(f"@{there} ld.global.nc.v2.b32 {{{', '.join(registers)}}}, [{address}]")
        for row, addresses in enumerate(self._words):
            words = [text.register() for _ in addresses]
            self._load(None, row, words, 0)
            weights = _decode(text, self._spec, _aligned(text, self._spec, words, self._offset), self._layout, self._copy)
            self._multiply(row, weights, x)
        text.add(f"sub.s32 {left}, {left}, 1")
        self._advance(self._spec.words_per_tile * 4, step)
        text.add(f"sub.s64 {step}, {FRAGMENT_BYTES}, {step}")  # to the tile beside it, then to the next pair
        text.add(f"setp.gt.s32 {some}, {left}, 0")
        text.add(f"@{some} bra.uni TILE")
        text.label("DONE")

    def _of_the_warp(self, operand: str) -> str:
        """A new register with a number that all lanes have. From lane 0, so that the assembler knows it too: in a loop that
        lanes may leave one by one it would add the table's address to each place."""
        return self.text.result("shfl.sync.idx.b32", operand, 0, 31, "0xffffffff")

    def add_parts(self, warps: int) -> None:
        """Through shared memory, in the order of the inputs."""
        text, sums = self.text, [four for row in self._sums for four in row]
        bytes_a_slice = warps * WARP * 16  # four sums of every thread side by side, so that no two threads share a bank
        if self._spec.weights_per_step == 2:
            symbol = (
                self._layout.symbol
            )  # in the table's place: of two arrays, neither would begin where instructions can say it
            text.add("bar.sync 0")
        else:
            symbol = SUMS_SYMBOL
            text.add(f".shared .align 16 .b8 {symbol}[{len(sums) * bytes_a_slice}]")
        base = text.result("mov.u32", symbol)
        mine = text.result("add.u32", text.result("shl.b32", self._thread, 4), base)
        for number, four in enumerate(sums):
            text.add(f"st.shared.v4.f32 [{mine} + {number * bytes_a_slice}], {{{', '.join(four)}}}")
        text.add("bar.sync 0")
        first = text.result("and.b32", text.result("shl.b32", self._thread, 4), ~(WARP * (WARP_PARTS - 1) * 16))
        first = text.result("add.u32", first, base)
        for part in range(WARP_PARTS):
            for number, four in enumerate(sums):
                more = [text.register("f") for _ in four] if part else four
                place = number * bytes_a_slice + part * WARP * 16
                text.add(f"ld.shared.v4.f32 {{{', '.join(more)}}}, [{first} + {place}]")
                for total, term in zip(four if part else [], more, strict=False):
                    text.add(f"add.f32 {total}, {total}, {term}")

    def _load(self, predicate: str | None, row: int, registers: list[str], offset: int) -> None:
        """The lane's words of a tile, which no kernel writes while this one runs."""
        for register, address in zip(registers, self._words[row], strict=True):
            self.text.add(f"{f'@{predicate} ' if predicate else ''}ld.global.nc.b32 {register}, [{address} + {offset}]")

    def _load_x(self, predicates: list[str], registers: list[list[str]], offset: int) -> None:
        """The lane's part of x for a pair of tiles; zeros stay where there is no such row."""
        for four, address, predicate in zip(registers, self._x, predicates, strict=True):
            self.text.add(f"@{predicate} ld.global.nc.v4.b32 {{{', '.join(four)}}}, [{address} + {offset}]")

    def _advance(self, words: int, x: int | str) -> None:
        for address, step in [(a, words) for row in self._words for a in row] + [(a, x) for a in self._x]:
            self.text.add(f"add.s64 {address}, {address}, {step}")

    def _multiply(self, row: int, weights: list[str], x: list[list[str]]) -> None:
        for sums, part in zip(self._sums[row], x, strict=True):
            lists = ", ".join(f"{{{', '.join(each)}}}" for each in (sums, weights, part, sums))
            self.text.add(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {lists}")


class _Text:
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


def _decode(text: _Text, spec: TrellisSpec, aligned: list[str], table: Table, copy: str) -> list[str]:
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


def _half_sum(text: _Text, pair: str) -> str:
    """The sum of two fp16 in one register: one instruction, which takes its operands from either half as they lie."""
    low, high = text.register("h"), text.register("h")
    text.add(f"mov.b32 {{{low}, {high}}}, {pair}")
    return text.result("add.rn.f16", high, low, kind="h")


def _hybrid(text: _Text, spec: TrellisSpec, state: str, table: Table, copy: str) -> str:
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
