"""Figures of the comparison page as SVG, in the page's own colours (classes of page.css)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simsearch.comparison.markup import Markup, element, joined

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 26, 42


@dataclass(frozen=True)
class Point:
    """A mark of a scatter plot: the number beside it, the name on hovering, its place and the interval in y."""

    number: int
    name: str
    x: float
    y: float
    low: float
    high: float
    is_baseline: bool = False


def scatter(
    points: Sequence[Point], x_label: str, y_label: str, x_text: Callable[[float], str], x_ticks: Sequence[float]
) -> Markup:
    """Quality against a cost on a logarithmic axis; a dashed line joins the points that none beats in both.

    x_text: how a cost is written. x_ticks: round costs, ascending, of which some are marked. Raises ValueError
    where a cost is not above 0.
    """
    if not points or min(p.x for p in points) <= 0:
        raise ValueError("a logarithmic axis needs points with costs above 0")
    low, high = min(p.low for p in points), max(p.high for p in points)
    ticks = _linear_ticks(low, high)
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])
    costs = [p.x for p in points]
    left, right = math.log2(min(costs)), math.log2(max(costs))
    margin = max(0.08 * (right - left), 0.5)
    left, right = left - margin, right + margin

    def x(value: float) -> float:
        return _LEFT + (math.log2(value) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(_line("grid", _LEFT, y(tick), _WIDTH - _RIGHT, y(tick)))
        parts.append(_text("tick end", _LEFT - 6, y(tick) + 4, f"{tick:.10g}"))
    inside = [tick for tick in x_ticks if left <= math.log2(tick) <= right]
    for tick in _some(inside) if len(inside) > 1 else {min(costs), max(costs) if right - left > 1.5 else min(costs)}:
        parts.append(_line("grid", x(tick), _TOP, x(tick), _HEIGHT - _BOTTOM))
        parts.append(_text("tick middle", x(tick), _HEIGHT - _BOTTOM + 16, x_text(tick)))
    front = _front(points)
    if len(front) > 1:
        path = "".join(
            f"{'M' if i == 0 else 'H'}{x(p.x):.1f}{f',{y(p.y):.1f}' if i == 0 else f'V{y(p.y):.1f}'}"
            for i, p in enumerate(front)
        )
        parts.append(element("path", {"class": "front", "d": path}))
    marks, boxes = [], [(x(p.x), y(p.y), 5.0, 5.0) for p in points]
    for p in points:
        parts.append(_line("whisker", x(p.x), y(p.low), x(p.x), y(p.high)))
        title = element("title", {}, f"{p.number}. {p.name}: {p.y:.4f} at {x_text(p.x)}")
        kind = "mark baseline" if p.is_baseline else "mark"
        marks.append(element("circle", {"class": kind, "cx": f"{x(p.x):.1f}", "cy": f"{y(p.y):.1f}", "r": 4.5}, title))
        at = _free_place(x(p.x), y(p.y), 6.5 * len(str(p.number)), boxes)
        boxes.append((*at, 3.5 * len(str(p.number)), 6.0))
        marks.append(_text("number middle", at[0], at[1] + 4, str(p.number)))
    parts += [
        *marks,
        _text("label middle", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label),
        _text("label", 4, 12, y_label),
    ]
    return _figure(_WIDTH, _HEIGHT, f"{y_label} against {x_label}", parts)


def _free_place(
    x: float, y: float, width: float, boxes: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float]:
    """The nearest place for a label where nothing lies yet; boxes are centres and half sizes."""
    for distance in (12, 20, 28, 36, 44):
        for dx, dy in ((1, 0), (-1, 0), (0.8, -0.8), (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)):
            place = (x + dx * distance, y + dy * distance)
            if all(abs(place[0] - bx) > w + width / 2 or abs(place[1] - by) > h + 6 for bx, by, w, h in boxes):
                return place
    return x + 12, y


def _front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in quality at the same cost or less, by cost."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or p.y > best[-1].y:
            best.append(p)
    return best


def histogram(differences: Tensor, name: str, widest: float, bins: int = 40) -> Markup:
    """How many queries a run ranks better and worse than the baseline, by the difference; equal ones are left out.

    differences: float64 (Q,), within -widest..widest; NaN is left out. Heights go with the square root of the
    counts, so that the few great differences show beside the many small ones.
    """
    values = differences[differences.isfinite() & (differences != 0)]
    counts = torch.histc(values.float(), bins, -widest, widest).tolist()
    width, height, base = 300, 110, 90
    most = max([*counts, 1.0])
    step = (width - 8) / bins
    parts = []
    for i, count in enumerate(counts):
        if count:
            tall = max(1.0, math.sqrt(count / most) * (base - 6))
            place = {"x": f"{4 + i * step:.1f}", "y": f"{base - tall:.1f}", "width": f"{step - 0.8:.1f}"}
            middle = (2 * (i + 0.5) / bins - 1) * widest
            title = element("title", {}, f"{count:.0f} queries near {middle:+.2f}")
            kind = "worse" if 2 * i < bins else "better"
            parts.append(element("rect", {"class": kind, **place, "height": f"{tall:.1f}"}, title))
    parts += [
        _line("axis", 4, base, width - 4, base),
        _line("axis", width / 2, 4, width / 2, base),
        _text("tick", 4, base + 14, f"{-widest:+.2f}"),
        _text("tick middle", width / 2, base + 14, "0"),
        _text("tick end", width - 4, base + 14, f"{widest:+.2f}"),
    ]
    return _figure(width, height, f"Differences of {name} to the baseline by query", parts)


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover low..high, four to eight of them."""
    span = max(high - low, 1e-3)
    size = 10 ** math.floor(math.log10(span))
    step = next(size * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (size * f) <= 6)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _some(ticks: Sequence[float], most: int = 7) -> Sequence[float]:
    return ticks[:: -(-len(ticks) // most) or 1]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return element("line", {"class": kind, **{key: f"{value:.1f}" for key, value in places.items()}})


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return element("text", {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}, text)


def _figure(width: int, height: int, label: str, parts: Sequence[Markup]) -> Markup:
    size = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label}
    return element("svg", size, joined(*parts))
