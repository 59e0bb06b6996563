"""Figures of the comparison page as SVG, in the page's own colours (classes of page.css).

Matplotlib is not used. Its SVG of the same scatter plot takes 26 kB instead of 4 (histogram: 13 instead of 5). Its
colours are fixed although the page may be light or dark, its ids clash within one page, and its marks show no names on
hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor

from simsearch.comparison.templates import ENVIRONMENT

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 26, 42


@dataclass(frozen=True)
class Point:
    """A mark of a scatter plot.

    Attributes:
        number: The number beside the mark.
        name: The name on hover.
        x: Position in x.
        y: Position in y.
        low: Lower end of the interval in y.
        high: Upper end of the interval in y.
        is_baseline: True for the baseline.
    """

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
    """A scatter plot of quality against a cost on a logarithmic axis. A dashed line joins the Pareto front.

    Args:
        points: The marks. x is the cost, y the quality.
        x_label: Label of the cost axis.
        y_label: Label of the quality axis.
        x_text: Function that formats a cost.
        x_ticks: Round costs in ascending order. Some of them are marked.

    Raises:
        ValueError: If a cost is not above 0.
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

    inside = [tick for tick in x_ticks if left <= math.log2(tick) <= right]
    ends = [min(costs), max(costs)] if right - left > 1.5 else [min(costs)]
    marks, boxes = [], [(x(p.x), y(p.y), 5.0, 5.0) for p in points]
    for p in points:
        place = _free_place(x(p.x), y(p.y), 6.5 * len(str(p.number)), boxes)
        boxes.append((*place, 3.5 * len(str(p.number)), 6.0))
        marks.append(
            {"point": p, "x": x(p.x), "y": y(p.y), "low": y(p.low), "high": y(p.high), "label": place}
            | {"cost": x_text(p.x)}
        )
    return _macro("scatter")(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        top=_TOP,
        bottom=_HEIGHT - _BOTTOM,
        y_ticks=[(y(tick), f"{tick:.10g}") for tick in ticks],
        x_ticks=[(x(tick), x_text(tick)) for tick in (_some(inside) if len(inside) > 1 else ends)],
        front=[(x(p.x), y(p.y)) for p in _front(points)],
        marks=marks,
        x_label=x_label,
        y_label=y_label,
    )


def _free_place(
    x: float, y: float, width: float, boxes: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float]:
    """The nearest free place for a label. `boxes` are centres and half sizes of what is already drawn."""
    for distance in (12, 20, 28, 36, 44):
        for dx, dy in ((1, 0), (-1, 0), (0.8, -0.8), (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)):
            place = (x + dx * distance, y + dy * distance)
            if all(abs(place[0] - bx) > w + width / 2 or abs(place[1] - by) > h + 6 for bx, by, w, h in boxes):
                return place
    return x + 12, y


def _front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, by cost: points that no other point beats in quality at the same or a lower cost."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or p.y > best[-1].y:
            best.append(p)
    return best


def histogram(differences: Tensor, name: str, widest: float, bins: int = 40) -> Markup:
    """A histogram of the differences between a run and the baseline, per query. Equal queries are left out.

    Bar heights are proportional to the square root of the counts, so that a few large differences remain visible beside
    many small ones.

    Args:
        differences: float64 (Q,), within -widest..widest. NaN is left out.
        name: Name of the metric.
        widest: End of the axis.
        bins: Number of bins.
    """
    values = differences[differences.isfinite() & (differences != 0)]
    counts = torch.histc(values.float(), bins, -widest, widest).tolist()
    width, base = 300, 90
    step = (width - 8) / bins
    bars = [
        {
            "kind": "worse" if 2 * i < bins else "better",
            "x": 4 + i * step,
            "width": step - 0.8,
            "height": max(1.0, math.sqrt(count / max(counts)) * (base - 6)),
            "count": int(count),
            "middle": (2 * (i + 0.5) / bins - 1) * widest,
        }
        for i, count in enumerate(counts)
        if count
    ]
    return _macro("histogram")(width=width, height=110, base=base, bars=bars, widest=widest, name=name)


def _macro(name: str) -> Callable[..., Markup]:
    return getattr(ENVIRONMENT.get_template("charts.svg.j2").module, name)


def _linear_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover low..high."""
    span = max(high - low, 1e-3)
    size = 10 ** math.floor(math.log10(span))
    step = next(size * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (size * f) <= 6)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _some(ticks: Sequence[float], most: int = 7) -> Sequence[float]:
    return ticks[:: -(-len(ticks) // most) or 1]
