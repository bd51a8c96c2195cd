"""Plans as tables, text and plain data.

What is shown is read by name from the plan that is handed in: the classes of `decisions` call these functions to print
themselves, so that this file knows none of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


def bytes_text(n: int | float) -> str:
    """A number of bytes, in units of a thousand."""
    units = ["B", "kB", "MB"]
    while n >= 10_000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:,.0f} {units[0]}" if n >= 100 or units[0] == "B" else f"{n:.1f} {units[0]}"


def plain_text(renderable: RenderableType, width: int = 1000) -> str:
    """What rich prints, without color; the default is so wide that nothing wraps: paths can be searched for."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _table(*columns: tuple[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    for name, options in columns:
        table.add_column(name, **options)
    return table


def plan_table(plan: Any) -> Table:
    """The parameters of a `Plan`: a row each."""
    with_inputs = any(e.activations for e in plan.entries)
    with_runs = bool(plan.runs)
    right: dict[str, Any] = {"justify": "right"}
    table = _table(
        ("parameter", {"footer": "total", "overflow": "fold"}),
        ("shape", {"overflow": "fold"}),
        ("op", {}),
        ("format", {}),
        *([("input", {})] if with_inputs else []),
        ("float", {**right, "footer": bytes_text(plan.float_bytes)}),
        ("stored", {**right, "footer": bytes_text(plan.stored_bytes)}),
        ("bits/w", {**right, "footer": f"{plan.bits_per_weight:.2f}"}),
        *([("runs as", {})] if with_runs else []),
        ("reason", {"overflow": "fold"}),
    )
    for e in plan.entries:
        inputs = [str(e.activations or ("float" if e.ops else ""))] if with_inputs else []
        runs = ["; ".join(dict.fromkeys(run.runs for run in plan.runs_of(e.name)))] if with_runs else []
        table.add_row(
            e.name,
            f"{jnp.dtype(e.dtype).name}[{','.join(map(str, e.shape))}]",
            " ".join(e.ops),
            str(e.spec) if e.spec else "folded" if e.folded_into else "float",
            *inputs,
            "" if e.sources else bytes_text(e.float_bytes),
            bytes_text(e.stored_bytes),
            f"{8 * e.stored_bytes / e.size:.2f}" if e.size else "-",
            *runs,
            e.reason,
        )
    return table


def plan_lines(plan: Any) -> Iterator[str]:
    """What a `Plan` says beside its tables."""
    for what, reason in (*plan.unweighted, *((f"batch norm {name}", what) for name, what in plan.norms)):
        yield f"{what}: {reason}"
    for fusion in plan.fusions:
        yield f"fused {fusion}"
    for joint in plan.joints:
        yield f"joined {joint}"
    for attention in plan.attentions:
        yield f"attention on packed caches {attention}"
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for run in plan.fallbacks:
        reasons.setdefault((run.runs, run.reason), {}).update(dict.fromkeys(run.names))
    for (runs, reason), names in reasons.items():
        yield f"no kernel for {', '.join(names)}: {reason} (runs as: {runs})"


def plan_renderable(plan: Any) -> RenderableType:
    """A `Plan` as rich prints it: its tables and lines."""
    caches = [cache_table(plan.caches)] if plan.caches else []
    return Group(plan_table(plan), *caches, *(Text(line) for line in plan_lines(plan)))


def plan_json(plan: Any) -> dict[str, Any]:
    """A `Plan` as plain data."""
    return {
        "parameters": [
            {
                "name": e.name,
                "shape": list(e.shape),
                "dtype": e.dtype,
                "format": str(e.spec) if e.spec else None,
                "layout": e.layout.to_json() if e.layout else None,
                "ops": list(e.ops),
                "reason": e.reason,
                "bytes": [e.float_bytes, e.stored_bytes],
                **({"activations": str(e.activations)} if e.activations else {}),
            }
            for e in plan.entries
        ],
        "matmuls without parameters": [list(u) for u in plan.unweighted],
        "bits_per_weight": round(plan.bits_per_weight, 4),
        **({"caches": cache_json(plan.caches)} if plan.caches else {}),
        **({"fused": [str(fusion) for fusion in plan.fusions]} if plan.fusions else {}),
        **({"joined": [str(joint) for joint in plan.joints]} if plan.joints else {}),
        **({"attention": [str(attention) for attention in plan.attentions]} if plan.attentions else {}),
        **({"runs": [run.to_json() for run in plan.runs]} if plan.runs else {}),
    }


def save_json(data: Any, path: str) -> None:
    """Writes plain data to a file."""
    with open(path, "w") as file:
        json.dump(data, file, indent=1)


def cache_table(caches: Any) -> Table:
    """A `CachePlan`: a row for each state variable."""
    table = _table(
        ("cache", {"footer": "total", "overflow": "fold"}),
        ("shape", {"overflow": "fold"}),
        ("format", {}),
        ("float", {"justify": "right", "footer": f"{caches.float_bytes:,} B"}),
        ("stored", {"justify": "right", "footer": f"{caches.stored_bytes:,} B"}),
        ("reason", {"overflow": "fold"}),
    )
    for e in caches.entries:
        shape = f"{e.dtype}[{','.join(map(str, e.shape))}]"
        form = str(e.spec) if e.spec else "float"
        table.add_row(e.name, shape, form, f"{e.float_bytes:,} B", f"{e.stored_bytes:,} B", e.reason)
    return table


def cache_json(caches: Any) -> list[dict[str, Any]]:
    """A `CachePlan` as plain data."""
    return [
        {
            "name": e.name,
            "shape": list(e.shape),
            "dtype": e.dtype,
            "format": str(e.spec) if e.spec else None,
            "axis": e.axis,
            "reason": e.reason,
            "bytes": [e.float_bytes, e.stored_bytes],
        }
        for e in caches.entries
    ]
