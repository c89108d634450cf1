"""Curves of the HTML pages, as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from worldloop.metrics import Comparison

WIDTH, HEIGHT, LEFT, BASE, RIGHT, TOP = 960, 280, 46, 236, 900, 16
FAINT, LINE, TRUE, IMAGINED = "#6b7280", "#e3e5e9", "#25639b", "#c46210"

Point = tuple[float, float]


def _text(x: float, y: float, words: str, anchor: str = "start", ink: str = FAINT) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}" '
            f'font-size="13" font-family="system-ui, sans-serif">{words}</text>')  # fmt: skip


def _line(x1: float, y1: float, x2: float, y2: float, ink: str = LINE, more: str = "") -> str:
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{ink}" {more}/>')  # fmt: skip


def chart(
    lines: Sequence[tuple[str, str, Sequence[Point]]], bars: Sequence[tuple[float, float, float]],
    label: str,
) -> str:  # fmt: skip
    """Shares in percent over steps or rounds as inline SVG.

    lines: (name, colour, points (x, share)); bars: (x, low, high) of intervals, drawn in the first
    line's colour. Empty where there is nothing to draw.
    """
    points = [point for _, _, line in lines for point in line]
    if not points:
        return ""
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    span = max(last - first, 1)

    def px(x: float) -> float:
        return LEFT + 20 + (RIGHT - LEFT - 40) * (x - first) / span

    def py(share: float) -> float:
        return BASE - (BASE - TOP) * min(max(share, 0.0), 1.0)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for percent in range(0, 101, 25):
        y = py(percent / 100)
        parts.append(_line(LEFT, y, RIGHT, y))
        parts.append(_text(LEFT - 8, y + 4, str(percent), "end"))
    marks = sorted({x for x, _ in points})
    for x in marks[:: max(1, len(marks) // 12)]:
        parts.append(_text(px(x), BASE + 18, f"{x:g}", "middle"))
    for x, low, high in bars:
        parts.append(_line(px(x), py(low), px(x), py(high), lines[0][1], 'stroke-width="2"'))
    for i, (name, color, line) in enumerate(lines):
        path = " ".join(f"{px(x):.1f},{py(share):.1f}" for x, share in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, share in line if len(line) <= 30 else ():
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(share):.1f}" r="4" fill="{color}"/>')
        parts.append(_text(LEFT + 20 + 240 * i, HEIGHT - 6, name, ink=color))
    parts.append(_text(RIGHT, HEIGHT - 6, html.escape(label), "end") + "</svg>")
    return "".join(parts)


def psnr_chart(comparison: Comparison, chunk: int) -> str:
    """PSNR over time as inline SVG: imagined (mean, middle 80 % of episodes) and static."""
    T = comparison.psnr.shape[1]
    mean, static = comparison.psnr.mean(0), comparison.psnr_static.mean(0)
    low, high = np.percentile(comparison.psnr, [10, 90], axis=0)
    bottom = 5 * math.floor(min(low.min(), static.min()) / 5)
    top = 5 * math.ceil(min(max(high.max(), static[1:].max()), 45) / 5)
    width, height, left, base, right = 960, 300, 46, 262, 790

    def x(t: float) -> float:
        return left + (right - left) * t / T

    def y(value: float) -> float:
        return base - (base - 16) * (min(max(value, bottom), top) - bottom) / (top - bottom)

    def path(values: npt.NDArray[np.float64]) -> str:
        return " ".join(f"{x(t + 1):.1f},{y(float(v)):.1f}" for t, v in enumerate(values))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="PSNR over time">']
    for value in range(bottom, top + 1, 5):
        parts.append(_line(left, y(value), right, y(value)))
        parts.append(_text(left - 8, y(value) + 4, str(value), "end"))
    for t in range(0, T + 1, chunk):
        parts.append(_line(x(t), 16, x(t), base, LINE, 'stroke-dasharray="3 4"'))
        parts.append(_text(x(t), base + 18, str(t), "middle"))
    band = path(high) + " " + " ".join(reversed(path(low).split()))
    parts.append(f'<polygon points="{band}" fill="{IMAGINED}" opacity="0.14"/>')
    for values, color in ((static, FAINT), (mean, IMAGINED)):
        parts.append(
            f'<polyline points="{path(values)}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
    ends = [y(float(mean[-1])) + 4, y(float(static[-1])) + 4]
    if abs(ends[0] - ends[1]) < 17:
        ends[1] = ends[0] + 17
    parts.append(_text(right + 8, ends[0], "imagined", ink=IMAGINED))
    parts.append(_text(right + 8, ends[1], "first frame repeated"))
    legend = "frame; PSNR in dB; dashed: between chunks; band: middle 80 % of episodes"
    parts.append(_text(left, height - 4, legend) + "</svg>")
    return "".join(parts)
