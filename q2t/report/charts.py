"""Charts as inline SVG, drawn at the size of a phone's column and coloured by the page's style sheet.

Not matplotlib: its SVG has fixed colours (no dark mode), 20 to 50 kB and bytes that follow its version.
Classes used: `axis`, `grid`, `mute`, `value`, `whisker`, `band`, and one per series, which sets `color`.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from q2t.report import percent, size

Scale = Callable[[float], float]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
WIDTH = 360
SERIES = {"loss": "loss", "cross_entropy": "cross-entropy", "kl": "distillation"}


def graph(nodes: Sequence[Mapping[str, str]], edges: Iterable[tuple[str, str]], title: str) -> Markup:
    """Boxes from top to bottom, arrows down from one to the next and around the others.

    `nodes`: name and text, in an order in which every edge goes down. `edges`: pairs of names.
    """
    right, step, tall = 236, 42, 28
    middle = {node["name"]: step * number + tall / 2 + 1 for number, node in enumerate(nodes)}
    parts = []
    for start, end in sorted(edges, key=lambda edge: (middle[edge[0]], middle[edge[1]])):
        y1, y2 = middle[start], middle[end]
        if y2 - y1 == step:
            path, head = f"M40 {_n(y1 + tall / 2)}V{_n(y2 - tall / 2 - 5)}", f"M36 {_n(y2 - tall / 2 - 6)}h8l-4 6z"
        else:
            y1, y2, bulge = y1 + 5, y2 - 5, right + 16 * (y2 - y1) / step
            path = f"M{right} {_n(y1)}C{_n(bulge)} {_n(y1)} {_n(bulge)} {_n(y2)} {right + 6} {_n(y2)}"
            head = f"M{right + 6} {_n(y2 - 4)}v8l-6 -4z"
        parts.append(Markup('<path class="edge" d="{}"/><path class="head" d="{}"/>').format(path, head))
    for node in nodes:
        y = middle[node["name"]]
        box = Markup('<rect class="node" x="1" y="{}" width="{}" height="{}" rx="3"/>')
        parts.append(box.format(_n(y - tall / 2), right - 1, tall))
        parts.append(_text(11, y + 4, node["name"], "label", "start"))
        parts.append(_text(right - 10, y + 4, node["text"], "mute", "end"))
    return _svg(step * len(nodes) - step + tall + 2, title, parts)


def bars(rows: Sequence[Mapping[str, Any]], title: str, reference: float | None = None) -> Markup:
    """Horizontal bars with interval whiskers.

    `rows`: name, value and interval (shares, or None), kind (the class that colours it). The axis starts at
    0 and ends at 1, or at the highest whisker if that is higher. `reference` is a dashed line.
    """
    left, right, top, step = 12 + 6.6 * max(len(row["name"]) for row in rows), 54, 4, 21
    high = max([1.0] + [row["interval"][1] for row in rows if row["interval"]])
    x = _linear(0, high, left, WIDTH - right)
    height = top + step * len(rows) + 20
    parts = []
    for tick in ticks(0, high, 4):
        parts.append(_line(x(tick), top, x(tick), height - 18, "grid"))
        parts.append(_text(x(tick), height - 5, f"{100 * tick:.0f}%", "mute", "middle"))
    if reference is not None:
        parts.append(_line(x(reference), top, x(reference), height - 18, "reference"))
    for number, row in enumerate(rows):
        y = top + step * number + step / 2
        parts.append(_text(left - 8, y + 4, row["name"], "label", "end"))
        parts.append(_text(WIDTH, y + 4, percent(row["value"]), "value", "end"))
        if row["value"] is not None:
            parts.append(
                Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="12"/>').format(
                    row["kind"], _n(left), _n(y - 6), _n(x(row["value"]) - left)
                )
            )
        if row["interval"]:
            low, upper = map(x, row["interval"])
            parts.append(_line(low, y, upper, y, "whisker"))
            parts += [_line(end, y - 3, end, y + 3, "whisker") for end in (low, upper)]
    return _svg(height, title, parts)


def scatter(rows: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """Accuracy against bytes on disk, on a logarithmic axis. `rows`: name, bytes, value, interval, kind."""
    height, left, right, top, bottom = 270, 42, 14, 10, 40
    low, high = min(row["bytes"] for row in rows) / 1.35, max(row["bytes"] for row in rows) * 1.35
    x, y = _log(low, high, left, WIDTH - right), _linear(0, 1, height - bottom, top)
    parts = []
    for tick in ticks(0, 1, 4):
        parts.append(_line(left, y(tick), WIDTH - right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, f"{100 * tick:.0f}%", "mute", "end"))
    for tick in log_ticks(low, high):
        parts.append(_line(x(tick), height - bottom, x(tick), height - bottom + 4, "axis"))
        parts.append(_text(x(tick), height - bottom + 17, size(tick), "mute", "middle"))
    parts.append(_line(left, height - bottom, WIDTH - right, height - bottom, "axis"))
    parts.append(_text((left + WIDTH - right) / 2, height - 5, "size on disk (log)", "mute", "middle"))
    taken: list[Box] = []
    for row in rows:
        at, ends = x(row["bytes"]), [y(end) for end in row["interval"]]
        parts.append(_line(at, ends[0], at, ends[1], "whisker"))
        taken.append((at - 3, ends[1], at + 3, ends[0]))
    for row in rows:
        middle = (x(row["bytes"]), y(row["value"]))
        parts.append(Markup('<circle class="point {}" cx="{}" cy="{}" r="5"/>').format(row["kind"], *map(_n, middle)))
        spot, anchor = _label_spot(middle, row["name"], taken, (left, top, WIDTH, height - bottom))
        parts.append(_text(*spot, row["name"], "label", anchor))
    return _svg(height, title, parts)


def curve(path: Path, title: str, bins: int = 40) -> Markup | None:
    """Loss, cross-entropy and KL of one training stage against its steps; None if there is nothing to draw.

    Every series is averaged in at most `bins` bins; the band is each bin's range. The axis is logarithmic
    where the values span more than a factor of 20.
    """
    series = read_curve(path)
    if series.get("loss") == series.get("cross_entropy"):
        series.pop("loss", None)  # plain cross-entropy training: one line, not two on top of each other
    binned = {name: _bins(points, bins) for name, points in series.items()}
    if not binned:
        return None
    height, left, right, top, bottom = 220, 42, 10, 24, 38
    values = [v for rows in binned.values() for _, *range_ in rows for v in range_]
    last = max(rows[-1][0] for rows in binned.values())
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 20
    x = _linear(0, last, left, WIDTH - right)
    if logarithmic:
        y, y_ticks = _log(low, high, height - bottom, top), log_ticks(low, high)
        y_ticks = y_ticks if len(y_ticks) < 7 else [t for t in y_ticks if f"{t:.0e}"[0] == "1"]
    else:
        y, y_ticks = _linear(min(low, 0), high * 1.02 or 1, height - bottom, top), ticks(min(low, 0), high, 4)
    parts = []
    for tick in y_ticks:
        parts.append(_line(left, y(tick), WIDTH - right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:.3g}", "mute", "end"))
    for tick in ticks(0, last, 4):
        parts.append(_text(x(tick), height - bottom + 16, f"{tick:,.0f}", "mute", "middle"))
    scale = "nats a token (log)" if logarithmic else "nats a token"
    parts.append(_text((left + WIDTH - right) / 2, height - 5, f"step; values in {scale}", "mute", "middle"))
    parts.append(_line(left, height - bottom, WIDTH - right, height - bottom, "axis"))
    legend = float(left)
    for name, rows in binned.items():
        upper = [(x(step), y(most)) for step, _, _, most in rows]
        lower = [(x(step), y(least)) for step, _, least, _ in reversed(rows)]
        mean = [(x(step), y(value)) for step, value, _, _ in rows]
        parts.append(Markup('<polygon class="band {}" points="{}"/>').format(name, _points(upper + lower)))
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(name, _points(mean)))
        parts.append(_line(legend, 10, legend + 16, 10, f"line {name}"))
        parts.append(_text(legend + 21, 14, SERIES[name], "label", "start"))
        legend += 38 + 6.6 * len(SERIES[name])
    return _svg(height, title, parts)


def read_curve(path: Path) -> dict[str, list[Point]]:
    """Series name to its finite (step, value) points; one that is empty or zero throughout is left out."""
    series: dict[str, list[Point]] = {name: [] for name in SERIES}
    with open(path, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            for name, points in series.items():
                value = float(row.get(name) or "nan")
                if math.isfinite(value):
                    points.append((float(row["step"]), value))
    return {name: points for name, points in series.items() if any(value for _, value in points)}


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values in [low, high], 1, 2, 2.5 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in [low, high]; `ticks` if that gives fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    return inside if len(inside) > 1 else ticks(low, high, 3)


def _bins(points: Sequence[Point], bins: int) -> list[tuple[float, float, float, float]]:
    """(middle step, mean, least, most) of at most `bins` runs of neighbouring points."""
    width = math.ceil(len(points) / bins)
    runs = [points[start : start + width] for start in range(0, len(points), width)]
    rows = []
    for run in runs:
        values = [value for _, value in run]
        middle = math.fsum(step for step, _ in run) / len(run)
        rows.append((middle, math.fsum(values) / len(run), min(values), max(values)))
    return rows


def _label_spot(at: Point, name: str, taken: list[Box], frame: Box) -> tuple[Point, str]:
    """Where a point's label meets the fewest labels and whiskers, in the frame; its box is added to `taken`."""
    width = 7.2 * len(name)
    sides = ((9, "start"), (-9, "end"))
    spots = [(dx, dy, anchor) for dx, anchor in sides for dy in (4, -8, 16, -20, 28)]
    boxes = []
    for dx, dy, anchor in spots:
        start = at[0] + dx - (width if anchor == "end" else 0)
        boxes.append((start, at[1] + dy - 11, start + width, at[1] + dy + 2))
    crossed = [(not _inside(box, frame), sum(_meet(box, other) for other in taken)) for box in boxes]
    chosen = crossed.index(min(crossed))
    taken.append(boxes[chosen])
    dx, dy, anchor = spots[chosen]
    return (at[0] + dx, at[1] + dy), anchor


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _linear(low: float, high: float, start: float, stop: float) -> Scale:
    width = high - low or 1
    return lambda value: start + (value - low) / width * (stop - start)


def _log(low: float, high: float, start: float, stop: float) -> Scale:
    linear = _linear(math.log(low), math.log(high), start, stop)
    return lambda value: linear(math.log(value))


def _n(value: float) -> str:
    """A coordinate with one digit, and so the same text on every platform."""
    return f"{value + 0.0:.1f}".removesuffix(".0")


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    ends = map(_n, (x1, y1, x2, y2))
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, *ends)


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    template = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return template.format(kind, _n(x), _n(y), anchor, text)


def _svg(height: float, title: str, parts: Iterable[Markup]) -> Markup:
    open_ = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, _n(height), title)
    return open_ + Markup("").join(parts) + Markup("</svg>")
