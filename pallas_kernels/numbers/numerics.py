"""Quantize, dequantize, fake-quantize: the one definition of every format's arithmetic.

Everything works on the canonical matrix `(*stack, K, N)`: K is contracted, each element of the stack is a matrix of
its own, groups lie along K. With the scale s of its group (and the zero point z, or 0), a value w is stored as

    code = clip(round(w / s + z))              value = (code - z) * s            integers; z is signed like the code
    code = nearest(w * (1 / s))                value = table[code] * s           codebooks and floats

in float32, whatever the dtype of w. Scales are rounded to their stored dtype before codes are chosen.

**Bit equality.** `fake_quant(w, spec)` equals `dequantize(*quantize(w, spec), spec, w.dtype)`, eager, jitted or inside
a larger program. XLA does not keep IEEE arithmetic as it is written; `pallas_kernels.numbers.exact` has what makes it.
Sums, which a scale search is made of, are added in an order that the program spells out (`_accumulate`,
`pairwise_sum`) instead of the one that XLA likes best for a `reduce`; that is also several times faster on CPU.
What XLA may still change is the last bit of `exp2` and of an inexact hardware division (TPU), in differently compiled
programs; scales that a search proposes are rounded to 13 bits, so that this shows about never.

**Small and large numbers.** Subnormal float32 numbers count as zero (XLA flushes them on CPU and TPU): a group whose
scale would be subnormal, or that its scale dtype rounds to zero, has scale 0 and comes back as exact zeros. A scale too
large for its dtype becomes the largest finite one. Dequantized values saturate at the largest float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8

from qjax.pallas_kernels.numbers.exact import FLOAT32_TINY, divide, finite, pairwise_sum, reciprocal, round_to
from qjax.pallas_kernels.numbers.formats import (
    AbsMax,
    Format,
    MseSearch,
    PerGroup,
    PerTensor,
    QuantSpec,
    QuickSearch,
    SignedMax,
)
from qjax.pallas_kernels.numbers.stored_scales import Scales, nest_scales, resolve_scales

# --- Codes -----------------------------------------------------------------------------------------------------


@functools.cache
def _codebook_steps(format: Format) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Codes in the order of their values, and between each two the largest float32 that goes to the lower one."""
    order = sorted((i for i, v in enumerate(format.values) if str(v) != "-0.0"), key=format.values.__getitem__)
    values = np.asarray([format.values[i] for i in order], np.float32)
    middles = (values[:-1] + values[1:]) / 2
    if format.ties == "even":
        below = np.nextafter(middles, np.float32(-np.inf))
        middles = np.where(np.asarray(order[1:]) % 2 == 0, below, middles)
    return tuple(map(float, middles)), tuple(order)


def _nearest_entry(x: Array, format: Format, entries: Sequence[float], dtype: Any) -> Array:
    """For each x the entry (one per code) of the code whose value is nearest."""
    middles, order = _codebook_steps(format)
    result = jnp.full(x.shape, entries[order[0]], dtype)
    for middle, code in zip(middles, order[1:], strict=True):
        result = jnp.where(x > middle, jnp.asarray(entries[code], dtype), result)
    return result


def _nearest_value(x: Array, format: Format) -> Array:
    """`decode_codes(encode(x, format), format)` without the codes."""
    if format.kind == "int":
        return lax.clamp(float(format.qmin), jnp.round(x), float(format.qmax))
    if format.kind == "float":
        return round_to(lax.clamp(-format.largest, x, format.largest), format.dtype)
    return _nearest_entry(x, format, format.values, jnp.float32)


def encode(x: Float[Array, "*S"], format: Format) -> Int8[Array, "*S"]:
    """The codes of unscaled float32 numbers: the nearest value of the format, clipped to its range.

    Halfway cases go to the even integer or float, and as `Format.ties` says in a codebook. A codebook stores negative
    zero as zero.
    """
    if format.kind == "codebook":
        return _nearest_entry(x, format, [float(code) for code in range(len(format.values))], jnp.int8)
    values = _nearest_value(x, format)
    if format.kind == "int":
        return values.astype(jnp.int8)
    return lax.bitcast_convert_type(values.astype(jnp.dtype(format.dtype)), jnp.int8)


def decode_codes(codes: Int8[Array, "*S"], format: Format) -> Float[Array, "*S"]:
    """The unscaled float32 values that codes stand for: integers, codebook entries, float8 numbers."""
    if format.kind == "int":
        return codes.astype(jnp.float32)
    if format.kind == "float":
        return lax.bitcast_convert_type(codes, jnp.dtype(format.dtype)).astype(jnp.float32)
    # A tree of selects, one level for each bit: as fast as a gather on CPU, and it vectorises on TPU, where one
    # does not.
    level = [jnp.float32(v) for v in format.values]
    for bit in range(format.bits):
        odd = (codes & (1 << bit)) != 0
        level = [jnp.where(odd, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


# --- Groups ----------------------------------------------------------------------------------------------------


def _shards(x: Array, axis: int) -> int:
    """Into how many parts a mesh with Explicit axes splits an axis."""
    sharding = jax.typeof(x).sharding
    names = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))][axis]
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return math.prod(sharding.mesh.shape[name] for name in jax.tree.leaves(names)) if explicit else 1


def _together(x: Array, axis: int) -> Array:
    """The same values, with all of an axis on each device where a mesh with Explicit axes splits it."""
    if _shards(x, axis) == 1:
        return x
    sharding = jax.typeof(x).sharding
    names = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    names[axis] = None
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*names)))


def _to_groups(w: Array, spec: QuantSpec) -> Array:
    """(*stack, K, N) -> (*stack, G, g, N). A short last group is filled with zeros, which no scale rule notices."""
    *stack, k, n = w.shape
    size = spec.group_size(k)
    groups = max(1, -(-k // size))
    if groups > 1 and k % (size * _shards(w, -2)):
        w = _together(w, -2)
    w = jnp.pad(w, [(0, 0)] * len(stack) + [(0, groups * size - k), (0, 0)])
    return w.reshape(*stack, groups, size, n)


def _from_groups(x: Array, k: int) -> Array:
    """The inverse of `_to_groups`."""
    *stack, groups, size, n = x.shape
    return lax.slice_in_dim(x.reshape(*stack, groups * size, n), 0, k, axis=len(stack))


def _repeat(s: Array, k: int, spec: QuantSpec) -> Array:
    """What each group has, `(*stack, G, N)`, for each of its values, `(*stack, K, N)`; one group stays size 1."""
    if not isinstance(spec.granularity, PerGroup):
        return s
    *stack, groups, n = s.shape
    s = jnp.broadcast_to(s[..., None, :], (*stack, groups, spec.group_size(k), n))
    return _from_groups(s, k)


class _Group(NamedTuple):
    """The values that share scales, and their extremes with the reduced axes kept at size 1."""

    x: Array  # (*stack, G, g, N)
    strands: Array  # the same values as (*stack, G, steps, S, N), for `_accumulate`
    low: Array  # min(x, 0)
    high: Array  # max(x, 0)
    absmax: Array
    size: np.ndarray  # (G, 1, 1): how many values of the group are not padding


def _groups(w: Array, spec: QuantSpec) -> _Group:
    k, n = w.shape[-2:]
    x = _to_groups(w.astype(jnp.float32), spec)
    *stack, groups, g, _ = x.shape
    per_tensor = isinstance(spec.granularity, PerTensor)
    axes = (-2, -1) if per_tensor else (-2,)
    low = jnp.min(x, axis=axes, keepdims=True, initial=0.0)
    high = jnp.max(x, axis=axes, keepdims=True, initial=0.0)
    # Each scale rule reads some of the three; a pass of its own is faster than taking it from the other two.
    absmax = jnp.maximum(-low, high) if spec.zero_point else jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
    size = np.minimum(g, np.maximum(k - g * np.arange(groups), 1)) * (n if per_tensor else 1)
    strands = -(-g // _MAX_STEPS)
    steps = -(-g // strands)
    padded = jnp.pad(x, [(0, 0)] * (len(stack) + 1) + [(0, steps * strands - g), (0, 0)])
    padded = padded.reshape(*stack, groups, steps, strands, n)
    return _Group(x, padded, low, high, absmax, size.astype(np.float32)[:, None, None])


# Steps of the loop that adds up a group. Longer groups are split into strands that are added side by side, so that a
# step has enough to do: (1, 4096, N) is 64 steps of 64 strands. Unrolled, it reads and writes its sums less often.
_MAX_STEPS, _UNROLL = 64, 4


def _accumulate(group: _Group, terms: Callable[[Array], tuple[Array, ...]]) -> tuple[Array, ...]:
    """Sums of `terms` over each group, shaped like `group.low`, in an order that no compiler changes.

    Args:
        group: the values.
        terms: from a slice `(*stack, G, S, N)` of the values, what is summed; 0 where the value is 0.
    """
    x = _together(group.strands, -3)

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        new = terms(lax.dynamic_index_in_dim(x, i, axis=x.ndim - 3, keepdims=False))
        return tuple(a + finite(b) for a, b in zip(sums, new, strict=True))

    steps = x.shape[-3]
    start = tuple(jnp.zeros_like(a) for a in jax.eval_shape(terms, x[..., 0, :, :]))
    sums = lax.fori_loop(0, steps, step, start, unroll=min(_UNROLL, steps))
    sums = tuple(pairwise_sum(a, -2) for a in sums)
    return sums if group.low.shape[-1] == x.shape[-1] else tuple(pairwise_sum(a, -1) for a in sums)


# --- Scale rules -----------------------------------------------------------------------------------------------
#
# Each gives scale and zero point of every group, both float32 and as they will be stored.


class _Choice(NamedTuple):
    scale: Array
    zero: Array | None


def _stored(scale: Array, scale_dtype: str) -> Array:
    """The scale as its dtype holds it: clamped to the largest finite number, 0 where it would be subnormal."""
    dtype = jnp.dtype(scale_dtype)
    largest = float(jnp.finfo(dtype).max)
    scale = round_to(lax.clamp(-largest, scale, largest), dtype)
    return jnp.where(jnp.abs(scale) < FLOAT32_TINY, 0.0, scale)


def range_scale(
    low: Array, high: Array, absmax: Array, format: Format, zero_point: bool, scale_dtype: str
) -> tuple[Array, Array | None]:
    """Scale and zero point (both float32, as they are stored) that cover the range from `low` <= 0 to `high` >= 0.

    Without a zero point only `absmax`, the larger magnitude of the two, is read. The rule is that of `AbsMax`.
    """
    half_range = jnp.float32((2**format.bits - 1) / 2)
    if zero_point:
        # Halved, because the range of two finite numbers may overflow.
        scale = _stored(divide(high / 2 - low / 2, half_range), scale_dtype)
        zero = jnp.round(format.qmin - divide(low, scale))
        return scale, lax.clamp(float(format.qmin), zero, float(format.qmax))
    divisor = half_range if format.kind == "int" else jnp.float32(format.largest)
    return _stored(divide(absmax, divisor), scale_dtype), None


def _abs_max(group: _Group, spec: QuantSpec) -> _Choice:
    return _Choice(*range_scale(group.low, group.high, group.absmax, spec.format, spec.zero_point, spec.scale_dtype))


def _signed_max(group: _Group, spec: QuantSpec) -> _Choice:
    extreme = jnp.where(group.high == group.absmax, group.high, -group.absmax)
    return _Choice(_stored(extreme / spec.format.qmin, spec.scale_dtype), None)  # qmin is a power of two: exact


# Ends of the search grid as parts of the range that AbsMax covers. Below 1, the largest values are clipped; above, the
# last codes are unused, which pays off where steps are uneven. The best scale of a float lies within an octave, as its
# relative steps repeat.
_GRID_ENDS: dict[str, tuple[float, float]] = {"int": (0.8, 1.0), "codebook": (0.8, 1.2), "float": (0.95, 1.6)}


def _grid_ends(group: _Group, spec: QuantSpec) -> tuple[Array, float]:
    """First and last grid point. The first is low enough for clipping outliers, in groups that are better without.

    Two estimates bound the best clipping point c from below. For a Gaussian it is some 2 to 4 sigma, by bits (a fifth
    less, for safety, below). For one outlier of magnitude A among n values, minimising the clipping error
    (A - c)^2 plus the rounding error n c^2 / (3 * 4^bits) gives c = A / (1 + n / (3 * 4^bits)).
    """
    format = spec.format
    first, last = _GRID_ENDS[format.kind]
    if format.kind == "float":
        return jnp.full_like(group.absmax, first), last
    inverse = reciprocal(group.absmax)
    (squares,) = _accumulate(group, lambda x: (jnp.square(finite(x * inverse)),))
    size = jnp.asarray(group.size).reshape([1] * (inverse.ndim - 3) + [-1, 1, 1])
    rms = jnp.sqrt(divide(squares, size))
    gaussian = (1.08 + 0.26 * format.bits) * rms
    outlier = jnp.asarray(1 / (1 + group.size / (3 * 4.0**format.bits)), jnp.float32).reshape(size.shape)
    # A bound need not be precise.
    return lax.reduce_precision(jnp.minimum(first, jnp.maximum(gaussian, outlier)), 8, 5), last


def _coarse(scale: Array) -> Array:
    """A scale that a search proposes, in 13 bits: enough for 8-bit codes."""
    return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=12)


class _Fit(NamedTuple):
    """How well a choice fits its group: squared error, the same after its own best scale, and that scale."""

    error: Array
    refined_error: Array
    refined_scale: Array


def _fit(group: _Group, choice: _Choice, unit: Array, format: Format) -> _Fit:
    """Errors are in units of `unit` squared, a scale of the group, so that they neither overflow nor underflow.

    With y = x / s and q its rounded value, the best scale for the same codes is <x, q> / <q, q> = s (1 + f), where
    f = <y - q, q> / <q, q>, and it leaves the error s^2 (<y - q, y - q> - f <y - q, q>).
    """
    scale, zero = choice
    inverse = reciprocal(scale)

    def terms(x: Array) -> tuple[Array, Array, Array]:
        y = finite(x * inverse)
        q = _nearest_value(y, format) if zero is None else _nearest_value(y + zero, format) - zero
        d = y - q
        return d * d, d * q, q * q

    dd, dq, qq = _accumulate(group, terms)
    f = finite(dq * reciprocal(qq))
    squared = jnp.square(finite(scale * reciprocal(unit)))
    return _Fit(squared * dd, squared * (dd - finite(f * dq)), scale + finite(scale * f))


class _Search(NamedTuple):
    """The best choice so far for each group, and its error."""

    error: Array
    best: _Choice

    def offer(self, error: Array, choice: _Choice) -> _Search:
        wins = error < self.error
        return _Search(*jax.tree.map(functools.partial(jnp.where, wins), (error, choice), tuple(self)))


def _coarse_search(group: _Group, spec: QuantSpec, unit: Array, points: int, variants: tuple[float, ...]) -> _Choice:
    """The best of `points * len(variants)` candidates by the error that its refined scale leaves, so refined.

    A variant is the sign of the scale relative to `SignedMax`, or what is added to a zero point before it is floored.
    """
    format = spec.format
    first, last = _grid_ends(group, spec)
    octaves = jnp.log2(first / last)
    covering = _abs_max(group, spec).scale
    if format.kind == "int" and not spec.zero_point:
        covering = group.absmax / -format.qmin
        covering = covering if spec.double_quant else jnp.where(group.high == group.absmax, -covering, covering)

    def propose(fraction: Array, variant: Array) -> _Choice:
        part = last * jnp.exp2(fraction * octaves)
        if not spec.zero_point:
            return _Choice(_stored(_coarse(variant * part * covering), spec.scale_dtype), None)
        scale = _stored(_coarse(part * covering), spec.scale_dtype)
        zero = jnp.floor(format.qmin - finite(group.low * part * reciprocal(scale)) + variant)
        return _Choice(scale, lax.clamp(float(format.qmin), zero, float(format.qmax)))

    def step(search: _Search, candidate: tuple[Array, Array]) -> tuple[_Search, None]:
        choice = propose(*candidate)
        fit = _fit(group, choice, unit, format)
        refined = _Choice(_stored(_coarse(fit.refined_scale), spec.scale_dtype), choice.zero)
        return search.offer(fit.refined_error, refined), None

    fractions = np.linspace(0, 1, points, dtype=np.float32) if points > 1 else np.zeros(1, np.float32)
    grid = np.stack(np.meshgrid(fractions, np.asarray(variants, np.float32), indexing="ij")).reshape(2, -1)
    start = _Search(jnp.full_like(group.absmax, jnp.inf), propose(jnp.float32(0), jnp.float32(variants[0])))
    return lax.scan(step, start, (jnp.asarray(grid[0]), jnp.asarray(grid[1])))[0].best


def _quick_search(group: _Group, spec: QuantSpec) -> _Choice:
    rule = spec.scale_rule
    assert isinstance(rule, QuickSearch)
    unit = _abs_max(group, spec).scale
    return _coarse_search(group, spec, unit, rule.points, (0.5,) if spec.zero_point else (1.0,))


# Around what the grid found: errors have many local minima, some 1 % of the scale apart at 8 bits.
_NEARBY = (1.0, 0.98, 0.99, 1.01, 1.02)


def _mse_search(group: _Group, spec: QuantSpec) -> _Choice:
    rule = spec.scale_rule
    assert isinstance(rule, MseSearch)
    start = _abs_max(group, spec)
    both_signs = spec.format.kind == "int" and not spec.double_quant
    variants = (0.0, 1.0) if spec.zero_point else (1.0, -1.0) if both_signs else (1.0,)
    found = _coarse_search(group, spec, start.scale, rule.points * 2 // len(variants), variants)

    def step(search: _Search, factor: Array) -> tuple[_Search, None]:
        near = _Choice(_stored(_coarse(found.scale * factor), spec.scale_dtype), found.zero)
        choice = jax.tree.map(functools.partial(jnp.where, factor == 0), start, near)
        return search.offer(_fit(group, choice, start.scale, spec.format).error, choice), None

    search = _Search(jnp.full_like(group.absmax, jnp.inf), start)
    return lax.scan(step, search, jnp.asarray((0.0, *_NEARBY), jnp.float32))[0].best


_CHOOSE: dict[type, Callable[[_Group, QuantSpec], _Choice]] = {
    AbsMax: _abs_max,
    SignedMax: _signed_max,
    MseSearch: _mse_search,
    QuickSearch: _quick_search,
}

# --- Quantize, dequantize, fake-quantize -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("spec",))
def _quantize(w: Array, *, spec: QuantSpec) -> tuple[Array, Scales, Array]:
    """Codes, scales, and for each value whether it was rounded rather than clipped."""
    k = w.shape[-2]
    group = _groups(w, spec)
    scale, zero = _CHOOSE[type(spec.scale_rule)](group, spec)
    if spec.format.kind == "int":
        y = divide(group.x, scale)
        y = y if zero is None else y + zero
    else:
        y = group.x * reciprocal(scale)  # as bitsandbytes computes it
    # Rounding the scale to its dtype may push the extreme value of a group past half a step. That is no clipping:
    # without the slack such a value would get no gradient for as long as the scale happens to be rounded down.
    slack = 1 + float(jnp.finfo(spec.scale_dtype).eps)
    lowest, highest = (slack * bound for bound in spec.format.bounds)
    rounded = (y >= lowest) & (y <= highest)
    values = jnp.squeeze(scale, -2)  # (*stack, G, N)
    scales = nest_scales(values) if spec.double_quant else Scales(values.astype(spec.scale_dtype))
    if zero is not None:
        scales = dataclasses.replace(scales, zero=jnp.squeeze(zero, -2).astype(jnp.int8))
    return _from_groups(encode(y, spec.format), k), scales, _from_groups(rounded, k)


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def _dequantize(codes: Array, scales: Scales, *, spec: QuantSpec, dtype: Any) -> Array:
    k = codes.shape[-2]
    values = decode_codes(codes, spec.format)
    if scales.zero is not None:
        values = values - _repeat(scales.zero.astype(jnp.float32), k, spec)
    values = finite(values * _repeat(resolve_scales(scales), k, spec))
    return round_to(values, dtype).astype(dtype)


def quantize(w: Float[Array | np.ndarray, "*stack K N"], spec: QuantSpec) -> tuple[Int8[Array, "*stack K N"], Scales]:
    """Codes and scales of a matrix, for any K, whether or not the group size divides it.

    Args:
        w: the matrix, any float dtype, finite (`check_finite` gives the error for what is not).
        spec: number format, granularity and scale rule.

    Returns:
        codes: signed integers, indices `0..15` into a codebook, or the bit patterns of 8-bit floats.
        scales: as they are stored. Under double quantization, codes were chosen by the scales before that, as in QLoRA.
    """
    codes, scales, _ = _quantize(jnp.asarray(w), spec=spec)
    return codes, scales


def dequantize(
    codes: Int8[Array, "*stack K N"], scales: Scales, spec: QuantSpec, dtype: Any = jnp.float32
) -> Float[Array, "*stack K N"]:
    """The matrix that codes and scales stand for: computed in float32, rounded once to `dtype`."""
    return _dequantize(codes, scales, spec=spec, dtype=jnp.dtype(dtype))


def fake_quant(w: Float[Array, "*stack K N"], spec: QuantSpec) -> Float[Array, "*stack K N"]:
    """`dequantize(*quantize(w, spec), spec, w.dtype)`, with a straight-through gradient.

    The gradient is that of the identity where a value was rounded and exactly zero where it was clipped, that is where
    it lies more than half a step beyond the last code (and a rounding error of the scale). Scales count as constants
    (arXiv 1308.3432).
    """
    return fake_quant_with_codes(w, spec)[0]


def fake_quant_with_codes(
    w: Float[Array, "*stack K N"], spec: QuantSpec
) -> tuple[Float[Array, "*stack K N"], Int8[Array, "*stack K N"], Scales]:
    """`fake_quant(w)`, and the codes and scales that it stands for."""
    codes, scales, rounded = _quantize(lax.stop_gradient(w), spec=spec)
    smooth = jnp.where(rounded, w, lax.stop_gradient(w))
    return straight_through(smooth, _dequantize(codes, scales, spec=spec, dtype=w.dtype)), codes, scales


@jax.custom_jvp
def straight_through(smooth: Float[Array, "*S"], value: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`value`, with the derivative of `smooth`."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[0]


def check_finite(w: Any, path: str) -> None:
    """Refuses a parameter with NaN or infinite entries, as `quantize`, which may be traced, cannot.

    Raises:
        ValueError: with the parameter's path, how many entries are not finite, the first of them and what to do.
    """
    if isinstance(w, Tracer):  # under `jax.jit` and `jax.eval_shape` there are no values to look at
        return
    ok = jnp.isfinite(jnp.asarray(w))
    if ok.all():
        return
    bad = np.argwhere(~np.asarray(ok))
    first = tuple(int(i) for i in bad[0])
    raise ValueError(
        f"qjax: {path!r} has {len(bad)} of {ok.size} entries that are NaN or infinite, the first at "
        f"{list(first)}: {np.asarray(w)[first]}. No scale fits them. Repair the weights, or keep the parameter in "
        f"float with Rule({path!r}, weights=None)."
    )
