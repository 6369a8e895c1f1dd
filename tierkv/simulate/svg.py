"""Line charts as inline SVG: no script, no font, no file beside it; colours are the page's (page.py), so dark and light work."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from typing import Final

WIDTH: Final = 440
HEIGHT: Final = 280
LEFT: Final = 46
RIGHT: Final = 18
TOP: Final = 10
BOTTOM: Final = 34
MARKS: Final = ("circle", "square", "diamond", "triangle")
SIZE: Final = 3.4


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. css: class of its colour.  mark: of MARKS at each point, None: none.  says: of each point, shown on hover."""

    name: str
    points: Sequence[tuple[float, float]]
    css: str
    mark: str | None = None
    says: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis, linear or logarithmic. ticks: values that are named, within [low, high]."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    show: Callable[[float], str]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return (log10(value) - log10(self.low)) / max(log10(self.high) - log10(self.low), 1e-9)
        return (value - self.low) / max(self.high - self.low, 1e-9)


def chart(title: str, lines: Sequence[Line], *, x: Axis, y: Axis) -> str:
    """A whole chart."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" preserveAspectRatio="xMidYMid meet">',
        *_grid(x, y),
    ]
    for line in lines:
        parts += _curve(line, x, y)
    return "".join((*parts, "</svg>"))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for tick in y.ticks:
        at = _y(y, tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(y.show(tick))}</text>'
    for tick in x.ticks:
        at = _x(x, tick)
        yield f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 4}"/>'
        yield f'<text x="{at:.1f}" y="{floor + 15}" text-anchor="middle">{escape(x.show(tick))}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x.title)}</text>'


def _curve(line: Line, x: Axis, y: Axis) -> Iterator[str]:
    places = [(_x(x, a), _y(y, b)) for a, b in line.points]
    yield f'<g class="{line.css}"><polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
    for number, (a, b) in enumerate(places if line.mark else ()):
        says = f"<title>{escape(line.says[number])}</title>" if line.says else ""
        yield f"<g>{mark(line.mark or MARKS[0], a, b)}{says}</g>"
    yield "</g>"


def mark(shape: str, a: float, b: float) -> str:
    """A point of a curve, centred."""
    if shape == "circle":
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{SIZE}"/>'
    corners = {
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
        "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    }[shape]
    return f'<polygon points="{" ".join(f"{a + SIZE * dx:.1f},{b + SIZE * dy:.1f}" for dx, dy in corners)}"/>'


def steps(low: float, high: float, count: int) -> list[float]:
    """About `count` round values that cover [low, high], from one at or under `low` to one at or over `high`."""
    size = max((high - low) / max(count, 1), 1e-9)
    power = 10.0 ** int(log10(size) // 1)
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= size * 0.999)
    first, last = int(low // step), -int(-high // step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
