"""Axes of products with packed caches: how kernels arrange what is not a cache, and their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Array, Float

from qjax.pallas_kernels.packed.qcache import QCache


@dataclasses.dataclass(frozen=True)
class View:
    """A dot as a kernel sees it: products (M, D) @ (D, T) or (M, T) @ (T, D) for each head of each sequence.

    Attributes:
        kind: "scores" or "values".
        form: how the codes of a sequence lie: "heads" (T * H, D), "rows" (H, T, D) or "columns" (H, R, T).
        batch: batch axes by number, in the order in which the cache stores them.
        lead, heads: sizes of the first of these, sequences, and of the others.
        tokens: axes of the cache that count positions, as it stores them.
        t, m, d: how many positions, rows of x, and values of a vector there are.
        rows, positions: how many of them are in a tile.
    """

    kind: Literal["scores", "values"]
    form: Literal["heads", "rows", "columns"]
    batch: tuple[int, ...]
    lead: int
    heads: int
    tokens: tuple[int, ...]
    t: int
    m: int
    d: int
    rows: int = 0
    positions: int = 0


def sides(numbers: Any, operand: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(contracted axes, batch axes) of the cache and of the other operand, from the numbers of `lax.dot_general`."""
    return [(numbers[0][which], numbers[1][which]) for which in (operand, 1 - operand)]


def rows_of(
    x: Float[Array, "*_"], view: View, numbers: Any, operand: int, order: Sequence[int] | None = None
) -> Float[Array, "B H M _"]:
    """x as a kernel takes it, with its free axes in this order if not in its own."""
    (own_contract, _), (x_contract, x_batch) = sides(numbers, operand)
    free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
    free = free if order is None else [free[i] for i in order]
    inner = sorted(range(len(own_contract)), key=own_contract.__getitem__)  # positions, as they are stored
    axes = [*(x_batch[i] for i in view.batch), *free, *(x_contract[i] for i in inner)]
    width = view.d if view.kind == "scores" else view.t
    return x.transpose(axes).reshape(view.lead, view.heads, view.m, width)


def restored(
    out: Float[Array, "B H M _"], x: tuple[int, ...], cache: QCache, view: View, numbers: Any, operand: int
) -> Float[Array, "*_"]:
    """A result of a kernel with the axes of `lax.dot_general`, for an x of this shape."""
    (own_contract, own_batch), (x_contract, x_batch) = sides(numbers, operand)
    of_x = [size for i, size in enumerate(x) if i not in (*x_contract, *x_batch)]
    of_cache = [size for i, size in enumerate(cache.shape) if i not in (*own_contract, *own_batch)]
    out = out.reshape(*(cache.shape[own_batch[i]] for i in view.batch), *of_x, *of_cache)
    free = list(range(len(own_batch), out.ndim))
    if operand == 0:
        free = [*free[len(of_x) :], *free[: len(of_x)]]
    return out.transpose(*(view.batch.index(i) for i in range(len(own_batch))), *free)


def axes_of_scores(q: Any, keys: QCache, spec: Any) -> list[tuple[str, int, int]]:
    """For each axis of the scores in the order of the softmax: "batch", "query" or "key", its number, and its size."""
    numbers, operand = spec.scores.numbers, spec.scores.operand
    (own_contract, own_batch), (q_contract, q_batch) = sides(numbers, operand)
    batch = [("batch", i, keys.shape[axis]) for i, axis in enumerate(own_batch)]
    queries, positions = (
        [(kind, i, shape[axis]) for i, axis in enumerate(a for a in range(len(shape)) if a not in used)]
        for kind, shape, used in (
            ("query", q.shape, (*q_contract, *q_batch)),
            ("key", keys.shape, (*own_contract, *own_batch)),
        )
    )
    free = [*positions, *queries] if operand == 0 else [*queries, *positions]
    return [[*batch, *free][i] for i in spec.order]


def reading(
    shape: Sequence[Any], axis: int, contract: Sequence[int], batch: Sequence[int]
) -> Literal["scores", "values"] | None:
    """Whether a dot contracts the vectors of a cache ("scores"), makes them ("values"), or does neither (None).

    Args:
        shape: of the float cache.
        axis: its vector axis, counted from the front.
        contract, batch: the axes of the cache that the dot contracts, and that are batch axes of both operands.
    """
    if axis in contract:
        return "scores" if all(i == axis or shape[i] == 1 for i in contract) else None
    others = [i for i in range(len(shape)) if i not in (*contract, *batch, axis) and shape[i] != 1]
    return None if axis in batch or others else "values"
