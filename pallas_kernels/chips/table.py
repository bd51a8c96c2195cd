"""The table of tile sizes that a search has measured: one JSON file for each kind of chip."""

from __future__ import annotations

from qjax.pallas_kernels.numbers.formats import QuantSpec


def weight(spec: QuantSpec, k: int) -> str:
    """What the table calls a weight with K = `k`: "int4/g64", or "int4/channel" where all of K shares a scale.

    How scales are stored makes no difference; a zero point does ("int4z/g64").
    """
    group = spec.group_size(k)
    return f"{spec.format}{'z' if spec.zero_point else ''}/{'channel' if group == k else f'g{group}'}"
