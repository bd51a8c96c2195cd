"""`cache_attention` on NVIDIA GPUs: flash decoding, as a Pallas kernel for Triton that reads packed caches in place.

A program of the grid has one head of the caches, of one sequence, and a part of the positions: it keeps a maximum, a
sum of exponentials and sums of values (Milakov and Gimelshein 2018, arXiv:1805.02867), and XLA puts the parts together
(flash decoding: Dao, Haziza, Massa and Sizov 2023). All queries of the heads that share those keys are the rows of one
tile, so that keys and values are read once. Axes are found by their strides, and the cache of a layer by its index in
the stack of a scan: the caches are neither transposed nor taken out of it.

**Positions that no query sees** are not read. With a mask, XLA finds the first and the last position that counts for
each sequence, and the parts are cut out of what is between: the time goes by what was written to a cache, not by what
it has room for. That needs a mask whose other value is so low (`_NEGLIGIBLE`) that exponentials are 0, and does not
hold for a sequence that has a query which sees nothing: there, all positions count alike, and all are read.

**Numerics.** As `cache_dot.reference`: codes are exact in bfloat16, sums are float32, and scales go on scores after,
on probabilities before the product. Zero points are subtracted from sums, as `zero * sum(x)`. What is multiplied by
codes is bfloat16 where the program has bfloat16. A wider number is a sum of two bfloat16 numbers (16 bits, where TF32,
JAX's default for float32 on these chips, has 11), or of three, which is all of it, where the program asks for more
precision than the default.

**On a GPU it has not run yet**, only interpreted on CPU and compiled; `ops.matmul.gpu` says what follows from that,
and `ops.matmul.triton` what there is to know about Triton. For H100 a warp has 865 instructions for 64 positions of
int8 caches and 967 of int4 ones, with 4 queries and vectors of 128 values, and spills none of its 96 and 128 registers
(what jax 0.10.2 makes, `scripts/gpu/gpu_compile.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, Int32

from qjax.pallas_kernels.backends import gpu_operands, triton
from qjax.pallas_kernels.backends.triton import pltriton
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.packing import WORD_BITS
from qjax.pallas_kernels.ops.cache_dot import axes as cache_dot_axes
from qjax.pallas_kernels.ops.cache_dot.axes import View
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import layer_index

_LEAST = float(jnp.finfo(jnp.float32).min)  # a maximum of -inf would give NaN where all scores so far are -inf

_NEGLIGIBLE = -1e8

_MOST_VALUES = 256  # of a vector

_LEAST_SIDE = 16  # of an operand of the tensor cores

_PROGRAMS = 4  # that a multiprocessor has at a time, by their registers and shared memory


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How attention is cut; powers of two, but for `splits`.

    Attributes:
        rows: queries in a tile, at least 16.
        positions: in a tile, at least 16.
        splits: parts that the positions are cut into, for different programs.
        warps: of a program.
        stages: tiles that are loaded ahead.
    """

    rows: int
    positions: int
    splits: int
    warps: int
    stages: int


def unsupported(q: Any, keys: QCache, values: QCache, spec: Any) -> str | None:
    """Why attention is left to the reference, or None; arrays or their types, and an `AttentionSpec`."""
    return triton.unavailable() or _not_taken(q, keys, values, spec)


def _not_taken(q: Any, keys: QCache, values: QCache, spec: Any) -> str | None:
    """Why the kernel does not compute this, or None."""
    dtypes = (q.dtype, spec.weights, spec.result.out_dtype)
    if any(dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) for dtype in dtypes):
        return "the kernel multiplies float32, bfloat16 and float16"
    if not all(isinstance(size, int) for a in (q, keys, values) for size in a.shape):
        return "sizes are symbols"
    if 0 in (*q.shape, *keys.shape, *values.shape):
        return "empty"
    for cache in (keys, values):
        if cache.spec.format.kind != "int" or cache.spec.format.bits not in (2, 4, 8):
            return "the kernel reads integers of 2, 4 and 8 bits"
        if cache.size > _MOST_VALUES:
            return f"the kernel reads vectors of at most {_MOST_VALUES} values"
        if reason := triton.unaddressable(cache.codes):
            return reason
    if _sides(q, keys, values, spec) is None:
        return "the kernel has one axis of positions, last in the softmax, and takes the rest of the axes in pairs"
    return None


def attention(
    q: Float[Array, "*_"],
    keys: QCache,
    values: QCache,
    mask: Bool[Array, "*_"] | None,
    spec: Any,
    layers: tuple[Any, Any] | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*_"]:
    """What `cache_attention.reference` computes, up to rounding, where `unsupported` has nothing to say.

    Args:
        q, keys, values, mask, spec, layers: as there.
        blocks: how to cut it, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform.
    """
    if layers is not None and any(triton.unaddressable(stack.codes) for stack in (keys, values)):
        keys, values = (qcache.layer_of(stack, layer) for stack, layer in zip((keys, values), layers, strict=True))
        layers = None
    stacks = (keys, values) if layers is not None else jax.tree.map(lambda a: a[None], (keys, values))
    indices = [gpu_operands.layer_operand(layer) for layer in layers or (None, None)]
    keys, values = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stacks)
    sides = _sides(q, keys, values, spec)
    assert sides is not None
    labels, (of_keys, of_values) = cache_dot_axes.axes_of_scores(q, keys, spec), sides
    queries = [number for kind, number, _ in labels if kind == "query"]
    wide = q.astype(jnp.float32) if q.dtype == jnp.float16 else q  # Triton has no cast of float16 to bfloat16
    rows = cache_dot_axes.rows_of(wide, of_keys.view, spec.scores.numbers, spec.scores.operand, queries)[:, 0]
    sequences, m, d = rows.shape
    blocks = blocks or default_blocks(sequences, m, d, of_keys.view.t)
    parts = _parts(q.dtype, spec.scores.precision), _parts(spec.weights, spec.result.precision)
    seen = None if mask is None else _arranged(mask, labels, of_keys.view.batch)
    visible = seen is not None and _other(spec.steps) <= _NEGLIGIBLE
    attend = _Attend(sides, parts, spec.steps, visible, blocks)
    masks = []
    if seen is not None:
        # What is loaded ahead has four bytes at least; a mask for each query is large.
        masks = [seen.astype(jnp.int32 if seen.shape[-2] == 1 else jnp.int8), *([_visible(seen)] if visible else [])]
    out = _call(attend, indices, rows, stacks, masks, interpret)
    weights = tuple(size for _, _, size in labels)
    result = spec.result
    out = cache_dot_axes.restored(out[:, None], weights, values, of_values.view, result.numbers, result.operand)
    return out.astype(result.out_dtype)


def default_blocks(sequences: int, m: int, d: int, t: int) -> Blocks:
    """Tiles by shape alone, and as many programs as run at a time. Nothing was timed.

    Args:
        sequences: heads of the caches, of all sequences.
        m: queries that read the same head.
        d: values of a vector.
        t: positions.
    """
    rows = min(64 if d <= 128 else 32, max(_LEAST_SIDE, pl.next_power_of_2(m)))  # more would not fit into registers
    positions = min(32 if d > 128 and rows > _LEAST_SIDE else 64, max(_LEAST_SIDE, pl.next_power_of_2(t)))
    programs = sequences * pl.cdiv(m, rows)
    splits = max(1, min(_PROGRAMS * gpu_chips.processors() // programs, pl.cdiv(t, 4 * positions)))
    return Blocks(rows, positions, splits, warps=8 if rows > 32 else 4, stages=3)


def _parts(dtype: Any, precision: Any) -> int:
    """How many bfloat16 numbers are multiplied in place of one of this dtype."""
    if dtype == jnp.bfloat16:
        return 1
    return 2 if dtype == jnp.float16 or gpu_operands.like_tf32(precision) else 3


def _other(steps: Sequence[tuple[str, Any]]) -> float:
    """What the softmax takes where a mask is False."""
    other = math.nan
    for name, by in steps:
        if name == "mask":
            other = by
        elif name in ("multiply", "divide"):
            other = other * by if name == "multiply" else other / by
    return other


# --- Axes -----------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """A cache as the kernel reads it.

    Attributes:
        view: the product with it, for the functions of `cache_dot.axes`.
        batch: its axes of sequences and heads, in the order of `sizes`.
        sizes: of those.
        position, vector: its other axes that are not of size 1.
        rank: how many axes there are.
        bits: of a code.
        zero_point: whether it has zero points.
    """

    view: View
    batch: tuple[int, ...]
    sizes: tuple[int, ...]
    position: int
    vector: int
    rank: int
    bits: int
    zero_point: bool


def _sides(q: Any, keys: QCache, values: QCache, spec: Any) -> tuple[_Side, _Side] | None:
    """Keys and values, with the batch axes of both in the order in which the keys store them; None if they differ."""
    labels, scores, result = cache_dot_axes.axes_of_scores(q, keys, spec), spec.scores, spec.result
    kinds, last = [kind for kind, *_ in labels], len(labels) - 1
    (keys_contract, keys_batch), _ = cache_dot_axes.sides(scores.numbers, scores.operand)
    (values_contract, values_batch), (contract, batch) = cache_dot_axes.sides(result.numbers, result.operand)
    if kinds[last] != "key" or kinds.count("key") > 1 or contract != (last,) or len(values_contract) != 1:
        return None
    if sorted(axis for axis, kind in enumerate(kinds) if kind == "batch") != sorted(batch):
        return None
    order = sorted(range(len(keys_batch)), key=keys_batch.__getitem__)
    numbers = [labels[axis][1] for axis in batch]  # which batch axis of the keys goes with each of the values
    (position,) = {*range(keys.ndim)} - {*keys_batch, *keys_contract}
    m = math.prod(size for kind, _, size in labels if kind == "query")
    of_keys, of_values = (
        _side(cache, kind, own, tuple(places), at, m)
        for cache, kind, own, places, at in (
            (keys, "scores", keys_batch, order, position),
            (values, "values", values_batch, map(numbers.index, order), values_contract[0]),
        )
    )
    return of_keys, of_values


def _side(cache: QCache, kind: Any, own: Sequence[int], places: tuple[int, ...], position: int, m: int) -> _Side:
    batch = tuple(own[i] for i in places)
    sizes = tuple(cache.shape[axis] for axis in batch)
    view = View(kind, "rows", places, math.prod(sizes), 1, (position,), cache.shape[position], m, cache.size)
    vector = cache.axis + cache.ndim
    return _Side(view, batch, sizes, position, vector, cache.ndim, cache.spec.format.bits, cache.zero is not None)


def _arranged(mask: Bool[Array, "*_"], labels: list[tuple[str, int, int]], order: Sequence[int]) -> Bool[Array, "*_"]:
    """The mask as `(*batch, M, T)`, where all but T may be 1."""
    axes = {(kind, number): axis for axis, (kind, number, _) in enumerate(labels)}
    batch = [axes["batch", number] for number in order]
    queries = [axis for (kind, _), axis in axes.items() if kind == "query"]
    whole = [len(labels) - 1, *(queries if any(mask.shape[axis] > 1 for axis in queries) else [])]
    shape = [labels[axis][2] if axis in whole else size for axis, size in enumerate(mask.shape)]
    mask = jnp.broadcast_to(mask, shape).transpose(*batch, *queries, len(labels) - 1)
    return mask.reshape(*(shape[axis] for axis in batch), math.prod(shape[axis] for axis in queries), shape[-1])


def _visible(mask: Bool[Array, "*batch M T"]) -> Int32[Array, "*batch 2"]:
    """How many positions there are from the first one that counts, and up to the last: all do where a query sees none.

    As one maximum, which is one kernel.
    """
    t = mask.shape[-1]
    counts = (mask | ~mask.any(axis=-1, keepdims=True)).any(axis=-2)
    positions = jnp.arange(t, dtype=jnp.int32)
    sizes = jnp.where(jnp.arange(2)[:, None] == 0, t - positions, positions + 1)
    return jnp.max(jnp.where(counts[..., None, :], sizes, 0), axis=-1)


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Attend:
    """What the kernel has to know beside its operands.

    Attributes:
        sides: keys and values.
        parts: how many bfloat16 numbers a query and a probability are.
        steps: as in `AttentionSpec`.
        visible: whether only some positions count.
        blocks: how it is cut.
    """

    sides: tuple[_Side, _Side]
    parts: tuple[int, int]
    steps: tuple[tuple[str, Any], ...]
    visible: bool
    blocks: Blocks


def _call(
    attend: _Attend,
    layers: Sequence[Int32[Array, " 1"]],
    q: Float[Array, "B M D"],
    stacks: Sequence[QCache],
    masks: Sequence[Array],
    interpret: bool,
) -> Float[Array, "B M D2"]:
    """Attention of each head of each sequence.

    Args:
        attend: what is computed.
        layers: which one of each stack is read.
        q, stacks: operands.
        masks: `(*batch, M, T)`, and what `_visible` gives.
        interpret: as for `attention`.
    """
    blocks, (sequences, m, _), splits = attend.blocks, q.shape, attend.blocks.splits
    operands = [*layers, q, *itertools.chain.from_iterable(map(jax.tree.leaves, stacks)), *masks]
    by_row = jax.ShapeDtypeStruct((splits, sequences, m), jnp.float32)
    sums, most, total = triton.launch(
        functools.partial(_kernel, attend),
        operands,
        out_shape=[jax.ShapeDtypeStruct((*by_row.shape, attend.sides[1].view.d), jnp.float32), by_row, by_row],
        grid=(sequences, pl.cdiv(m, blocks.rows), splits),
        blocks=blocks,
        name="cache_attention",
        interpret=interpret,
    )
    weights = jnp.exp(most - jnp.max(most, axis=0))
    return jnp.sum(sums * weights[..., None], axis=0) / jnp.sum(total * weights, axis=0)[..., None]


def _kernel(attend: _Attend, *refs: Any) -> None:
    """The sums over one part of the positions, for a tile of queries.

    Args:
        attend: what is computed.
        refs: which one of the keys is read, and of the values; queries; codes, scales, zero points of the keys, then of
            the values; the mask and what `_visible` gives; the sums of values, the maxima of scores, and the sums of
            exponentials.
    """
    blocks, (of_keys, of_values) = attend.blocks, attend.sides
    left = iter(refs)
    *layer_refs, q_ref = itertools.islice(left, 3)
    keys, values = (tuple(itertools.islice(left, 2 + side.zero_point)) for side in attend.sides)
    mask_ref = next(left) if any(name == "mask" for name, _ in attend.steps) else None
    visible_ref = next(left) if attend.visible else None
    sum_ref, most_ref, total_ref = left
    sequence, part = pl.program_id(0), pl.program_id(2)
    place = _unraveled(sequence, of_keys.sizes)
    in_keys, in_values = (
        (layer_index(ref[0], codes.shape[0]), *place)
        for ref, (codes, *_) in zip(layer_refs, (keys, values), strict=True)
    )
    rows = pl.program_id(1) * blocks.rows + jnp.arange(blocks.rows)
    t, m = of_keys.view.t, q_ref.shape[1]

    def of_sequence(ref: Any, *index: Any) -> Any:
        """What is at this index, behind axes of sequences and heads that may be of size 1."""
        return ref.at[(*(at if size > 1 else 0 for at, size in zip(place, ref.shape, strict=False)), *index)]

    first_tile, tiles = 0, pl.cdiv(t, blocks.positions)
    if visible_ref is not None:
        begin, end = t - of_sequence(visible_ref, 0)[...], of_sequence(visible_ref, 1)[...]
        first_tile = lax.div(begin, blocks.positions)
        tiles = lax.div(end + blocks.positions - 1, blocks.positions) - first_tile
    each = lax.div(tiles + blocks.splits - 1, blocks.splits)
    start = part * each

    width = _width(of_keys)
    q = pltriton.load(
        q_ref.at[sequence, rows[:, None], jnp.arange(width)[None, :]],
        mask=(rows[:, None] < m) & (jnp.arange(width)[None, :] < of_keys.view.d),
        other=0,
    )
    sum_of_q = jnp.sum(q.astype(jnp.float32), axis=1)[:, None] if of_keys.zero_point else None
    q = _split(q, attend.parts[0])

    def step(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, total, sums = carry
        positions = (first_tile + start + i) * blocks.positions + jnp.arange(blocks.positions)
        there = positions < t
        codes = _codes(of_keys, keys[0], in_keys, positions).T
        scores = functools.reduce(jnp.add, (pltriton.dot(one, codes) for one in q))
        if sum_of_q is not None:
            scores -= sum_of_q * _small(of_keys, keys[2], in_keys, positions)
        scores *= _small(of_keys, keys[1], in_keys, positions)
        for name, by in attend.steps:
            if name == "multiply":
                scores *= by
            elif name == "divide":
                scores /= by
            elif name == "mask":
                assert mask_ref is not None
                at, within = (rows[:, None], rows[:, None] < m) if mask_ref.shape[-2] > 1 else (0, True)
                at = of_sequence(mask_ref, at, positions[None, :])
                seen = pltriton.load(at, mask=there[None, :] & within, other=0)
                scores = jnp.where(seen != 0, scores, by)
        if t % blocks.positions:
            scores = jnp.where(there[None, :], scores, -jnp.inf)
        most = jnp.maximum(before, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - most[:, None])
        less = jnp.exp(before - most)
        total = total * less + jnp.sum(weights, axis=1)
        weights *= _small(of_values, values[1], in_values, positions)
        codes = _codes(of_values, values[0], in_values, positions)
        halves = _split(weights, attend.parts[1])
        added = functools.reduce(jnp.add, (pltriton.dot(one, codes) for one in halves))
        if of_values.zero_point:
            multiplied = functools.reduce(jnp.add, (one.astype(jnp.float32) for one in halves))
            zeros = _small(of_values, values[2], in_values, positions)
            added -= jnp.sum(multiplied * zeros, axis=1)[:, None]
        return most, total, sums * less[:, None] + added

    carry = (
        jnp.full(blocks.rows, _LEAST, jnp.float32),
        jnp.zeros(blocks.rows, jnp.float32),
        jnp.zeros((blocks.rows, _width(of_values)), jnp.float32),
    )
    most, total, sums = lax.fori_loop(0, jnp.minimum(each, tiles - start), step, carry)
    d = jnp.arange(_width(of_values))
    at = sum_ref.at[part, sequence, rows[:, None], d[None, :]]
    pltriton.store(at, sums, mask=(rows[:, None] < m) & (d[None, :] < of_values.view.d))
    pltriton.store(most_ref.at[part, sequence, rows], most, mask=rows < m)
    pltriton.store(total_ref.at[part, sequence, rows], total, mask=rows < m)


def _unraveled(index: Any, sizes: Sequence[int]) -> list[Any]:
    """An index into axes of these sizes, from one into all of them."""
    place = []
    for size in reversed(sizes):
        place.append(lax.rem(index, size))
        index = lax.div(index, size)
    return place[::-1]


def _width(side: _Side) -> int:
    """Values of a tile of vectors, a power of two; those beyond the vector are 0."""
    return max(_LEAST_SIDE, pl.next_power_of_2(side.view.d))


def _index(side: _Side, place: Sequence[Any], positions: Any, units: Any) -> list[Any]:
    """Where a head has vectors, in the axes of a stack of codes; its place is a layer, and indices along `batch`."""
    layer, *rest = place
    index: list[Any] = [0] * side.rank
    for axis, at in zip((*side.batch, side.position, side.vector), (*rest, positions, units), strict=True):
        index[axis] = at
    return [layer, *index]


def _codes(side: _Side, ref: Any, place: Sequence[Any], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
    """The codes of one head at these positions."""
    units = jnp.arange(_width(side) * side.bits // (8 if side.bits == 8 else WORD_BITS))[None, :]
    positions = positions[:, None]
    within = (positions < side.view.t) & (units < ref.shape[1 + side.vector])
    words = pltriton.load(ref.at[tuple(_index(side, place, positions, units))], mask=within, other=0)
    return triton.unpack(words, side.bits).astype(jnp.bfloat16)


def _small(side: _Side, ref: Any, place: Sequence[Any], positions: Int[Array, " T"]) -> Float[Array, "1 T"]:
    """Scales or zero points of one head at these positions."""
    index = _index(side, place, positions, None)
    del index[1 + side.vector]
    loaded = pltriton.load(ref.at[tuple(index)], mask=positions < side.view.t, other=0)
    return loaded.astype(jnp.float32)[None, :]


def _split(x: Float[Array, "A B"], parts: int) -> list[Float[Array, "A B"]]:
    """bfloat16 numbers that add up to x, the smallest first."""
    found = []
    for _ in range(parts):
        found.append(x.astype(jnp.bfloat16))
        x = x.astype(jnp.float32) - found[-1].astype(jnp.float32)
    return found[::-1]
