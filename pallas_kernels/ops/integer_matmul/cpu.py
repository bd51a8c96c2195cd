"""`integer_matmul` on CPU: the same bits as `reference.matmul`, from the dots that XLA CPU is fast at.

XLA CPU has a fast kernel (YNNPACK) for int8 x int8 -> int32 from two rows of x on; with one row, or an operand of
another type, it widens both matrices to int32 first, which takes ten times as long. So every product here is such a
dot, with x filled up to two rows. A column sum, which the zero points of x need, is a product with one more row, of
ones: a reduction over int8 takes longer than the whole product. Integer sums are exact, so their order is free; the
float32 sum over groups is in the order of the reference. Chosen from the static shapes (measured by
scripts/bench/bench_integer.py, results in benchmarks/integer.md):

* small weights, and 8-bit ones that need not be picked from a stack: one dot on all of the codes, or one a group;
* larger ones are unpacked, or picked, block by block, so that codes stay in cache and the weight is never copied as a
  whole: blocks of whole groups along K in order "kn", else blocks of N;
* not the smallest, in order "kn", one row of x: no dot. The codes of a column are taken from their words in registers,
  multiplied and added up in int32, as in `ops.matmul.cpu`.

Order "nk" is the faster one for 8-bit codes with one scale a column, as the kernel likes to read the codes of a column
in a row. With groups it is "kn": there a group is a contiguous part of the weight, while in "nk" its rows are shorter
than a cache line. Packed words are "kn" too: one row of x then needs no dot, and formats of several planes are unpacked
by vector code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.numbers.stored_scales import Scales
from qjax.pallas_kernels.ops.integer_matmul.reference import rescale
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.ops.primitive import XLA_BLOCKS, XLA_CODES, XLA_NO_DOT
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index, pick_layer

# Codes of a block. At K = N = 4096, with half of them the start of a dot begins to show.
BLOCK_VALUES = 2**21

# A stack of small matrices is unpacked as a whole up to this many blocks, and matrix by matrix beyond.
_STACK_BLOCKS = 8

# Codes of a column that one step of the loop without a dot takes; the reasons are those of `ops.matmul.cpu`.
_CODES, _CODES_INT8, _MOST_CODES = 32, 8, 64

# The part of a block from which that loop is the faster one.
_LEAST_WITHOUT_DOT = 1 / 8


def matmul(
    x: Int8[Array, "*stack M K"],
    scale: Float[Array, "*stack M 1"],
    zero: Float[Array, "*stack M 1"] | None,
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    out_dtype: Any,
) -> Float[Array, "*stack M N"]:
    """What `reference.matmul` computes, bit for bit.

    Args:
        x, scale, zero, w, layer, out_dtype: as for `integer_matmul`.
    """
    *stack, m, k = x.shape
    group = w.group_size
    n, matrices = w.layout.n, math.prod(stack)
    if 0 in (*x.shape, n):
        return jnp.zeros((*stack, m, n), out_dtype)
    name, step = formulation(x, w, layer)
    if name == XLA_CODES:
        w = pick_layer(w, layer)
        scales = _plain(w)
        out = jnp.zeros((*stack, m, n), jnp.float32)
        out = _add_groups(out, _Rows.make(x, zero, scales, group), _unpack(w), scales, w.order, group)
        return rescale(out, scale, out_dtype)

    lead = w.words.shape[:-2]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), w)  # one axis in front of the matrices

    def one(x: Array, zero: Array | None, index: Any) -> Array:
        scales = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), flat.scales)
        matrix = _Matrix(flat, index, _plain(dataclasses.replace(flat, scales=scales)), group)
        if step is not None:
            return _without_dot(x, zero, matrix, step)
        return _by_blocks(_Rows.make(x, zero, matrix.scales, group), matrix)

    first: Any = 0
    if layer is not None:
        first = layer_index(layer, lead[0]) * matrices
    if stack:
        index = first + jnp.arange(matrices, dtype=jnp.int32)
        each = (x.reshape(-1, m, k), None if zero is None else zero.reshape(-1, m, 1), index)
        out = lax.map(lambda each: one(*each), each).reshape(*stack, m, n)
    else:
        out = one(x, zero, first)
    return rescale(out, scale, out_dtype)


def formulation(x: Any, w: QTensor, layer: Any) -> tuple[str, int | None]:
    """What a product runs as, from shapes alone, and the codes in a step of the loop without a dot.

    Args:
        x, w, layer: the operands or their types.
    """
    *stack, m, k = x.shape
    n, matrices = w.layout.n, math.prod(stack)
    if m == 1 and k * n > _LEAST_WITHOUT_DOT * BLOCK_VALUES and (w.spec.format.bits < 8 or not stack):
        step = _step_without_dot(w, w.group_size)
        if step is not None:
            return XLA_NO_DOT, step
    small = k * n <= BLOCK_VALUES and matrices * k * n <= _STACK_BLOCKS * BLOCK_VALUES
    return XLA_CODES if small or (w.spec.format.bits == 8 and layer is None) else XLA_BLOCKS, None


# --- Operands --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The activation as the dots take it.

    Attributes:
        m: rows of x.
        codes: int8 `(*stack, M or M + 1, K)`, those rows and perhaps one more: of ones where x has zero points, so that
            every dot gives the column sums of the weight too; of zeros where x is a single row.
        zero: int32 `(*stack, M, 1)`, or None.
        sums: int32 `(*stack, M, G)`, the sum of each group, where the weight has zero points; or None.
    """

    m: int
    codes: Any
    zero: Any
    sums: Any

    @staticmethod
    def make(x: Array, zero: Array | None, scales: Scales, group: int) -> _Rows:
        *stack, m, k = x.shape
        sums = None
        if scales.zero is not None:
            whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -k % group)])
            sums = jnp.sum(whole.reshape(*stack, m, -1, group), axis=-1, dtype=jnp.int32)
        if zero is not None:
            x = jnp.concatenate([x, jnp.ones((*stack, 1, k), x.dtype)], axis=-2)
            zero = zero.astype(jnp.int32)
        elif m == 1:
            x = jnp.concatenate([x, jnp.zeros_like(x)], axis=-2)
        return _Rows(m, x, zero, sums)

    def part(self, start: Any, size: int, group: int) -> _Rows:
        """The columns from `start`, where a group starts, `size` of them."""
        codes = lax.dynamic_slice_in_dim(self.codes, start, size, axis=-1)
        sums = self.sums
        if sums is not None:
            sums = lax.dynamic_slice_in_dim(sums, start // group, -(-size // group), axis=-1)
        return _Rows(self.m, codes, self.zero, sums)


def _plain(w: QTensor) -> Scales:
    """Scales in float32 and zero points in int32, in the order `(*stack, G, N)`."""
    scales = w.matrix_arrays()[1]
    zero = None if scales.zero is None else scales.zero.astype(jnp.int32)
    return Scales(stored_scales.resolve_scales(scales), zero)


def _unpack(w: QTensor) -> Int8[Array, "*stack _ _"]:
    """The codes in the order of the words: `(*stack, K, N)` or `(*stack, N, K)`."""
    bits, k = w.spec.format.bits, w.layout.k
    if bits == 8:
        return w.words
    if w.order == "kn":
        return packing.unpack(w.words, w.spec.format, k)
    # Along the last axis: bitcast to a narrow type, which XLA turns into vector code. What `packing.unpack` does,
    # transposed, is not vectorized in every program, and is then thirty times slower.
    codes, low = jnp.zeros((*w.words.shape[:-1], k), jnp.int8), 0
    for row, width in matmul_cpu.planes(w):
        rows = -(-k * width // packing.WORD_BITS)
        plane = lax.slice_in_dim(w.words, row, row + rows, axis=-1)
        signed = low + width == bits  # the topmost bits bring the sign
        if width > 1:
            narrow = lax.bitcast_convert_type(plane, jnp.dtype(f"{'int' if signed else 'uint'}{width}"))
            part = narrow.astype(jnp.int8)
        else:
            shape = (*plane.shape, packing.WORD_BITS)
            shifts = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
            part = (jnp.broadcast_to(plane[..., None], shape) >> shifts).astype(jnp.int8) & 1
            part = -part if signed else part
        part = part.reshape(*plane.shape[:-1], -1)
        codes |= lax.slice_in_dim(part, 0, k, axis=-1) << low
        low += width
    return codes


# --- Products --------------------------------------------------------------------------------------------------


def _dot(x: Int8[Array, "*stack M K"], codes: Int8[Array, "*stack _ _"], order: str) -> Int32[Array, "*stack M N"]:
    stack = tuple(range(x.ndim - 2))
    numbers = (((x.ndim - 1,), (x.ndim - (2 if order == "kn" else 1),)), (stack, stack))
    return lax.dot_general(x, codes, numbers, preferred_element_type=jnp.int32)


def _add_group(
    out: Float[Array, "*stack M N"], dot: Int32[Array, "*stack _ N"], rows: _Rows, scales: Scales, g: Any, size: int
) -> Float[Array, "*stack M N"]:
    """`out` plus the scaled sum of group g, whose `size` codes `dot` is the product of."""
    acc = dot[..., : rows.m, :]
    zero = None if scales.zero is None else lax.dynamic_slice_in_dim(scales.zero, g, 1, axis=-2)
    if rows.zero is not None:
        columns = dot[..., rows.m :, :]
        acc -= rows.zero * (columns if zero is None else columns - size * zero)
    if zero is not None:
        acc -= rows.sums * zero
    return out + finite(acc.astype(jnp.float32) * lax.dynamic_slice_in_dim(scales.values, g, 1, axis=-2))


def _add_groups(
    out: Float[Array, "*stack M N"],
    rows: _Rows,
    codes: Int8[Array, "*stack _ _"],
    scales: Scales,
    order: str,
    group: int,
) -> Float[Array, "*stack M N"]:
    """`out` plus the scaled sum of each group, in ascending order."""
    axis = codes.ndim - (2 if order == "kn" else 1)
    k = codes.shape[axis]

    def add(g: Any, out: Array, size: int) -> Array:
        part, block = rows, codes
        if size < k:
            part = rows.part(g * group, size, group)
            block = lax.dynamic_slice_in_dim(codes, g * group, size, axis=axis)
        dot = _dot(part.codes, block, order)
        return _add_group(out, dot, part, scales, g, size)

    whole = k // group
    if whole == 1:
        out = add(0, out, group)
    elif whole:
        out = lax.fori_loop(0, whole, lambda g, out: add(g, out, group), out)
    return add(whole, out, k % group) if k % group else out


# --- Blocks of a large weight ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Matrix `index` of `w`, whose arrays have one stack axis; `scales` are that matrix's, as `_plain` gives them."""

    w: QTensor
    index: Any
    scales: Scales
    group: int

    def rows(self, start: Any, size: int) -> QTensor:
        """Values `start` to `start + size` along K of every column, in order "kn", without scales.

        Both must be whole words.
        """
        parts = []
        for row, width in matmul_cpu.planes(self.w):
            first, count = row + start * width // packing.WORD_BITS, -(-size * width // packing.WORD_BITS)
            parts.append(self._slice((first, 0), (count, self.w.words.shape[2])))
        return self._tensor(jnp.concatenate(parts) if len(parts) > 1 else parts[0], size, self.w.layout.n)

    def columns(self, start: Any, size: int) -> QTensor:
        """Columns `start` to `start + size`, without scales."""
        words = self.w.words
        if self.w.order == "kn":
            words = self._slice((0, start), (words.shape[1], size))
        else:
            words = self._slice((start, 0), (size, words.shape[2]))
        return self._tensor(words, self.w.layout.k, size)

    def _slice(self, start: tuple[Any, Any], shape: tuple[int, int]) -> Array:
        return lax.dynamic_slice(self.w.words, (self.index, *start), (1, *shape))[0]

    def _tensor(self, words: Array, k: int, n: int) -> QTensor:
        return QTensor(words, None, self.w.spec, Layout((((k, "k"),), ((n, "n"),))), self.w.dtype, self.w.order)


def _word_values(w: QTensor) -> int:
    """Values along K that make whole words in every plane of the packed words."""
    return max(packing.WORD_BITS // width for _, width in matmul_cpu.planes(w))


def _pick(scales: Scales, start: Any, size: int, axis: int) -> Scales:
    """Some groups (axis 0) or columns (axis 1); one scale for all columns stays."""
    return jax.tree.map(
        lambda a: a if axis == 1 and a.shape[1] == 1 else lax.dynamic_slice_in_dim(a, start, size, axis), scales
    )


def _by_blocks(x: _Rows, matrix: _Matrix) -> Float[Array, "M N"]:
    w, group = matrix.w, matrix.group
    k, n = w.layout.k, w.layout.n
    out = jnp.zeros((x.m, n), jnp.float32)
    unit = math.lcm(group, _word_values(w))
    if w.order == "kn" and unit < k:
        total, size = k, max(1, BLOCK_VALUES // n // unit) * unit

        def add(i: Any, out: Array, count: int) -> Array:
            scales = _pick(matrix.scales, i * size // group, -(-count // group), 0)
            codes = _unpack(matrix.rows(i * size, count))
            return _add_groups(out, x.part(i * size, count, group), codes, scales, w.order, group)

    elif w.order == "kn" and group >= k:
        unit = _word_values(w)
        size = max(1, BLOCK_VALUES // n // unit) * unit

        def multiply(i: Any, dot: Array, count: int) -> Array:
            codes = _unpack(matrix.rows(i * size, count))
            return dot + _dot(lax.dynamic_slice_in_dim(x.codes, i * size, count, axis=-1), codes, w.order)

        dot = jnp.zeros((x.codes.shape[0], n), jnp.int32)
        dot = lax.fori_loop(0, k // size, lambda i, dot: multiply(i, dot, size), dot)
        dot = multiply(k // size, dot, k % size) if k % size else dot
        return _add_group(out, dot, x, matrix.scales, 0, k)

    else:
        total, size = n, max(1, BLOCK_VALUES // k)

        def add(i: Any, out: Array, count: int) -> Array:
            codes, scales = _unpack(matrix.columns(i * size, count)), _pick(matrix.scales, i * size, count, 1)
            part = _add_groups(jnp.zeros((x.m, count), jnp.float32), x, codes, scales, w.order, group)
            return lax.dynamic_update_slice_in_dim(out, part, i * size, axis=1)

    if total // size:
        out = lax.fori_loop(0, total // size, lambda i, out: add(i, out, size), out)
    return add(total // size, out, total % size) if total % size else out


# --- One row of x: no dot --------------------------------------------------------------------------------------


def _step_without_dot(w: QTensor, group: int) -> int | None:
    """Codes in a step of the loop without a dot: whole words that divide a group. None where nothing does."""
    if w.order != "kn":
        return None
    unit, most = _word_values(w), _CODES_INT8 if w.spec.format.bits == 8 else _CODES
    if group >= w.layout.k:
        return most
    steps = [step for step in range(unit, min(group, _MOST_CODES) + 1, unit) if group % step == 0]
    return max((step for step in steps if step <= most), default=min(steps, default=None))


def _without_dot(x: Int8[Array, "1 K"], zero: Array | None, matrix: _Matrix, step: int) -> Float[Array, "1 N"]:
    k, n, group, scales = matrix.w.layout.k, matrix.w.layout.n, matrix.group, matrix.scales
    row = x[0].astype(jnp.int32)
    if zero is not None:
        row = row - zero[0, 0].astype(jnp.int32)

    def sum_codes(start: Any, size: int) -> Int32[Array, " N"]:
        def fetch(start: Any) -> tuple[Array, Array]:
            return lax.dynamic_slice_in_dim(row, start, size), matrix.rows(start, size).words

        # XLA would fuse the dynamic slices into the arithmetic, which LLVM then does not vectorise. It does not fuse
        # across a conditional; this one always takes its first branch.
        part, words = lax.cond(start >= 0, fetch, lambda start: fetch(0), start)
        block = matrix._tensor(words, size, n)
        terms = [part[j] * matmul_cpu.code(block, j).astype(jnp.int32) for j in range(size)]
        return sum(terms[1:], start=terms[0])

    def add(g: Any, out: Array, size: int) -> Array:
        start, acc = jnp.asarray(g * group, jnp.int32), jnp.zeros((n,), jnp.int32)
        if size == step:
            acc = sum_codes(start, size)
        elif size >= step:
            acc = lax.fori_loop(0, size // step, lambda i, acc: acc + sum_codes(start + i * step, step), acc)
        if size % step:
            acc = acc + sum_codes(start + size // step * step, size % step)
        if scales.zero is not None:
            total = jnp.sum(lax.dynamic_slice_in_dim(row, start, size))
            acc -= total * lax.dynamic_index_in_dim(scales.zero, g, 0, keepdims=False)
        return out + finite(acc.astype(jnp.float32) * lax.dynamic_index_in_dim(scales.values, g, 0, keepdims=False))

    out = jnp.zeros((n,), jnp.float32)
    whole = k // group
    if whole == 1:
        out = add(0, out, group)
    elif whole:
        out = lax.fori_loop(0, whole, lambda g, out: add(g, out, group), out)
    return (add(whole, out, k % group) if k % group else out)[None]
