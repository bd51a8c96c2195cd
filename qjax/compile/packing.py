"""`packed_params`: which leaves of a call are packed, from what its plan says of parameters and folds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from qjax.compile.compiled import Compiled
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor
from qjax.passes.analysis.folds import evaluate_fold
from qjax.passes.plan.decisions import Entry


def packed_params(
    compiled: Compiled, pack: Callable[[Entry, Callable[[], Any]], QTensor]
) -> dict[str, QTensor | FoldedParam]:
    """What the plan of a call quantizes, by path.

    Args:
        compiled: the call, on float variables.
        pack: makes the packed form of an entry; its float value can be asked for.
    """
    plan, params = compiled.plan, compiled.params

    def float_of(path: str) -> Any:
        return jnp.asarray(params[path])

    packed: dict[str, Any] = {}
    for entry in plan.quantized:
        if not entry.sources:
            packed[entry.name] = pack(entry, functools.partial(float_of, entry.name))
    derived: dict[str, dict[str, QTensor]] = {}
    for fold in compiled.sites.folds.values():
        entry = plan[fold.name]
        if entry.spec is None:
            continue
        parts = [path for path in fold.expr.params if path in compiled.sites.params]  # state stays where it is
        made = pack(entry, functools.partial(evaluate_fold, fold, float_of))
        derived.setdefault(parts[0], {})[fold.name] = made
        for path in parts:
            derived.setdefault(path, {})
    for path, matrices in derived.items():
        leaf = params[path]
        keep = path in packed or plan[path].kept
        own = packed.get(path, leaf) if keep else None
        packed[path] = FoldedParam(own, matrices, tuple(leaf.shape), jnp.dtype(leaf.dtype))
    return packed
