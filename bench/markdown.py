"""What the pages are made of: tables, figures, the name of a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def number(value: float, digits: int = 3) -> str:
    """Significant digits, without an exponent where the figure is of everyday size."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return f"{value:,.0f}" if "e" in text or abs(value) >= 1000 else text
    return f"{value:.{digits - 1}e}"


def device_name(machine: Mapping[str, Any]) -> str:
    """The GPU, or the CPU and how many of its threads."""
    threads = machine["threads"]
    return machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
