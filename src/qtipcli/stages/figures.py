"""Owns how a figure becomes text: how many digits it has, on a terminal and in a report alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WithError:
    """A figure and its standard error, None or 0 where there is none: as text to the second digit of the error."""

    value: float
    error: float | None

    def parts(self) -> tuple[str, str | None]:
        """The figure and its error as text; the latter None where there is none."""
        if not self.error:
            return text_of(self.value), None
        decimals = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{decimals}f}", f"{self.error:.{decimals}f}"

    def __str__(self) -> str:
        value, error = self.parts()
        return value if error is None else f"{value} ± {error}"


def text_of(value: Any) -> str:
    """A table cell: four significant digits for fractions, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " x ".join(str(part) for part in value)
    return str(value)
