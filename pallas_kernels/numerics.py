"""The one definition of quantization: what codes and scales a weight gets, and what they stand for.

Fake-quant, solvers, packing and the reference kernel all call this file. It works on the canonical matrix
`(*stack, K, N)`: groups run along K, each element of the stack is a matrix of its own. `fake_quant` is
`dequantize(quantize(w))` by construction, and equals it bit for bit across compiled programs because
    * scales are rounded to their stored dtype before codes are computed, behind an optimization barrier: XLA may
      otherwise drop a float32 -> bfloat16 -> float32 round trip inside a fusion (excess precision);
    * there is no multiply-add whose contraction to FMA could change a bit; double quantization, which has one, is
      decoded behind a barrier too.
The one exception is a search (`MseSearch`, `Refined`): its sums may be added in another order in another program, so
two candidates of almost equal error can swap. A challenger must therefore win by a relative 1e-5.

Arithmetic is float32 whatever the weight's dtype. Where a scale would be subnormal (CPUs flush those to zero) the
group becomes exact zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.formats import AbsMax, Format, MseSearch, PerGroup, PerTensor, QuantSpec, SignedMax

_TINY = float(np.finfo(np.float32).tiny)
_F16_MAX = float(np.finfo(np.float16).max)
_NESTED_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """The scales of a matrix `(*stack, K, N)` with G groups along K.

    Attributes:
        values: `(*stack, G, N)`, G = 1 per channel, `(*stack, 1, 1)` per tensor; in the spec's scale dtype, or uint8
            codes under double quantization.
        zero: integer zero points, same shape, stored signed as the codes are; None for symmetric formats.
        nested: scales of the codes `(*stack, ceil(N G / 256))`, float32, in blocks of 256 codes of the matrix's
            `(N, G)` order; None without double quantization.
        offset: what is added to the decoded codes, `(*stack,)`, float32; None without double quantization.
    """

    values: Array
    zero: Array | None = None
    nested: Array | None = None
    offset: Array | None = None


# --- Codes -------------------------------------------------------------------------------------------------------


@functools.cache
def _thresholds(fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """For a codebook: the float32 values above which the next sorted value is nearest, and the code of each value.

    A tie goes to the even code of a minifloat, as in its cast, and down otherwise, as in bitsandbytes.
    """
    values = np.asarray(sorted({v + 0.0 for v in fmt.values}), np.float32)
    codes = np.asarray([fmt.values.index(v) for v in sorted({v + 0.0 for v in fmt.values})])
    middle = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    if fmt.name == "fp4_e2m1":
        to_upper = codes[1:] % 2 == 0
        middle = np.where(to_upper, np.nextafter(middle, np.float32(-np.inf)), middle)
    return middle, codes


def encode(t: Float[Array, "..."], fmt: Format) -> Int8[Array, "..."]:
    """The nearest code of scaled values; integers round half to even, values beyond the ends clip."""
    if fmt.kind == "int":
        return jnp.clip(jnp.round(t), fmt.qmin, fmt.qmax).astype(jnp.int8)
    if fmt.kind == "float":
        top = fmt.largest
        return lax.bitcast_convert_type(jnp.clip(t, -top, top).astype(fmt.dtype), jnp.int8)
    middle, codes = _thresholds(fmt)
    rank = sum((t > float(m)).astype(jnp.int32) for m in middle)  # compares vectorise; a 16-way argmin would not fuse
    if (codes == np.arange(len(codes))).all():
        return rank.astype(jnp.int8)
    return _select(rank, codes.tolist(), jnp.int32).astype(jnp.int8)


def decode(codes: Int8[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """What codes stand for before the scale, float32."""
    if fmt.kind == "int":
        return codes.astype(jnp.float32)
    if fmt.kind == "float":
        return lax.bitcast_convert_type(codes, jnp.dtype(fmt.dtype)).astype(jnp.float32)
    return _select(codes.astype(jnp.int32), list(fmt.values), jnp.float32)


def _select(index: Array, table: list[float], dtype: Any) -> Array:
    """`table[index]` as a tree of selects: it vectorises on CPU and TPU, where a gather from a small table does not."""
    level = [jnp.asarray(v, dtype) for v in table]
    bit = 0
    while len(level) > 1:
        odd = (index >> bit) & 1 == 1
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [jnp.where(odd, p[1], p[0]) if len(p) == 2 else p[0] for p in pairs]
        bit += 1
    return jnp.broadcast_to(level[0], index.shape)


# --- Groups --------------------------------------------------------------------------------------------------------


def _group_size(k: int, spec: QuantSpec) -> int:
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else max(k, 1)


def _to_groups(m: Array, spec: QuantSpec) -> Array:
    """(*stack, K, N) -> (*stack, G, g, N); a short last group is filled with zeros, which no rule below notices."""
    *stack, k, n = m.shape
    g = _group_size(k, spec)
    groups = -(-k // g)
    m = jnp.pad(m, [(0, 0)] * len(stack) + [(0, groups * g - k), (0, 0)]) if groups * g != k else m
    return m.reshape(*stack, groups, g, n)


def _from_groups(m: Array, k: int) -> Array:
    """The inverse of `_to_groups`."""
    *stack, groups, g, n = m.shape
    return m.reshape(*stack, groups * g, n)[..., :k, :]


def _axes(spec: QuantSpec) -> tuple[int, ...]:
    """The axes of the grouped matrix that share a scale."""
    return (-2, -1) if isinstance(spec.granularity, PerTensor) else (-2,)


def _stored(scale: Array, spec: QuantSpec) -> Array:
    """A scale as it will be read back: rounded to its dtype, zero where it would be subnormal."""
    scale = jnp.where(jnp.abs(scale) < _TINY, 0.0, scale)
    if spec.scale_dtype == "float32":
        return scale
    if spec.scale_dtype == "float16":
        scale = jnp.clip(scale, -_F16_MAX, _F16_MAX)
    return lax.optimization_barrier(scale.astype(spec.scale_dtype)).astype(jnp.float32)


# --- Scale rules -----------------------------------------------------------------------------------------------
#
# Each works on groups w (*stack, G, g, N) and gives scale and zero point with the reduced axes kept at size 1.


def _scaled(w: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    safe = jnp.where(scale == 0, 1.0, scale)
    if fmt.kind == "codebook":
        return w * (1.0 / safe)  # as bitsandbytes computes it
    t = w / safe
    return t if zero is None else t + zero


def _round_trip(w: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    """The scaled value that is decoded for w: integer minus zero point, or codebook value."""
    q = decode(encode(_scaled(w, scale, zero, fmt), fmt), fmt)
    return q if zero is None else q - zero


def _absmax(w: Array, spec: QuantSpec) -> Array:
    return jnp.max(jnp.abs(w), axis=_axes(spec), keepdims=True)


def _steps_of(fmt: Format) -> float:
    """Scaled value of the largest magnitude under `AbsMax`."""
    return ((1 << fmt.bits) - 1) / 2 if fmt.kind == "int" else fmt.largest


def _affine(w: Array, spec: QuantSpec, shrink: float | Array = 1.0) -> tuple[Array, Array]:
    """Scale and zero point of the range of w and 0, shrunk towards 0."""
    fmt = spec.format
    low = jnp.minimum(jnp.min(w, axis=_axes(spec), keepdims=True), 0.0) * shrink
    high = jnp.maximum(jnp.max(w, axis=_axes(spec), keepdims=True), 0.0) * shrink
    scale = _stored((high - low) / ((1 << fmt.bits) - 1), spec)
    zero = fmt.qmin - jnp.round(low / jnp.where(scale == 0, 1.0, scale))
    return scale, jnp.clip(zero, fmt.qmin, fmt.qmax)


def _signed_max(w: Array, spec: QuantSpec) -> Array:
    """The value of largest magnitude, sign kept; the positive one of two."""
    high = jnp.max(w, axis=_axes(spec), keepdims=True)
    low = jnp.min(w, axis=_axes(spec), keepdims=True)
    return jnp.where(high >= -low, high, low)


def _least_squares(w: Array, scale: Array, zero: Array | None, spec: QuantSpec) -> Array:
    """The scale that fits w best while its codes stay: <w, q> / <q, q>."""
    q = _round_trip(w, scale, zero, spec.format)
    wq = jnp.sum(w * q, axis=_axes(spec), keepdims=True)
    qq = jnp.sum(q * q, axis=_axes(spec), keepdims=True)
    return _stored(jnp.where(qq == 0, scale, wq / jnp.where(qq == 0, 1.0, qq)), spec)


def _error(w: Array, scale: Array, zero: Array | None, spec: QuantSpec) -> Array:
    d = w - scale * _round_trip(w, scale, zero, spec.format)
    return jnp.sum(d * d, axis=_axes(spec), keepdims=True)


# Where `Refined` starts: the part of the largest magnitude that maps to the most negative code, by bits. Best on
# Gaussian, Laplace and Student-t groups of 32 to 128 (scripts/bench_formats.py).
_REFINED_START = {2: 0.8, 3: 0.9, 4: 0.95}


def _choose(w: Array, spec: QuantSpec) -> tuple[Array, Array | None]:
    """Scale and zero point of every group, by the spec's rule, rounded as stored."""
    fmt, rule = spec.format, spec.scale_rule
    match rule:
        case SignedMax():
            return _stored(_signed_max(w, spec) / fmt.qmin, spec), None
        case MseSearch() if fmt.kind != "float":
            return _search(w, spec, rule)
        case AbsMax() | MseSearch():
            if spec.zero_point:
                return _affine(w, spec)
            return _stored(_absmax(w, spec) / _steps_of(fmt), spec), None
    raise AssertionError(rule)


def _search(w: Array, spec: QuantSpec, rule: MseSearch) -> tuple[Array, Array | None]:
    fmt = spec.format
    grid = np.linspace(0.4, 1.0, 10, dtype=np.float32)

    def better(best: Any, candidate: Any) -> Any:
        wins = candidate[0] < best[0] * (1 - 1e-5)
        return jax.tree.map(lambda new, old: jnp.where(wins, new, old), candidate, best)

    if spec.zero_point:

        def propose(shrink: Array) -> tuple[Array, Array | None]:
            return _affine(w, spec, shrink)

        first: tuple[Array, Array | None] = _affine(w, spec)
    else:
        absmax = _absmax(w, spec)
        if fmt.kind == "int":  # the full range is the one that reaches the most negative code
            top = float(-fmt.qmin)
            grid = grid if spec.double_quant else np.concatenate([grid, -grid])
        else:
            top = fmt.largest

        def propose(shrink: Array) -> tuple[Array, Array | None]:
            return _stored(absmax * (shrink / top), spec), None

        first = _stored(absmax / _steps_of(fmt), spec), None

    def step(best: Any, shrink: Array) -> tuple[Any, None]:
        scale, zero = propose(shrink)
        return better(best, (_error(w, scale, zero, spec), scale, zero)), None

    best, _ = lax.scan(step, (_error(w, *first, spec), *first), jnp.asarray(grid))
    for _ in range(2):
        _, scale, zero = best
        refined = _least_squares(w, scale, zero, spec)
        best = better(best, (_error(w, refined, zero, spec), refined, zero))
    return best[1], best[2]


# --- Double quantization -----------------------------------------------------------------------------------------


@functools.cache
def _dynamic_map() -> np.ndarray:
    """The 256 values of the 8-bit dynamic data type (arXiv 2110.02861), float32, ascending.

    Between two powers of ten the values are the midpoints of an even division; divisions are computed from the
    nearer end with one rounding, as torch.linspace does on CPU, which bitsandbytes' table was made with.
    """
    values: list[float] = [0.0, 1.0]
    for i in range(7):
        n = 2**i + 1
        start, end = np.float32(0.1), np.float32(1.0)
        step = np.float64((end - start) / np.float32(n - 1))
        at = np.arange(n)
        edges = np.where(at < n // 2, start + step * at, end - step * (n - 1 - at)).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*means, *-means]
    return np.sort(np.asarray(values, np.float32))


def _nest(scale: Array, spec: QuantSpec) -> Scales:
    """8-bit codes of float32 scales `(*stack, G, N)`, in blocks of 256 along `(N, G)`, around their mean."""
    *stack, g, n = scale.shape
    flat = jnp.swapaxes(scale, -1, -2).reshape(*stack, n * g)
    offset = jnp.mean(flat, axis=-1)
    blocks = -(-n * g // _NESTED_BLOCK)
    centred = jnp.pad(flat - offset[..., None], [(0, 0)] * len(stack) + [(0, blocks * _NESTED_BLOCK - n * g)])
    centred = centred.reshape(*stack, blocks, _NESTED_BLOCK)
    nested = jnp.max(jnp.abs(centred), axis=-1)
    t = centred * (1.0 / jnp.where(nested == 0, 1.0, nested))[..., None]
    # bitsandbytes looks codes up in a table of 65536 entries over [-1, 1]: round to its grid, then to the nearest
    grid = jnp.floor((t + 1) / 2 * 65535 + 0.5) / 65535 * 2 - 1
    table = _dynamic_map()
    middle = ((table[:-1].astype(np.float64) + table[1:]) / 2).astype(np.float32)
    codes = jnp.searchsorted(jnp.asarray(middle), grid.reshape(-1)).reshape(grid.shape).astype(jnp.uint8)
    codes = codes.reshape(*stack, blocks * _NESTED_BLOCK)[..., : n * g].reshape(*stack, n, g)
    return Scales(jnp.swapaxes(codes, -1, -2), None, nested, offset)


def resolve_scales(scales: Scales) -> Float[Array, "*stack G N"]:
    """The scales as float32 numbers, `(*stack, G, N)`."""
    if scales.nested is None or scales.offset is None:
        return scales.values.astype(jnp.float32)
    *stack, g, n = scales.values.shape
    codes = jnp.swapaxes(scales.values, -1, -2).reshape(*stack, n * g)
    block = jnp.repeat(scales.nested, _NESTED_BLOCK, axis=-1)[..., : n * g]
    product = lax.optimization_barrier(jnp.asarray(_dynamic_map())[codes.astype(jnp.int32)] * block)
    flat = product + scales.offset[..., None]
    return jnp.swapaxes(flat.reshape(*stack, n, g), -1, -2)


def plain_scales(scales: Scales) -> Scales:
    """The same scales without double quantization."""
    return scales if scales.nested is None else Scales(resolve_scales(scales), scales.zero)


# --- Quantize, dequantize, fake-quant ------------------------------------------------------------------------------


def quantize(w: Float[Array, "*stack K N"], spec: QuantSpec) -> tuple[Int8[Array, "*stack K N"], Scales]:
    """Codes and scales of a matrix.

    Args:
        w: any float dtype; must be finite (`check_finite`).
        spec: format, granularity, scale rule.

    Returns:
        codes: signed integers, codebook indices (0..15) or bit patterns of 8-bit floats.
        scales: in the dtype in which they are stored.
    """
    k = w.shape[-2]
    groups = _to_groups(jnp.asarray(w).astype(jnp.float32), spec)
    scale, zero = _choose(groups, spec)  # (*stack, G, 1, N)
    codes = _from_groups(encode(_scaled(groups, scale, zero, spec.format), spec.format), k)
    flat = scale[..., 0, :]  # (*stack, G, N)
    stored_zero = None if zero is None else zero[..., 0, :].astype(jnp.int8)
    if spec.double_quant:
        return codes, dataclasses.replace(_nest(flat, spec), zero=stored_zero)
    return codes, Scales(flat.astype(spec.scale_dtype), stored_zero)


def dequantize(
    codes: Int8[Array, "*stack K N"], scales: Scales, spec: QuantSpec, dtype: Any = jnp.float32
) -> Float[Array, "*stack K N"]:
    """`scale * (code - zero_point)` (or `scale * value[code]`), computed in float32 and cast once to `dtype`."""
    k = codes.shape[-2]
    values = _to_groups(decode(codes, spec.format), spec)
    if scales.zero is not None:
        values = values - scales.zero.astype(jnp.float32)[..., None, :]
    values = values * resolve_scales(scales)[..., None, :]
    return _from_groups(values, k).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quant(w: Float[Array, "*stack K N"], spec: QuantSpec) -> Float[Array, "*stack K N"]:
    """`dequantize(quantize(w))` in the dtype of `w`, with a straight-through gradient.

    The gradient is that of the identity where the scaled value lies within half a step of the range of codes, and
    zero where it was clipped; scales count as constants (arXiv 1308.3432; 1712.05877, section 3).
    """
    codes, scales = quantize(w, spec)
    return dequantize(codes, scales, spec, w.dtype)


@fake_quant.defjvp
def _fake_quant_jvp(spec: QuantSpec, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (w,), (tangent,) = primals, tangents
    codes, scales = quantize(w, spec)
    groups = _to_groups(w.astype(jnp.float32), spec)
    zero = None if scales.zero is None else scales.zero.astype(jnp.float32)[..., None, :]
    t = _scaled(groups, resolve_scales(scales)[..., None, :], zero, spec.format)
    low, high = spec.format.bounds
    inside = _from_groups((t >= low) & (t <= high), w.shape[-2])
    out = dequantize(codes, scales, spec, w.dtype)
    return out, jnp.where(inside, tangent, jnp.zeros_like(tangent))


def check_finite(w: Any, path: str) -> None:
    """Raises a ValueError that names the parameter if it has NaN or infinite values."""
    finite = np.asarray(jnp.isfinite(jnp.asarray(w)))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"qjax: {path!r} has {finite.size - int(finite.sum())} of {finite.size} values that are NaN or infinite, "
            f"the first at {first}. Mend the weights, or keep the parameter float with Rule({path!r}, weights=None)."
        )


# --- Storage ---------------------------------------------------------------------------------------------------


def scales_to_arrays(scales: Scales) -> dict[str, Array]:
    """The arrays of `scales` that are there, by name."""
    fields = {f.name: getattr(scales, f.name) for f in dataclasses.fields(Scales)}
    return {name: a for name, a in fields.items() if a is not None}


def scales_from_arrays(arrays: dict[str, Any]) -> Scales:
    """The inverse of `scales_to_arrays`."""
    return Scales(**arrays)


def scale_count(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Number of scales of a matrix `(*stack, K, N)`."""
    *stack, k, n = shape
    if isinstance(spec.granularity, PerTensor):
        return math.prod(stack)
    return math.prod(stack) * -(-k // _group_size(k, spec)) * n
