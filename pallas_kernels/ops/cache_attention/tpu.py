"""`cache_attention` on TPU: one pass over keys and values, with a running maximum and sum (flash decoding).

Milakov and Gimelshein 2018 (arXiv:1805.02867), Dao et al. 2022 (arXiv:2205.14135). The grid, the windows and how codes
are read are those of `cache_dot.tpu`; a step has the keys and the values of all heads at some positions. Scores, their
exponentials and all sums are float32. A probability is rounded to the dtype of the product, times the scale of its
value, before it is divided by the sum of all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from qjax.pallas_kernels.backends.tpu_operands import no_float16, operand_dtype
from qjax.pallas_kernels.backends.tpu_tile import LANES
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.ops.cache_dot import tpu as cache_dot_tpu
from qjax.pallas_kernels.ops.cache_dot.axes import View, axes_of_scores, restored, rows_of, sides
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import layer_index

_VMEM = cache_dot_tpu.VMEM // 2  # for each of the caches

_LEAST = float(jnp.finfo(jnp.float32).min)  # a maximum of -inf would give NaN where all scores so far are -inf


def unsupported(q: Any, keys: QCache, values: QCache, spec: Any) -> str | None:
    """Why attention is left to two products, or None; arrays or their types, and an `AttentionSpec`."""
    scores, result = spec.scores, spec.result
    weights = _weights(q, keys, spec)
    for x, cache, dot in ((q, keys, scores), (weights, values, result)):
        options = {"numbers": dot.numbers, "operand": dot.operand, "precision": dot.precision}
        if why := cache_dot_tpu.unsupported(x, cache, out_dtype=dot.out_dtype, **options):
            return why
    views = _views(q, keys, values, spec)
    return "the caches are laid out in different ways" if views is None else None


def attention(
    q: Float[Array, "*_"],
    keys: QCache,
    values: QCache,
    mask: Bool[Array, "*_"] | None,
    spec: Any,
    layers: tuple[Any, Any] | None = None,
    interpret: bool = False,
) -> Float[Array, "*_"]:
    """What `cache_attention.reference` computes, up to rounding, where `unsupported` has nothing to say.

    Args:
        q, keys, values, mask, spec, layers: as there. Scales are taken out of a stack.
        interpret: runs the kernel as XLA operations, on any platform.
    """
    stacks = (keys, values)
    if layers is not None:
        keys, values = (qcache.layer_of(stack, layer) for stack, layer in zip(stacks, layers, strict=True))
    views = _views(q, keys, values, spec)
    assert views is not None
    of_keys, of_values = views
    scores, result = spec.scores, spec.result
    dtypes = (
        operand_dtype(q.dtype, q.dtype, scores.precision),
        operand_dtype(spec.weights, spec.weights, result.precision),
    )
    queries = [number for kind, number, _ in axes_of_scores(q, keys, spec) if kind == "query"]
    rows = rows_of(no_float16(q), of_keys, scores.numbers, scores.operand, queries)
    caches, first = [], []
    for number, (cache, view, dot) in enumerate(((keys, of_keys, scores), (values, of_values, result))):
        codes, small = cache_dot_tpu.stored(cache, view, dot.numbers, dot.operand)
        start = jnp.int32(0)
        if layers is not None:
            codes = cache_dot_tpu.stored_together(stacks[number], view, dot.numbers, dot.operand)
            start = layer_index(layers[number], stacks[number].shape[0]) * view.lead
        caches.append((codes, small))
        first.append(start)
    seen = None if mask is None else _arranged(mask, axes_of_scores(q, keys, spec), of_keys)
    formats = keys.spec.format, values.spec.format
    zero_points = keys.zero is not None, values.zero is not None
    attend = _Attend(views, formats, zero_points, dtypes, spec.steps, mask is not None)
    written = jnp.dtype(jnp.float32) if result.out_dtype == jnp.float16 else jnp.dtype(result.out_dtype)
    out = _call(attend, jnp.stack(first), rows, caches, seen, written, interpret)
    weights = _weights(q, keys, spec)
    out = restored(out, weights.shape, values, of_values, result.numbers, result.operand)
    return out.astype(result.out_dtype)


# --- Axes -----------------------------------------------------------------------------------------------------------


def _weights(q: Any, keys: QCache, spec: Any) -> jax.ShapeDtypeStruct:
    """The type of the probabilities."""
    return jax.ShapeDtypeStruct([size for _, _, size in axes_of_scores(q, keys, spec)], spec.weights)


def _views(q: Any, keys: QCache, values: QCache, spec: Any) -> tuple[View, View] | None:
    """Keys and values as the kernel sees them, in the same tiles; None where it cannot read both alike."""
    labels, result = axes_of_scores(q, keys, spec), spec.result
    (contract, _), (weights_contract, weights_batch) = sides(result.numbers, result.operand)
    last = len(labels) - 1
    kinds = [kind for kind, *_ in labels]
    if kinds[last] != "key" or kinds.count("key") > 1 or weights_contract != (last,) or len(contract) > 1:
        return None
    batch = [labels[axis][1] for axis in weights_batch if kinds[axis] == "batch"]
    if len(batch) != len(weights_batch) or len(batch) != kinds.count("batch"):
        return None
    options = {"vmem": _VMEM}
    of_keys = cache_dot_tpu.view_of(q, keys, spec.scores.numbers, spec.scores.operand, **options)
    of_values = cache_dot_tpu.view_of(_weights(q, keys, spec), values, result.numbers, result.operand, **options)
    if of_keys is None or of_values is None:
        return None
    alike = [batch[i] for i in of_values.batch] == [*of_keys.batch]
    if not alike or (of_keys.lead, of_keys.heads) != (of_values.lead, of_values.heads):
        return None
    tile = {
        "rows": min(of_keys.rows, of_values.rows),
        "positions": min(of_keys.positions, of_values.positions),
    }
    return dataclasses.replace(of_keys, **tile), dataclasses.replace(of_values, **tile)


def _arranged(mask: Bool[Array, "*_"], labels: list[tuple[str, int, int]], view: View) -> Array:
    """The mask as int8 `(B, H, M, T)`, where all but T may be 1."""
    axes = {(kind, number): axis for axis, (kind, number, _) in enumerate(labels)}
    queries = sorted(axis for (kind, _), axis in axes.items() if kind == "query")
    batch = [axes["batch", number] for number in view.batch]
    lead = next(
        n
        for n in range(len(batch) + 1)
        if _size(labels, batch[:n]) == view.lead and _size(labels, batch[n:]) == view.heads
    )
    groups = [batch[:lead], batch[lead:], queries, [axes["key", 0]]]
    shape, sizes = list(mask.shape), []
    for number, group in enumerate(groups):
        whole = number == 3 or any(mask.shape[axis] > 1 for axis in group)
        for axis in group:
            shape[axis] = labels[axis][2] if whole else 1
        sizes.append(_size(labels, group) if whole else 1)
    mask = jnp.broadcast_to(mask, shape).transpose([axis for group in groups for axis in group])
    return mask.reshape(sizes).astype(jnp.int8)


def _size(labels: list[tuple[str, int, int]], axes: list[int]) -> int:
    return math.prod(labels[axis][2] for axis in axes)


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Attend:
    """What the kernel has to know beside its operands.

    Attributes:
        views, formats, zero_points, dtypes: of the keys and their product, and of the values and theirs; dtypes are
            those of the operands of the products.
        steps: as in `AttentionSpec`.
        masked: whether there is a mask.
    """

    views: tuple[View, View]
    formats: tuple[Format, Format]
    zero_points: tuple[bool, bool]
    dtypes: tuple[Any, Any]
    steps: tuple[tuple[str, Any], ...]
    masked: bool


def _call(
    attend: _Attend,
    first: Int[Array, " 2"],
    q: Float[Array, "B H M D"],
    caches: Sequence[tuple[Array, list[Array]]],
    mask: Array | None,
    out_dtype: Any,
    interpret: bool,
) -> Float[Array, "B H M D2"]:
    """Attention of each sequence; operands as `cache_dot.tpu` arranges them.

    Args:
        attend: what is computed.
        first: which sequence of the keys, and of the values, is the first one.
        q, caches, mask: operands.
        out_dtype: of the result.
        interpret: as for `attention`.
    """
    view, of_values = attend.views
    h, m, t = view.heads, view.rows, view.positions
    specs, operands, copies, read = [], [], [], 0
    for number, (own, (codes, small)) in enumerate(zip(attend.views, caches, strict=True)):
        specs += [
            cache_dot_tpu.window(own, codes, lambda first, number=number: first[number]),
            *(pl.BlockSpec((None, h, t), lambda b, i, s, first: (b, 0, s)) for _ in small),
        ]
        operands += [codes, *small]
        read += codes.nbytes // codes.shape[0] * view.lead + sum(a.nbytes for a in small)
        copies += cache_dot_tpu.copies(own)
    if mask is not None:
        full = [size > 1 for size in mask.shape]

        def place(b: Any, i: Any, s: Any, first: Any) -> tuple[Any, ...]:
            return (b if full[0] else 0, 0, i if full[2] else 0, s)

        specs.append(pl.BlockSpec((None, mask.shape[1], m if full[2] else 1, t), place))
        operands.append(mask)
        read += mask.nbytes

    def by_vector(d: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, h, m, d), lambda b, i, s, first: (b, 0, i, 0))

    return pl.pallas_call(
        functools.partial(_kernel, attend),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:-1], of_values.d), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(view.lead, pl.cdiv(view.m, m), pl.cdiv(view.t, t)),
            in_specs=[by_vector(view.d), *specs],
            out_specs=by_vector(of_values.d),
            scratch_shapes=[
                pltpu.VMEM((h, m, LANES), jnp.float32),
                pltpu.VMEM((h, m, LANES), jnp.float32),
                pltpu.VMEM((h, m, of_values.d), jnp.float32),
                *copies,
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * q.size // view.d * view.t * (view.d + of_values.d),
            bytes_accessed=q.nbytes + read + q.size * 4,
            transcendentals=q.size // view.d * view.t,
        ),
        name="cache_attention",
        interpret=interpret,
    )(first, q, *operands)


def _kernel(attend: _Attend, _: Any, q_ref: Any, *refs: Any) -> None:
    """Adds what a tile of positions gives, for all heads; after the last one the sums are divided.

    Args:
        attend: what is computed.
        q_ref: a tile of queries.
        refs: codes, scales, zero points of the keys, then of the values; the mask; the result; maxima and sums of
            exponentials, the same in all lanes; the sums of values; copies for `cache_dot.tpu.read`.
    """
    view, of_values = attend.views
    left = iter(refs)
    operands = []
    for zero_point in attend.zero_points:
        codes, *small = itertools.islice(left, 2 + zero_point)
        operands.append((codes, [ref[...].astype(jnp.float32) for ref in small]))
    mask = (next(left)[...].astype(jnp.int32) != 0) if attend.masked else None
    out_ref, most_ref, total_ref, sum_ref, *copies = left
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        most_ref[...] = jnp.full_like(most_ref, _LEAST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    codes_refs = []
    for own, (codes, _) in zip(attend.views, operands, strict=True):
        count = len(cache_dot_tpu.copies(own))
        codes_refs.append(cache_dot_tpu.read(own, codes, copies[:count]))
        copies = copies[count:]
    shape = (view.rows, view.positions)
    there = lax.broadcasted_iota(jnp.int32, shape, 1) < view.t - step * view.positions
    ragged = view.t % view.positions != 0
    for head in range(view.heads):
        (key_scale, *key_zero), (value_scale, *value_zero) = (
            [a[head : head + 1] for a in small] for _, small in operands
        )
        keys = cache_dot_tpu.codes_of(view, attend.formats[0], attend.dtypes[0], codes_refs[0], head)
        q = q_ref[head].astype(attend.dtypes[0])
        scores = cache_dot_tpu.dot(q, keys, attend.dtypes[0], 0 if view.form == "columns" else 1)
        if key_zero:
            scores -= jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True) * key_zero[0]
        scores *= key_scale
        for name, by in attend.steps:
            if name == "multiply":
                scores *= by
            elif name == "divide":
                scores /= by
            elif name == "mask":
                assert mask is not None
                scores = jnp.where(mask[head if mask.shape[0] > 1 else 0], scores, by)
        if ragged:  # scores and scales beyond the last position are anything
            scores = jnp.where(there, scores, -jnp.inf)
        before = most_ref[head][:, :1]
        most = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - most)
        less = jnp.exp(before - most)
        total = total_ref[head][:, :1] * less + jnp.sum(weights, axis=1, keepdims=True)
        weights *= value_scale
        if ragged:
            weights = jnp.where(there, weights, 0)
        weights = weights.astype(attend.dtypes[1])
        values = cache_dot_tpu.codes_of(of_values, attend.formats[1], attend.dtypes[1], codes_refs[1], head)
        sums = cache_dot_tpu.dot(weights, values, attend.dtypes[1], 1 if of_values.form == "columns" else 0)
        if value_zero:
            sums -= jnp.sum(weights.astype(jnp.float32) * value_zero[0], axis=1, keepdims=True)
        most_ref[head] = jnp.broadcast_to(most, (view.rows, LANES))
        total_ref[head] = jnp.broadcast_to(total, (view.rows, LANES))
        sum_ref[head] = sum_ref[head] * less + sums

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        out_ref[...] = (sum_ref[...] / total_ref[...][:, :, :1]).astype(out_ref.dtype)
