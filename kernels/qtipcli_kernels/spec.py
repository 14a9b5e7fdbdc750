"""Owns TrellisSpec: which trellises and codes exist, and every size that follows from the choice. No torch here.

Letters of the paper (QTIP, arXiv 2406.11235, section 3): L state bits, V weights a step, kV bits a step, Q index bits of HYB.
"""

from dataclasses import dataclass

TILE = 16
"""Rows and columns of a tile: the size of one `mma.m16n8k16` A operand."""

TILE_WEIGHTS = TILE * TILE
"""Weights on one walk (the paper's T)."""

WORD_BITS = 32
"""Bits of one stored word."""

MIN_STATE_BITS, MAX_STATE_BITS = 8, 16
MAX_BITS_PER_STEP = 8

CODE_WEIGHTS_PER_STEP: dict[str, tuple[int, ...]] = {
    "1mad": (1,),
    "3inst": (1,),
    "mul1": (1,),
    "mcg": (1,),
    "hyb": (2,),
    "hyb2": (2,),
    "lut": (1, 2),
}
"""Every code and the weights per step (V) that it can emit; the first one is its default."""

HYB_INDEX_BITS = 9
"""Q: log2 of the entries of HYB's table (the paper, section 4.2)."""


class SpecError(ValueError):
    """A trellis that does not exist; the message names the field, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class TrellisSpec:
    """One bitshift trellis and its code, validated once.

    code: a key of CODE_WEIGHTS_PER_STEP.
    bits_per_step: kV, new bits a step takes in: 1..8 with one weight a step, 2..8 with two.
    state_bits: L, 8..16 and at least bits_per_step.
    weights_per_step: V; 0 stands for the code's own.
    """

    code: str
    bits_per_step: int
    state_bits: int = MAX_STATE_BITS
    weights_per_step: int = 0

    def __post_init__(self) -> None:
        allowed = CODE_WEIGHTS_PER_STEP.get(self.code)
        if allowed is None:
            raise SpecError(f"unknown code {self.code!r}: choose one of {', '.join(CODE_WEIGHTS_PER_STEP)}")
        if self.weights_per_step == 0:
            object.__setattr__(self, "weights_per_step", allowed[0])
        if self.weights_per_step not in allowed:
            raise SpecError(f"code {self.code} emits {allowed} weights per step, not {self.weights_per_step}")
        if not MIN_STATE_BITS <= self.state_bits <= MAX_STATE_BITS:
            raise SpecError(f"state_bits is {self.state_bits}: allowed are {MIN_STATE_BITS} to {MAX_STATE_BITS}")
        if not self.weights_per_step <= self.bits_per_step <= MAX_BITS_PER_STEP:
            raise SpecError(
                f"bits_per_step is {self.bits_per_step}: code {self.code} with {self.weights_per_step} weight(s) "
                f"per step takes {self.weights_per_step} to {MAX_BITS_PER_STEP}"
            )

    @classmethod
    def at_bits(cls, code: str, bits: float, state_bits: int = MAX_STATE_BITS) -> "TrellisSpec":
        """The spec of `code` at `bits` bits per weight; SpecError names the nearest rates when there is none."""
        rates = offered_bits(code)
        if bits not in rates:
            below = [rate for rate in rates if rate < bits][-1:]
            above = [rate for rate in rates if rate > bits][:1]
            nearest = " and ".join(f"{rate:g}" for rate in below + above)
            raise SpecError(f"code {code} has no {bits:g} bits per weight: the nearest it offers: {nearest}")
        weights_per_step = CODE_WEIGHTS_PER_STEP[code][0]
        if round(bits * weights_per_step) != bits * weights_per_step:
            weights_per_step = CODE_WEIGHTS_PER_STEP[code][-1]
        return cls(code, round(bits * weights_per_step), state_bits, weights_per_step)

    @property
    def bits(self) -> float:
        """Payload bits per weight, kV / V; exact, being a multiple of one half."""
        return self.bits_per_step / self.weights_per_step

    @property
    def states(self) -> int:
        """Number of states, 2^L."""
        return 1 << self.state_bits

    @property
    def shared_bits(self) -> int:
        """Bits that two neighbouring states have in common, L - kV."""
        return self.state_bits - self.bits_per_step

    @property
    def steps(self) -> int:
        """Steps of one tile's walk, 256 / V."""
        return TILE_WEIGHTS // self.weights_per_step

    @property
    def words_per_tile(self) -> int:
        """32-bit words of one tile's ring of 256 kV / V bits: always a whole number, 8 to 64."""
        return self.steps * self.bits_per_step // WORD_BITS


def offered_bits(code: str) -> tuple[float, ...]:
    """Every rate, in bits per weight and ascending, that `code` can be stored at."""
    if code not in CODE_WEIGHTS_PER_STEP:
        raise SpecError(f"unknown code {code!r}: choose one of {', '.join(CODE_WEIGHTS_PER_STEP)}")
    rates = {kv / v for v in CODE_WEIGHTS_PER_STEP[code] for kv in range(v, MAX_BITS_PER_STEP + 1)}
    return tuple(sorted(rates))
