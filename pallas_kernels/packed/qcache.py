"""`QCache`: a key-value cache in packed form, and its arithmetic.

A cache holds vectors (head_dim values: one token, one head) along one of its axes, the vector axis. Each vector has a
scale of its own, and a zero point where the spec has one. With the numerics of `pallas_kernels.numbers.numerics`, in
float32:

    code = clip(round(x / s + z))        value = (code - z) * s        s covers the vector's own range

A vector is quantized once, when it is written. What moves vectors as wholes (an update, a transpose, a slice, a select
between vectors) is done to codes, scales and zero points alike and changes no bit of the vectors that stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.numbers import numerics, packing
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.exact import divide
from qjax.pallas_kernels.numbers.formats import FORMATS, Format


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """How the vectors of a cache are stored; hashable plain data.

    Attributes:
        format: a row of `FORMATS`.
        zero_point: integers only: the range of a vector need not be symmetric about 0.
        scale_dtype: of the stored scales. A scale is rounded to it before codes are chosen.

    Raises:
        ValueError: a combination that has no meaning.
    """

    format: Format
    zero_point: bool = False
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Checks the combination."""
        if not isinstance(self.format, Format):
            raise ValueError(f"qjax: a cache has a format such as 'int8' or 'int4', not {self.format!r}.")
        if self.zero_point and self.format.kind != "int":
            raise ValueError(f"qjax: {self.format} has no zero point: its values are fixed.")
        if self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"qjax: scales are float32, bfloat16 or float16, not {self.scale_dtype!r}.")

    def __str__(self) -> str:
        """Short form for tables: `int8/vector`, `int4z/vector bfloat16`."""
        narrow = "" if self.scale_dtype == "float32" else f" {self.scale_dtype}"
        return f"{self.format}{'z' if self.zero_point else ''}/vector{narrow}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        return {"format": self.format.name, "zero_point": self.zero_point, "scale_dtype": self.scale_dtype}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CacheSpec:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: an unknown format.
        """
        if data["format"] not in FORMATS:
            raise ValueError(f"qjax: this version does not know a cache format {data['format']!r}.")
        return CacheSpec(FORMATS[data["format"]], bool(data["zero_point"]), data["scale_dtype"])


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class QCache:
    """A cache in packed form.

    Invariants, with D = `size` the length of a vector and `shape` that of the float cache:
        * `codes` has D replaced by R = `packed_rows(D, format)` along `axis`: int32 words, or int8 for 8-bit formats;
        * `scale`, in the spec's scale dtype, has the vector axis left out; `zero`, int8 and shaped like it, or None;
        * `axis` counts from the end, so slicing or stacking leading axes of every array gives a valid QCache;
        * value: `dequantize(cache) == scale * (code - zero)`, computed in float32 and rounded once to `dtype`.

    Example: float32[6,1,256,2,64] as int4 has codes int32[6,1,256,2,8] and scale float32[6,1,256,2].

    A pytree whose leaves are the packed arrays; everything else is static.
    """

    codes: Any  # arrays, or whatever JAX puts in the leaves of a pytree
    scale: Any
    zero: Any
    spec: CacheSpec
    axis: int
    size: int
    dtype: jnp.dtype

    def tree_flatten_with_keys(self):
        """Packed arrays as leaves, the rest static."""
        key = jax.tree_util.GetAttrKey
        children = ((key("codes"), self.codes), (key("scale"), self.scale), (key("zero"), self.zero))
        return children, (self.spec, self.axis, self.size, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux, children) -> QCache:
        """Rebuilds from `tree_flatten_with_keys`; the children may be anything JAX puts in a tree."""
        return cls(*children, *aux)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of the float cache; sizes may be symbols of `jax.export`."""
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Rank of the float cache."""
        return len(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed arrays: codes, scales, zero points."""
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    def __repr__(self) -> str:
        try:
            shape = ",".join(map(str, self.shape))
            return f"QCache({self.spec}, {jnp.dtype(self.dtype).name}[{shape}], {self.nbytes:,} bytes)"
        except (AttributeError, TypeError, IndexError):  # JAX fills pytrees with placeholders that have no shape
            return f"QCache({self.spec}, leaves={jax.tree.leaves(self)})"


def quantize(x: Float[Array, "*S"], spec: CacheSpec, axis: int) -> QCache:
    """Packs vectors along `axis`; NaN or infinity in a vector gives that vector a NaN scale.

    Args:
        x: a cache or a part of one, any float dtype.
        spec: the format.
        axis: the vector axis, counted from either end.
    """
    axis %= x.ndim
    wide = x.astype(jnp.float32)
    if spec.zero_point:
        low, high = (f(wide, axis, keepdims=True, initial=0.0) for f in (jnp.min, jnp.max))
        absmax = jnp.maximum(-low, high)
    else:
        low = high = absmax = jnp.max(jnp.abs(wide), axis, keepdims=True, initial=0.0)
    scale, zero = numerics.range_scale(low, high, absmax, spec.format, spec.zero_point, spec.scale_dtype)
    y = divide(wide, scale)
    codes = numerics.encode(y if zero is None else y + zero, spec.format)
    return QCache(
        _pack(codes, spec.format, axis),
        jnp.squeeze(scale, axis).astype(spec.scale_dtype),
        None if zero is None else jnp.squeeze(zero, axis).astype(jnp.int8),
        spec,
        axis - x.ndim,
        x.shape[axis],
        jnp.dtype(x.dtype),
    )


def zeros(shape: Sequence[int], dtype: Any, spec: CacheSpec, axis: int) -> QCache:
    """The packed form of a cache of zeros, without making the float one.

    Its leaves share no buffer, so that each can be donated.
    """
    packed = jax.eval_shape(lambda x: quantize(x, spec, axis), jax.ShapeDtypeStruct(tuple(shape), dtype))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), packed)


def packed_nbytes(shape: Sequence[int], spec: CacheSpec, axis: int) -> int:
    """Bytes of a packed cache of this shape."""
    return jax.eval_shape(lambda x: quantize(x, spec, axis), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)).nbytes


def dequantize(cache: QCache) -> Float[Array, "*S"]:
    """The float cache that the packed arrays stand for: shape `cache.shape`, dtype `cache.dtype`."""
    codes, scale, zero = _unpack(cache), scales(cache), cache.zero
    wide = None if zero is None else jnp.expand_dims(zero, cache.axis).astype(jnp.float32)
    return Activation(codes, scale, wide).dequantize(cache.spec.format, cache.dtype)


def unscaled(cache: QCache, dtype: Any) -> Float[Array, "*S"]:
    """`code - zero` of every value in `dtype`; exact where the format is of integers and dtype holds those to 255."""
    values = numerics.decode_codes(_unpack(cache), cache.spec.format)
    if cache.zero is not None:
        values = values - jnp.expand_dims(cache.zero, cache.axis).astype(jnp.float32)
    return values.astype(dtype)


def scales(cache: QCache) -> Float[Array, "*S"]:
    """The scales in float32, with size 1 along the vector axis."""
    return jnp.expand_dims(cache.scale, cache.axis).astype(jnp.float32)


def layer_of(stack: QCache, layer: Int[Array, ""]) -> QCache:
    """One cache of a stack of them: element `layer` of the first axis of every array."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), stack)


def leaves(cache: QCache) -> list[Array]:
    """Its arrays, each with the rank of the float cache: codes with R, the others with 1 along the vector axis."""
    return [cache.codes, *(jnp.expand_dims(a, cache.axis) for a in (cache.scale, cache.zero) if a is not None)]


def from_leaves(arrays: Sequence[Array], like: QCache, axis: int, dtype: Any) -> QCache:
    """The inverse of `leaves`, with another vector axis (counted from the front) and dtype."""
    codes, *rest = arrays
    scale, zero = ([jnp.squeeze(a, axis) for a in rest] + [None])[:2]
    return QCache(codes, scale, zero, like.spec, axis - codes.ndim, like.size, jnp.dtype(dtype))


def _pack(codes: Array, format: Format, axis: int) -> Array:
    """Codes to words along `axis`, without a transpose: what follows the axis are the columns of the words."""
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    words = packing.pack(codes.reshape(*before, codes.shape[axis], math.prod(after)), format)
    return words.reshape(*before, -1 if words.size else 0, *after) if format.bits < 8 else codes


def _unpack(cache: QCache) -> Array:
    """The codes, int8 in the shape of the float cache."""
    format, words = cache.spec.format, cache.codes
    if format.bits == 8:
        return words
    axis = cache.axis + words.ndim
    before, after = words.shape[:axis], words.shape[axis + 1 :]
    codes = packing.unpack(words.reshape(*before, words.shape[axis], math.prod(after)), format, cache.size)
    return codes.reshape(cache.shape)
