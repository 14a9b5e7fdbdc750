"""Owns the PTX of the product's loop: tiles are loaded a trip ahead, decoded (lane.py) and multiplied with rows of x.

Triton has no say in it: what decides is which loads are in flight while a lane computes.
"""

from qtipcli_kernels.fragments import FRAGMENT_BYTES
from qtipcli_kernels.lane import MAX_WORDS, SMALL_TABLE, WARP, Table, Text, aligned, decode, words_read
from qtipcli_kernels.spec import TrellisSpec

WARP_ROWS = 2
"""Rows of tiles that a warp multiplies side by side: they share the loads of x."""

WARP_PARTS = 4
"""Warps of a program that share rows of tiles and divide their inputs: what is left to add up afterwards is so much less."""

ACCUMULATORS = 8 * WARP_ROWS
"""float32 registers a lane adds up in: four for a row of tiles and eight rows of x, of which there are up to sixteen."""

# "&": an output must not share a register with an operand that a later instruction of the text still reads.
MULTIPLY_CONSTRAINTS = ",".join(["=&f"] * ACCUMULATORS + ["l"] * (MAX_WORDS + 1) + ["r"] * 2 + ["l"] * 2 + ["r"] * 5)

SUMS_SYMBOL = "qtip_sums"


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


class _Loop:
    """The parts of `multiply`'s text. Registers that trips hand to one another are written in place."""

    def __init__(self, spec: TrellisSpec, columns: int, table: Table) -> None:
        self.text = text = Text()
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
                bits = aligned(text, self._spec, held, self._offset)
                if bits is not held:
                    self._load(more, row, held, tile * size)
                weights = decode(text, self._spec, bits, self._layout, self._copy)
                if bits is held:
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
            weights = decode(text, self._spec, aligned(text, self._spec, words, self._offset), self._layout, self._copy)
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
