"""Quantized activations: `ActSpec`, and the one definition of their arithmetic.

An activation is quantized in its own shape. The axes that the following product contracts are reduced over to choose
scales, so that a scale can be taken out of the product: one for each remaining element ("token"), or one for all. With
scale s and zero point z (or 0), in float32:

    code = clip(round(x / s + z))        value = (code - z) * s

Where the range comes from is the spec's `range`: from the values at hand (`Dynamic`), from calibration (`MinMax`,
`MovingAverage`, `Percentile`, `MseRange`, `EntropyRange`), or learned by the optimizer (`LearnedStep`, `LearnedClip`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.pallas_kernels.numbers import numerics
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, LearnedClip, LearnedStep
from qjax.pallas_kernels.numbers.exact import divide, finite, round_to
from qjax.pallas_kernels.numbers.formats import Format

# --- Numerics --------------------------------------------------------------------------------------------------

Ranges = Mapping[str, Any]
"""The arrays of a range that is known before the call: `low` and `high`; `step` (and `low`); or `clip`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """A quantized activation; a pytree.

    Attributes:
        codes: int8, in the shape of the activation.
        scale: float32, size 1 along each axis that shares a scale.
        zero: float32 integers in the shape of `scale`, signed like the codes, or None.
    """

    codes: Any
    scale: Any
    zero: Any = None

    def centred(self, format: Format) -> Float[Array, "*S"]:
        """`code - zero` as float32 integers: what is multiplied before scales are applied."""
        values = numerics.decode_codes(self.codes, format)
        return values if self.zero is None else values - self.zero

    def dequantize(self, format: Format, dtype: Any) -> Float[Array, "*S"]:
        """The activation that the codes stand for: computed in float32, rounded once to `dtype`."""
        dtype = jnp.dtype(dtype)
        return round_to(finite(self.centred(format) * self.scale), dtype).astype(dtype)


def ranges_from_extremes(low: Any, high: Any, spec: ActSpec) -> dict[str, Array]:
    """The arrays of a spec's range that cover `low` to `high`: what calibration starts or ends with."""
    low, high = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0), jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    if isinstance(spec.range, LearnedClip):
        return {"clip": high if spec.zero_point else jnp.maximum(-low, high)}
    if isinstance(spec.range, LearnedStep):
        scale, _ = _covering(low, high, spec)
        return {"step": scale, "low": low} if spec.zero_point else {"step": scale}
    return {"low": low, "high": high}


def _covering(low: Array, high: Array, spec: ActSpec) -> tuple[Array, Array | None]:
    absmax = jnp.maximum(-low, high)
    return numerics.range_scale(low, high, absmax, spec.format, spec.zero_point, "float32")


def _no_infinity(extreme: Array) -> Array:
    """NaN instead of infinity, which a scale would saturate at: the other values would come back as zeros."""
    return jnp.where(jnp.isinf(extreme), jnp.nan, extreme)


def _scale(x: Array, spec: ActSpec, axes: Sequence[int], ranges: Ranges | None) -> tuple[Array, Array | None]:
    """Scale and zero point, each with size 1 along the axes that share them."""
    if spec.is_dynamic:
        over = tuple(axes) if spec.per == "token" else tuple(range(x.ndim))
        if spec.zero_point:
            low = _no_infinity(jnp.min(x, over, keepdims=True, initial=0.0))
            return _covering(low, _no_infinity(jnp.max(x, over, keepdims=True, initial=0.0)), spec)
        absmax = _no_infinity(jnp.max(jnp.abs(x), over, keepdims=True, initial=0.0))
        return numerics.range_scale(absmax, absmax, absmax, spec.format, False, "float32")
    assert ranges is not None
    return known_scale(spec, ranges, x.ndim)


def known_scale(spec: ActSpec, ranges: Ranges, ndim: int) -> tuple[Array, Array | None]:
    """Scale and zero point of a range that is known before the call, for an activation of so many axes."""
    known = {name: jnp.asarray(a, jnp.float32).reshape((1,) * ndim) for name, a in ranges.items()}
    if isinstance(spec.range, LearnedStep):
        scale = jnp.abs(known["step"])
        if not spec.zero_point:
            return scale, None
        qmin, qmax = float(spec.format.qmin), float(spec.format.qmax)
        return scale, lax.clamp(qmin, jnp.round(qmin - divide(known["low"], scale)), qmax)
    if isinstance(spec.range, LearnedClip):
        clip = jnp.abs(known["clip"])
        return _covering(jnp.zeros_like(clip) if spec.zero_point else -clip, clip, spec)
    return _covering(jnp.minimum(known["low"], 0.0), jnp.maximum(known["high"], 0.0), spec)


def quantize(x: Float[Array, "*S"], spec: ActSpec, axes: Sequence[int], ranges: Ranges | None = None) -> Activation:
    """Codes and scales of an activation.

    Args:
        x: the activation, any float dtype. NaN and infinity in a token give a NaN scale where the range is dynamic; a
            range known before the call saturates infinity; NaN is code 0 of an integer format there, and stays NaN in a
            float one.
        spec: format and range.
        axes: those that the product contracts.
        ranges: scalars, where the range is known before the call.
    """
    x = x.astype(jnp.float32)
    scale, zero = _scale(x, spec, axes, ranges)
    y = divide(x, scale)
    y = y if zero is None else y + zero
    return Activation(numerics.encode(y, spec.format), scale, zero)


def fake_quant(
    x: Float[Array, "*S"], spec: ActSpec, axes: Sequence[int], ranges: Ranges | None = None
) -> tuple[Activation, Float[Array, "*S"]]:
    """The quantized activation, and its value in the dtype of x with a gradient.

    The gradient in x is that of the identity where x was rounded and 0 where it was clipped (arXiv 1308.3432); a
    learned range has the gradient of its paper.
    """
    fixed = lax.stop_gradient((x, ranges))
    quantized = quantize(fixed[0], spec, axes, fixed[1])
    value = quantized.dequantize(spec.format, x.dtype)
    return quantized, numerics.straight_through(_smooth(x, quantized, spec, ranges).astype(x.dtype), value)


def _smooth(x: Array, quantized: Activation, spec: ActSpec, ranges: Ranges | None) -> Array:
    """A function whose derivatives are those that the spec's range rule defines; its value is not used."""
    if spec.is_dynamic:
        return x
    x = x.astype(jnp.float32)
    y = divide(lax.stop_gradient(x), quantized.scale)
    y = y if quantized.zero is None else y + quantized.zero
    lowest, highest = spec.format.bounds
    inside = (y >= lowest) & (y <= highest)
    if isinstance(spec.range, LearnedClip):
        assert ranges is not None
        clip = jnp.asarray(ranges["clip"], jnp.float32).reshape((1,) * x.ndim)
        clip = clip * jnp.sign(lax.stop_gradient(clip))
        upper = y > highest
        return jnp.where(inside, x, jnp.where(upper, clip, 0.0 if spec.zero_point else -clip))
    if isinstance(spec.range, LearnedStep):
        assert ranges is not None
        # arXiv 1902.08153, section 2.2: the gradient of the step is scaled by 1 / sqrt(number of values * qmax)
        damp = 1 / math.sqrt(max(1, x.size) * spec.format.qmax)
        step = jnp.asarray(ranges["step"], jnp.float32).reshape((1,) * x.ndim)
        step = step * jnp.sign(lax.stop_gradient(step))
        step = damp * step + lax.stop_gradient((1 - damp) * step)
        code = quantized.centred(spec.format)
        if not spec.zero_point:
            return jnp.where(inside, x + step * lax.stop_gradient(code - y), code * step)
        low = jnp.asarray(ranges["low"], jnp.float32).reshape((1,) * x.ndim)
        low = damp * low + lax.stop_gradient((1 - damp) * low)
        steps = numerics.decode_codes(quantized.codes, spec.format) - spec.format.qmin  # from the low end
        assert quantized.zero is not None
        rounding = lax.stop_gradient(code - (y - quantized.zero))
        return jnp.where(inside, x + step * rounding, low + step * steps)
    return jnp.where(inside, x, lax.stop_gradient(x))
