"""Plans as tables."""

from __future__ import annotations


def _bytes(n: int | float) -> str:
    units = ["B", "kB", "MB"]
    while n >= 10_000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:,.0f} {units[0]}" if n >= 100 or units[0] == "B" else f"{n:.1f} {units[0]}"
