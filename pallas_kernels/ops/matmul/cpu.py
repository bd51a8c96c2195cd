"""`quantized_matmul` on CPU: block by block, so that the float weight never exists as a whole.

A float copy of a large weight inside a compiled program costs more than the product: its buffer is new memory in
every call, and the page faults of 64 MiB take ten times as long as reading them. A loop over blocks reuses one buffer
that stays in cache. Three formulations, chosen from the static shapes (measured by scripts/bench/bench_overhead.py,
results in benchmarks/overhead.md):

* a matrix of one block: dequantize it, one dot, which is `reference.matmul`;
* larger: a loop over blocks of stored rows, each dequantized by the one definition and multiplied by a dot;
* larger, one row of x, integers: no dot. The codes of a column are taken from their words in registers, multiplied
  and added up, and the sum of a group is scaled once. About twice as fast again, as the weight is never float in
  memory at all.

The sums are float32 in another order than the reference has. A layer is not sliced out of its stack: each block is
read from the whole stack.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.ops.primitive import XLA, XLA_BLOCKS, XLA_NO_DOT
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index

# Values of one block: 4 MiB of float32. At K = N = 4096, half of it is a tenth slower from 128 rows of x on, and twice
# gains nothing below 512; a matrix of just one block is about as fast either way.
BLOCK_VALUES = 2**20

# Codes of a column that one step of the loop without a dot takes, 8 of them for 8-bit formats: rows lie a power of two
# apart and share one set of an 8-way cache, and with 16 rows of int8 the loop is a fifth to a half slower. All are
# unrolled, which is compile time; groups that need more than `_MOST_CODES` in a step go to the other loop.
_CODES = 32

_MOST_CODES = 64


def matmul(
    x: Float[Array, "*stack M _"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
) -> Float[Array, "*stack M _"]:
    """What `reference.matmul` computes, up to the order of the sum; arguments as there."""
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    chosen = formulation(x, w, casts, out_dtype, transpose)
    size, step = chosen.size, chosen.step
    if size is None:
        return reference.matmul(
            x,
            w,
            layer=layer,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
            transpose=transpose,
        )

    stack, lead = x.shape[:-2], w.words.shape[:-2]
    whole = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), w)  # one axis in front of the matrices

    def one(x: Array, index: Any) -> Array:
        scales = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), whole.scales)
        matrix = _Matrix(whole, index, stored_scales.plain_scales(scales))
        if step is not None:
            return _without_dot(x, matrix, step).astype(out_dtype)
        return _by_blocks(x, matrix, size, casts, precision, out_dtype, transpose)

    first: Any = 0
    if layer is not None:
        first = layer_index(layer, lead[0]) * math.prod(stack)
    if not stack:
        return one(x, first)
    flat = x.reshape(-1, *x.shape[-2:])
    out = lax.map(lambda each: one(*each), (flat, first + jnp.arange(math.prod(stack), dtype=jnp.int32)))
    return out.reshape(*stack, *out.shape[1:])


@dataclasses.dataclass(frozen=True)
class Formulation:
    """Which of the three computes a product.

    Attributes:
        name: what the product runs as.
        size: stored rows of a block, in values; None for the reference.
        step: codes in a step of the loop without a dot, or None.
    """

    name: str
    size: int | None = None
    step: int | None = None


def formulation(x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, transpose: bool) -> Formulation:
    """The one that serves, from shapes and dtypes alone.

    Args:
        x, w: the operands or their types.
        casts, transpose: as for `matmul`.
        out_dtype: of the result.
    """
    size = _block_size(w, BLOCK_VALUES // max(1, w.layout.n if w.order == "kn" else w.layout.k))
    float32_holds_sums = out_dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    if w.layout.k * w.layout.n <= BLOCK_VALUES or size is None or not float32_holds_sums:
        return Formulation(XLA)
    step = _step_without_dot(x, w, casts, out_dtype, transpose)
    return Formulation(XLA_BLOCKS if step is None else XLA_NO_DOT, size, step)


# --- Blocks ----------------------------------------------------------------------------------------------------


def planes(w: QTensor) -> list[tuple[int, int]]:
    """First row and bits of a field for each plane of a column's packed words; an 8-bit code counts as a word."""
    found, row = [], 0
    for width in packing.PLANES.get(w.spec.format.bits, (packing.WORD_BITS,)):
        found.append((row, width))
        row += -(-w.layout.k * width // packing.WORD_BITS)
    return found


def _block_size(w: QTensor, target: int) -> int | None:
    """Stored rows of a block, in values: near `target`, cutting no word, and no group unless into equal parts.

    None where no such size is smaller than the whole.
    """
    if w.order == "nk":
        size = max(1, target)
        # the blocks of double quantization run along (N, G): its scales have no plain form in this order
        return size if size < w.layout.n and not w.spec.double_quant else None
    k, group = w.layout.k, w.group_size
    unit = max(packing.WORD_BITS // width for _, width in planes(w))
    if group < k:
        parts = [size for size in range(unit, min(target, group) + 1, unit) if group % size == 0]
        if group >= target and parts:
            return parts[-1]
        unit = math.lcm(unit, group)
    size = max(1, target // unit) * unit
    return size if size < k else None


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Matrix `index` of `w`, whose arrays have one stack axis; `scales` are that matrix's, as plain numbers."""

    w: QTensor
    index: Any
    scales: stored_scales.Scales

    def block(self, i: Any, size: int, rows: int) -> QTensor:
        """The stored rows from `i * size` on, `rows` of them (the last block may be short), as a QTensor."""
        w, k, n = self.w, self.w.layout.k, self.w.layout.n
        if w.order == "nk":
            words, n = self._words(i * size, rows), rows
            first, count = i * size, rows
        else:
            parts = [
                self._words(row + i * (size * width // packing.WORD_BITS), -(-rows * width // packing.WORD_BITS))
                for row, width in planes(w)
            ]
            words, k = jnp.concatenate(parts) if len(parts) > 1 else parts[0], rows
            first, count = i * size // w.group_size, -(-rows // w.group_size)
        scales = jax.tree.map(
            lambda a: a if a.shape[0] == 1 else lax.dynamic_slice_in_dim(a, first, count, axis=0), self.scales
        )
        return QTensor(words, scales, w.spec, Layout((((k, "k"),), ((n, "n"),))), w.dtype, w.order)

    def _words(self, row: Any, rows: int) -> Array:
        words = self.w.words
        return lax.dynamic_slice(words, (self.index, row, 0), (1, rows, words.shape[2]))[0]


def _by_blocks(
    x: Float[Array, "M _"],
    matrix: _Matrix,
    size: int,
    casts: tuple[Any, ...],
    precision: Any,
    out_dtype: Any,
    transpose: bool,
) -> Float[Array, "M _"]:
    """Blocks of the contracted axis add up; blocks of the other one are parts of the result."""
    w = matrix.w
    contracted = (w.order == "kn") != transpose
    total = w.layout.k if w.order == "kn" else w.layout.n

    def add(i: Any, out: Array, rows: int = size) -> Array:
        m = reference.weight_matrix(matrix.block(i, size, rows), casts)
        part = lax.dynamic_slice_in_dim(x, i * size, rows, axis=1) if contracted else x
        numbers = (((1,), (1 if transpose else 0,)), ((), ()))
        part = lax.dot_general(part, m, numbers, precision=precision, preferred_element_type=jnp.float32)
        return out + part if contracted else lax.dynamic_update_slice_in_dim(out, part, i * size, axis=1)

    out = jnp.zeros((x.shape[0], w.layout.k if transpose else w.layout.n), jnp.float32)
    out = lax.fori_loop(0, total // size, add, out)
    if rest := total % size:
        out = add(total // size, out, rest)
    return out.astype(out_dtype)


# --- One row of x, integers: no dot ---------------------------------------------------------------------------------


def _step_without_dot(x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, transpose: bool) -> int | None:
    """Codes in a step of the loop without a dot, or None where that formulation does not serve.

    It scales after the sum, so a weight is never rounded to a narrower dtype as the reference rounds it. That is a
    smaller error than rounding the result to `out_dtype`, or else another formulation has to do it.
    """
    if x.shape[-2] != 1 or w.spec.format.kind != "int" or w.order != "kn" or transpose:
        return None
    if any(jnp.finfo(dtype).eps > jnp.finfo(out_dtype).eps for dtype in (w.dtype, *casts)):
        return None
    step = _block_size(w, 8 if w.spec.format.bits == 8 else _CODES)
    return None if step is None or step > _MOST_CODES else step


def _without_dot(x: Float[Array, "1 K"], matrix: _Matrix, step: int) -> Float[Array, "1 N"]:
    w = matrix.w
    row = x[0].astype(jnp.float32)

    def fetch(i: Any, rows: int = step) -> tuple[Array, QTensor]:
        return lax.dynamic_slice_in_dim(row, i * step, rows), matrix.block(i, step, rows)

    def add(i: Any, out: Array) -> Array:
        # XLA would fuse the dynamic slices into the arithmetic, which LLVM then does not vectorise (six times
        # slower). It does not fuse across a conditional; this one always takes its first branch.
        return out + _multiply_and_add(*lax.cond(i >= 0, fetch, lambda i: fetch(0), i))

    out = lax.fori_loop(0, w.layout.k // step, add, jnp.zeros((w.layout.n,), jnp.float32))
    if rest := w.layout.k % step:
        out = out + _multiply_and_add(*fetch(w.layout.k // step, rest))
    return out[None]


def _multiply_and_add(x: Float[Array, " K"], w: QTensor) -> Float[Array, " N"]:
    """`x @ w` spelled out, code by code: elementwise along N, one fused loop."""
    scales, zero = stored_scales.resolve_scales(w.scales), w.scales.zero
    k, group = w.layout.k, w.group_size
    out = jnp.zeros((w.layout.n,), jnp.float32)
    for g, start in enumerate(range(0, k, group)):
        terms = []
        for j in range(start, min(start + group, k)):
            value = code(w, j).astype(jnp.float32)
            terms.append(x[j] * (value if zero is None else value - zero[g].astype(jnp.float32)))
        out = out + sum(terms[1:], start=terms[0]) * scales[g]
    return out


def code(w: QTensor, j: int) -> Int[Array, " N"]:
    """Code j of every column, as `packing.unpack` gives it: two shifts of its word, without int8 in between."""
    bits = w.spec.format.bits
    if bits == 8:
        return w.words[j]
    value, low = jnp.zeros((w.layout.n,), jnp.int32), 0
    for row, width in planes(w):
        per_word = packing.WORD_BITS // width
        word = w.words[row + j // per_word] << (packing.WORD_BITS - width * (1 + j % per_word))
        last = low + width == bits  # the topmost bits bring the sign down with them
        shift = lax.shift_right_arithmetic if last else lax.shift_right_logical
        value |= shift(word, jnp.int32(packing.WORD_BITS - width)) << low
        low += width
    return value
