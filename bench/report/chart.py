"""A picture of curves on log-log axes, as SVG within the page. Without JavaScript it is still whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

WIDTH, HEIGHT = 520, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46
# Okabe and Ito's colours, dashes and markers: each curve differs in grey too.
LOOKS = (
    ("#0072b2", "", "circle"),
    ("#d55e00", "7 4", "square"),
    ("#009e73", "2 3", "diamond"),
    ("#cc79a7", "9 3 2 3", "triangle"),
    ("#e69f00", "5 2", "cross"),
    ("#56b4e9", "1 2", "square"),
    ("#888888", "12 4", "circle"),
    ("#a08800", "2 2 8 2", "diamond"),
)
SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "triangle": "M0-5L4.6 3.6H-4.6z",
    "cross": "M-4-4L4 4M4-4L-4 4",
}
UP = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class Series:
    """A curve: its name, points (x, y) above 0 by ascending x, and which of `LOOKS` it has."""

    name: str
    points: list[tuple[float, float]]
    look: int


@dataclass(frozen=True)
class Drawn:
    """A curve as it is drawn: colour, dashes, marker, path, and of each point (x, y, value in words)."""

    name: str
    colour: str
    dashes: str
    shape: str
    path: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """Curves on log-log axes.

    words    a value in words, as a hover tells it
    guides   by name, a power and the point (x, y) that its line goes through
    line     a value of y that gets a line across, as 1 of a ratio
    """

    x: str
    y: str
    series: list[Series]
    words: Callable[[float], str]
    guides: dict[str, tuple[int, tuple[float, float]]] = field(default_factory=dict)
    line: float | None = None

    def _range(self, axis: int) -> tuple[float, float]:
        values = [point[axis] for one in self.series for point in one.points]
        values += [self.line] if axis and self.line else []
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.05 * (high - low), 0.05)
        return low - room, high + room

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point in the picture."""
        (left, right), (low, high) = self._range(0), self._range(1)
        across = (math.log10(x) - left) / (right - left)
        up = (math.log10(y) - low) / (high - low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    @property
    def curves(self) -> list[Drawn]:
        """The curves as they are drawn."""
        found = []
        for one in self.series:
            colour, dashes, shape = LOOKS[one.look % len(LOOKS)]
            places = [self.at(*point) for point in one.points]
            path = "M" + "L".join(f"{x} {y}" for x, y in places)
            told = [f"{one.name}: {self.words(y)} at N = {x:g}" for x, y in one.points]
            points = [(*place, words) for place, words in zip(places, told, strict=True)]
            found.append(Drawn(one.name, colour, dashes, SHAPES[shape], path, points))
        return found

    @property
    def lines(self) -> list[tuple[str, float, float, float, float]]:
        """Guides as (name, x₁, y₁, x₂, y₂), from their point down to the picture's edge."""
        left, low = self._range(0)[0], self._range(1)[0]
        found = []
        for name, (power, (x, y)) in self.guides.items():
            start = max(left, math.log10(x) - (math.log10(y) - low) / power)
            down = 10**start, y * (10**start / x) ** power
            found.append((name, *self.at(*down), *self.at(x, y)))
        return found

    @property
    def across(self) -> float | None:
        """The height of `line` in the picture."""
        return None if self.line is None else self.at(self.series[0].points[0][0], self.line)[1]

    @property
    def ticks(self) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
        """Places and texts of the ticks on either axis: powers of 2, and of 10; of a short range 1, 2 and 5 too."""
        (left, right), (low, high) = self._range(0), self._range(1)
        twos = [2.0**k for k in range(math.ceil(left / math.log10(2)), math.floor(right / math.log10(2)) + 1)]
        twos = twos[:: 1 + len(twos) // 7]
        tens = range(math.floor(low), math.floor(high) + 1)
        if high - low > 2.2:
            step = 1 + len(tens) // 7
            values = [(10.0**k, "10" + str(k).translate(UP)) for k in tens if k % step == 0]
        else:
            values = [(d * 10.0**k, f"{d * 10.0**k:g}") for k in tens for d in (1, 2, 5)]
        y = [(self.at(10**left, v)[1], words) for v, words in values if low <= math.log10(v) <= high]
        return [(self.at(v, 10**low)[0], f"{v:g}") for v in twos], y
