"""Scales as they are stored: in their own dtype, or quantized once more (double quantization)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.pallas_kernels.numbers.exact import divide, finite, pairwise_sum, reciprocal

NESTED_BLOCK = 256
"""Scales in one block of double quantization, as in bitsandbytes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of a canonical matrix as they are stored; a pytree.

    Invariants, with G groups along K:
        * `values` is `(*stack, G, N)` in the spec's scale dtype: `(*stack, 1, N)` per channel, `(*stack, 1, 1)` per
          tensor; under double quantization it holds the uint8 codes of the scales;
        * `zero`, where the spec has a zero point, is int8 of the same shape, signed like the codes;
        * under double quantization the scale of group g in column n belongs to block `(n * G + g) // 256` of its
          matrix and is `dynamic_map()[values] * absmax[block] + offset`, with `absmax` `(*stack, B, 1)` and `offset`
          `(*stack, 1, 1)`, both float32; otherwise both are None;
        * each array has the stack axes in front, so taking one stack index of all of them gives the scales of that
          matrix.
    """

    values: Any  # arrays, or what JAX puts in their place when it maps over a pytree
    zero: Any = None
    absmax: Any = None
    offset: Any = None


# --- Double quantization ---------------------------------------------------------------------------------------


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 ascending float32 values of the 8-bit dynamic data type (arXiv 2110.02861), as bitsandbytes has them.

    Seven decades; in decade i the midpoints of an even division of [0.1, 1] into 2**i parts, both signs, and 0 and 1.
    The divisions are rounded as torch.linspace does: from the nearer end, with a float32 step.
    """
    values = [0.0, 1.0]
    for i in range(7):
        at = np.arange(2**i + 1)
        step = np.float64((np.float32(1.0) - np.float32(0.1)) / np.float32(2**i))
        edges = np.where(at < len(at) // 2, np.float32(0.1) + step * at, 1.0 - step * (2**i - at)).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*middles, *-middles]
    return np.sort(np.asarray(values, np.float32))


@functools.cache
def _dynamic_steps() -> np.ndarray:
    """Between each two codes of the map, the last of 65536 even steps over [-1, 1] that goes to the lower one.

    bitsandbytes looks codes up by that step, which differs from the nearest code within 1.5e-5 of a midpoint.
    """
    values = dynamic_map().astype(np.float64)
    return np.floor(((values[:-1] + values[1:]) / 2 + 1) / 2 * 65535).astype(np.int32)


def nest_scales(scale: Float[Array, "*stack G N"]) -> Scales:
    """8-bit codes of scales around their mean, in blocks of 256 along `(N, G)` (section 3 of arXiv 2305.14314)."""
    *stack, g, n = scale.shape
    flat = jnp.swapaxes(scale, -1, -2).reshape(*stack, n * g)
    offset = divide(pairwise_sum(flat, -1), jnp.float32(max(1, n * g)))  # (*stack, 1)
    blocks = -(-n * g // NESTED_BLOCK)
    padding = [(0, 0)] * len(stack) + [(0, blocks * NESTED_BLOCK - n * g)]
    centred = jnp.pad(flat - offset, padding).reshape(*stack, blocks, NESTED_BLOCK)
    absmax = jnp.max(jnp.abs(centred), axis=-1, keepdims=True, initial=0.0)  # (*stack, B, 1)
    unit = centred * reciprocal(absmax)
    step = jnp.floor(finite((unit + 1) / 2 * 65535) + 0.5).astype(jnp.int32)
    codes = jnp.searchsorted(jnp.asarray(_dynamic_steps()), step).astype(jnp.uint8)
    codes = codes.reshape(*stack, blocks * NESTED_BLOCK)[..., : n * g].reshape(*stack, n, g)
    return Scales(jnp.swapaxes(codes, -1, -2), None, absmax, offset[..., None])


def resolve_scales(scales: Scales) -> Float[Array, "*stack G N"]:
    """The scales as float32 numbers, double quantization undone."""
    if scales.absmax is None:
        return scales.values.astype(jnp.float32)
    *stack, g, n = scales.values.shape
    unit = jnp.asarray(dynamic_map())[scales.values.astype(jnp.int32)]
    absmax = jnp.broadcast_to(scales.absmax, (*scales.absmax.shape[:-1], NESTED_BLOCK))
    absmax = absmax.reshape(*stack, -1)[..., : n * g].reshape(*stack, n, g)
    return finite(unit * jnp.swapaxes(absmax, -1, -2)) + scales.offset


def plain_scales(scales: Scales) -> Scales:
    """The same scales without double quantization, so that groups and columns can be taken apart."""
    return scales if scales.absmax is None else Scales(resolve_scales(scales), scales.zero)


# --- Storage ---------------------------------------------------------------------------------------------------


def scales_to_arrays(scales: Scales) -> dict[str, Any]:
    """The arrays that `scales` consists of (or whatever stands in their place in a pytree), by name."""
    arrays = {field.name: getattr(scales, field.name) for field in dataclasses.fields(Scales)}
    return {name: a for name, a in arrays.items() if a is not None}


def scales_from_arrays(arrays: dict[str, Any]) -> Scales:
    """The inverse of `scales_to_arrays`."""
    return Scales(**arrays)
