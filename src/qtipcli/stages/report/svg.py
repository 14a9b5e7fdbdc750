"""Owns the means to draw: an SVG picture as text, scales from values to pixels, and the ticks of their axes.

Colours and fonts are classes, which style.css gives a meaning in light and in dark. All text is escaped here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

CHARACTER_WIDTH = 6.3
"""Pixels of a character of the charts' 11 px text: a little more than the mean of the usual sans-serif fonts."""

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Picture:
    """An SVG of `width` x `height` pixels that scales to the width it is given. name: what it shows, to be read aloud."""

    def __init__(self, width: float, height: float, name: str, kind: str = "") -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg class="{kind}" viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" '
            f'height="{number(height)}" role="img" aria-label="{escape(name)}" xmlns="http://www.w3.org/2000/svg">'
        ]

    def line(self, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
        """A straight line."""
        self._parts.append(f'<line class="{kind}" x1="{number(x0)}" y1="{number(y0)}" x2="{number(x1)}" y2="{number(y1)}"/>')

    def path(self, points: list[tuple[float, float]], kind: str) -> None:
        """A line through these points."""
        if len(points) > 1:
            way = " ".join(f"{number(x)},{number(y)}" for x, y in points)
            self._parts.append(f'<polyline class="{kind}" points="{way}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, hint: str = "", opacity: float = 1) -> None:
        """A rectangle; hint: shown where a pointer rests on it."""
        title = f"<title>{escape(hint)}</title>" if hint else ""
        faint = f' fill-opacity="{number(opacity)}"' if opacity < 1 else ""
        self._parts.append(
            f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
            f"{faint}>{title}</rect>"
        )

    def dot(self, x: float, y: float, radius: float, kind: str, hint: str = "") -> None:
        """A disc; hint: as in `box`."""
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self._parts.append(f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}">{title}</circle>')

    def text(self, x: float, y: float, text: str, kind: str = "label", anchor: str = "start", turned: bool = False) -> None:
        """Text on the baseline y; anchor: start, middle or end at x; turned: upwards around that point."""
        turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
        self._parts.append(
            f'<text class="{kind}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'
        )

    def __str__(self) -> str:
        return "".join([*self._parts, "</svg>"])


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as pixels from `start` to `end`, linear or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of `value`; values outside of the range lie outside of the pixels."""
        low, high, at = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1.0)

    def ticks(self, most: int) -> list[float]:
        """At most some `most` round values within the range."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten in [low, high], every one or every few; with 2 and 5 times them where there is room."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    for factors in ((1, 2, 5), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if 2 <= len(found) <= most:
            return found
    step = max(1, math.ceil((last - first) / most))
    return [10.0**power for power in range(first, last + 1, step) if low * (1 - 1e-9) <= 10.0**power <= high * (1 + 1e-9)]


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A tick's label: plain digits near one, a power of ten far from it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        factor = value / 10.0**power
        return (f"{factor:.3g}·" if abs(factor - 1) > 1e-6 else "") + f"10{str(power).translate(_RAISED)}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def text_width(text: str) -> float:
    """About how many pixels a label takes."""
    return CHARACTER_WIDTH * len(text)


def shortened(text: str, characters: int) -> str:
    """The text, or its start and end around an ellipsis."""
    if len(text) <= characters:
        return text
    end = (characters - 1) // 2
    return f"{text[: characters - 1 - end]}…{text[len(text) - end :]}"


def number(value: float) -> str:
    """A coordinate: hundredths of a pixel are enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
