"""`QTensor`: a parameter in packed form, and `Layout`: how its axes map to the canonical matrix.

Every format, solver and kernel sees a parameter as the matrix `(*stack, K, N)`: K is what the operation
contracts, N what it produces, and each element of the stack (scanned layers, experts) is a matrix of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.numbers import numerics, packing, stored_scales
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerTensor, QuantSpec
from qjax.pallas_kernels.packed.layout import Layout


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A parameter in packed form.

    Invariants, with `R = packed_rows(K, format)` and G the number of groups along K:
        * `words` is `(*stack, R, N)`: int32 words packed along K, or int8 for 8-bit formats;
        * `scales.values` is `(*stack, G, N)` (`(*stack, 1, 1)` per tensor), zero points and double-quantized
          codes alike;
        * with `order == "nk"` the last two axes of every array are swapped, so that one row of N lies
          contiguous (lookup tables);
        * `shape` and `dtype` are those of the float parameter; leading sizes come from the arrays, so slicing
          a leading stack axis off every array gives a valid QTensor of the remaining stack;
        * value: `dequantize() == layout.from_matrix(scale * (code - zero_point))`, computed in float32 and
          cast once to `dtype`.

    A pytree whose leaves are the packed arrays; everything else is static.
    """

    words: Any  # arrays, or whatever JAX puts in the leaves of a pytree
    scales: Any
    spec: QuantSpec
    layout: Layout
    dtype: jnp.dtype
    order: Literal["kn", "nk"] = "kn"

    def tree_flatten_with_keys(self):
        """Packed arrays as leaves, the rest static."""
        children = (
            (jax.tree_util.GetAttrKey("words"), self.words),
            (jax.tree_util.GetAttrKey("scales"), self.scales),
        )
        return children, (self.spec, self.layout, self.dtype, self.order)

    @classmethod
    def tree_unflatten(cls, aux, children) -> QTensor:
        """Rebuilds from `tree_flatten_with_keys`; the children may be anything JAX puts in a tree."""
        return cls(*children, *aux)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float parameter."""
        lead = self.words.shape[: self.words.ndim - 2 - len(self.layout.sizes("stack"))]
        return (*lead, *self.layout.shape)

    @property
    def ndim(self) -> int:
        """Rank of the float parameter."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """Values along K that share a scale, at least 1."""
        return self.spec.group_size(self.layout.k)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed arrays: words, scales, zero points."""
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, scales and padding included."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def __repr__(self) -> str:
        try:
            shape = ",".join(map(str, self.shape))
            return f"QTensor({self.spec}, {jnp.dtype(self.dtype).name}[{shape}], {self.bits_per_weight:.2f} bpw)"
        except (AttributeError, TypeError):  # JAX fills pytrees with placeholders that have no shape
            return f"QTensor({self.spec}, leaves={jax.tree.leaves(self)})"

    def matrix_arrays(self) -> tuple[Array, stored_scales.Scales]:
        """The packed arrays in `(*stack, K, N)` order, whatever order they are stored in."""
        if self.order == "kn":
            return self.words, self.scales
        return jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2) if a.ndim >= 2 else a, (self.words, self.scales))

    def matrix(self, dtype: jnp.dtype | None = None) -> Float[Array, "*stack K N"]:
        """The dequantized canonical matrix, in `dtype` or the parameter's own."""
        words, scales = self.matrix_arrays()
        codes = packing.unpack(words, self.spec.format, self.layout.k)
        return numerics.dequantize(codes, scales, self.spec, self.dtype).astype(dtype or self.dtype)

    def select_columns(self, columns: Int[Array, " B"]) -> tuple[Array, stored_scales.Scales]:
        """Columns of an unstacked matrix as packed arrays in `(K, B)` order; only those columns are read.

        Under double quantization all scales are decoded: their blocks run through all columns.
        """

        def pick(a: Array, axis: int) -> Array:
            return a if a.shape[axis] == 1 else jnp.take(a, columns, axis=axis)  # size 1: one for all columns

        def stored(a: Array) -> Array:
            return pick(a, 1) if self.order == "kn" else pick(a, 0).T

        if self.spec.double_quant:
            plain = stored_scales.plain_scales(self.matrix_arrays()[1])
            return stored(self.words), jax.tree.map(lambda a: pick(a, 1), plain)
        return jax.tree.map(stored, (self.words, self.scales))

    def dequantize(self) -> Float[Array, ...]:
        """The float parameter that the packed arrays stand for: shape `self.shape`, dtype `self.dtype`."""
        return self.layout.from_matrix(self.matrix())


def quantize(w: Float[Array, ...], spec: QuantSpec, layout: Layout, order: Literal["kn", "nk"] = "kn") -> QTensor:
    """Packs a float parameter; `quantize(w, spec, layout).dequantize() == fake_quant(w, spec, layout)` bit for bit.

    Args:
        w: the parameter, shape `(*leading, *layout.shape)`, float32, bfloat16 or float16, finite
            (`numerics.check_finite` gives the error for what is not).
        spec: number format, granularity, scale rule.
        layout: which axes are stack, K and N.
        order: storage order of the packed matrix; "nk" for lookup tables.
    """
    codes, scales = numerics.quantize(layout.to_matrix(w), spec)
    return _packed(codes, scales, spec, layout, w.dtype, order)


def reorder(q: QTensor, order: Literal["kn", "nk"]) -> QTensor:
    """The same parameter with its packed arrays stored in another order; the codes and scales keep their bits.

    Args:
        q: a packed parameter.
        order: storage order of the result: "nk" for lookup tables and for kernels that read rows of K.
    """
    if q.order == order:
        return q
    words, scales = jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2) if a.ndim >= 2 else a, (q.words, q.scales))
    return dataclasses.replace(q, words=words, scales=scales, order=order)


def widen(q: QTensor) -> QTensor:
    """The same parameter, bit for bit, in a format whose words a kernel reads with few instructions.

    Integers of 2 and 3 bits are stored as int4, those of 5 to 7 bits as int8, and scales that are quantized themselves
    as float32. The result takes more memory, and its `spec` is the one of what is stored.

    Args:
        q: a packed parameter; one of another format comes back as it is.
    """
    spec = widened(q.spec)
    if spec == q.spec:
        return q
    words, scales = q.matrix_arrays()
    if spec.format is not q.spec.format:
        words = packing.pack(packing.unpack(words, q.spec.format, q.layout.k), spec.format)
    wide = QTensor(words, stored_scales.plain_scales(scales), spec, q.layout, q.dtype)
    return reorder(wide, q.order)


def widened(spec: QuantSpec) -> QuantSpec:
    """The spec of what `widen` makes of a parameter that has this one."""
    format = spec.format
    if format.kind == "int" and format.bits not in (4, 8):
        format = FORMATS["int4" if format.bits < 4 else "int8"]
    return dataclasses.replace(spec, format=format, double_quant=False)


def is_stored_as(q: QTensor, spec: QuantSpec) -> bool:
    """Whether a packed parameter is what `quantize(w, spec, ...)` gives, or that after `widen`.

    How scales were chosen leaves no trace in what is stored; all else has to agree.
    """

    def stored(spec: QuantSpec) -> Any:
        one_scale = isinstance(spec.granularity, PerTensor)
        scales = (one_scale, spec.group_size(q.layout.k), spec.zero_point, spec.double_quant, spec.scale_dtype)
        return spec.format, scales

    return stored(q.spec) in (stored(spec), stored(widened(spec)))


def _packed(
    codes: Array, scales: stored_scales.Scales, spec: QuantSpec, layout: Layout, dtype: Any, order: Literal["kn", "nk"]
) -> QTensor:
    words = packing.pack(codes, spec.format)
    if order == "nk":
        words, scales = jax.tree.map(lambda a: jnp.swapaxes(a, -1, -2) if a.ndim >= 2 else a, (words, scales))
    return QTensor(words, scales, spec, layout, jnp.dtype(dtype), order)


def fake_quant(w: Float[Array, ...], spec: QuantSpec, layout: Layout) -> Float[Array, ...]:
    """What `quantize` would store, as a float parameter of the same shape, with a straight-through gradient."""
    return layout.from_matrix(numerics.fake_quant(layout.to_matrix(w), spec))


def fake_quant_with_codes(
    w: Float[Array, ...], spec: QuantSpec, layout: Layout, order: Literal["kn", "nk"] = "kn"
) -> tuple[Float[Array, ...], QTensor]:
    """`fake_quant(w)`, and the QTensor `quantize(lax.stop_gradient(w))` whose value it is; scales are chosen once."""
    value, codes, scales = numerics.fake_quant_with_codes(layout.to_matrix(w), spec)
    return layout.from_matrix(value), _packed(codes, scales, spec, layout, w.dtype, order)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class FoldedParam:
    """Stands in a packed model for a float parameter that was folded into other matrices.

    Attributes:
        own: the parameter itself, packed or float, where the model also uses it by itself; else None.
        derived: the folded matrices that are kept here (with the first of their parts), by fold name.
        shape, dtype: of the float parameter.
    """

    own: Any
    derived: Any
    shape: tuple[int, ...]
    dtype: jnp.dtype

    def tree_flatten_with_keys(self):
        """Packed arrays as leaves, the rest static."""
        key = jax.tree_util.GetAttrKey
        return ((key("own"), self.own), (key("derived"), self.derived)), (self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux, children) -> FoldedParam:
        """Rebuilds from `tree_flatten_with_keys`."""
        return cls(*children, *aux)


def layer_index(layer: Int[Array, ""] | int, layers: int) -> Int[Array, ""]:
    """The layer that `lax.dynamic_index_in_dim` takes: a negative index counts from the end, and the nearest is taken.

    Args:
        layer: index of the layer.
        layers: how many there are.
    """
    layer = jnp.asarray(layer, jnp.int32)
    return jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)


def is_packed(value: object) -> bool:
    """Whether a leaf of a model's variables is packed; for `jax.tree` functions' `is_leaf`."""
    return isinstance(value, QTensor | FoldedParam)


@functools.lru_cache(maxsize=4096)
def packed_type(
    shape: tuple[int, ...], dtype: Any, spec: QuantSpec, layout: Layout, order: Literal["kn", "nk"] = "kn"
) -> QTensor:
    """What `quantize` gives for a parameter of this shape, as `jax.ShapeDtypeStruct`s."""
    # How scales are chosen says nothing about their shapes, and a search takes long to trace.
    quick = dataclasses.replace(spec, scale_rule=AbsMax())
    packed = jax.eval_shape(lambda w: quantize(w, quick, layout, order), jax.ShapeDtypeStruct(shape, dtype))
    return dataclasses.replace(packed, spec=spec)


def packed_nbytes(shape: tuple[int, ...], spec: QuantSpec, layout: Layout) -> int:
    """Bytes that a parameter of this shape takes when packed, from the shapes alone."""
    return packed_type(tuple(shape), jnp.dtype("float32"), spec, layout).nbytes


def pick_layer(w: QTensor, layer: Int[Array, ""] | int | None) -> QTensor:
    """One layer of a stacked QTensor, or all of it for None."""
    if layer is None:
        return w
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), w)
