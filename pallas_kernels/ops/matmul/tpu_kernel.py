"""The TPU kernel of weight-only products: a tile of x times a tile of the weight, made from packed words.

    grid     (stack, M / bm, outer, inner)   tiles of what is produced, and along what is contracted, these in order
    x        (bm, inner)       a tile of x
    words    (rows, bn)        of a tile of the weight, a window for each plane (`tpu_tile`); `(bn, rows)` in order "nk"
    scales   (G, bn)           those of all groups of these columns; zero points too; float32 copies where rows of them
                               cannot be picked one by one
    sum      (bm, outer) f32   for each weight; after the last step what is made of them is written

**Where scales go.** Before the product, into every value of the tile: some four operations for a vector register of
weights. Or after it, into the sums over a group: two operations for a register of results of each group, which is
cheaper for few rows of x, and always for one scale over all of K. `default_blocks` chooses. The transposed product, and
one that must round weights on the way, have scales before.

**Bias.** On chips without bfloat16 arithmetic the conversion of codes takes most of the time. There those of 4 bits are
multiplied as `code + 136`, which their bits almost are (`tpu_tile.biased_codes`), and 136 times the sum of x is taken
off each sum over 128 of them. That costs some eight of the 24 bits of float32: twice as many as bfloat16 has remain.

**Codebooks.** Chips that gather bytes look up four values at a time (`tpu_tile.gathered_codes`). Their values are
rounded to bfloat16 wherever scales go, and come in another order along K, in which x then is too.

**Deep matrix units.** Where they are 256 deep, groups of 128 or fewer go through side by side, and tiles with few rows
of x are multiplied in parts of that depth.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.tpu_operands import Packed, Windows, finish_strips
from qjax.pallas_kernels.backends.tpu_tile import LANES, round_up
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.ops.matmul.tpu_product import Product
from qjax.pallas_kernels.ops.matmul.tpu_tiles import LATER, MOST_CUT, depth_of_unit


def call(
    product: Product,
    x: Float[Array, "B M _"],
    weights: Sequence[Packed],
    others: Sequence[Float[Array, "_ _ _"]],
    epilogue: Epilogue | None,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "B M _"]:
    """The product with each matrix of one layer of the stack.

    Args:
        product: what is computed.
        x, weights, others, epilogue: operands, and what is made of the products.
        out_dtype: of the result.
        interpret: as for `matmul`.
    """
    (inner, inner_tile), (outer, outer_tile), blocks = product.contracted, product.produced, product.blocks
    stack, m, _ = x.shape

    def at(b: Any, _: Any, o: Any, s: Any, layers: Any) -> tuple[Any, Any, Any, Any]:
        return (layers, b, *((o, s) if product.transpose else (s, o)))

    def window_of_result(a: Array) -> pl.BlockSpec:
        repeated = [size == 1 for size in a.shape]
        shape = (None, *(1 if one else size for one, size in zip(repeated[1:], (blocks.m, outer_tile), strict=True)))
        return pl.BlockSpec(
            shape,
            lambda b, i, o, s, layers: tuple(0 if one else at for one, at in zip(repeated, (b, i, o), strict=True)),
        )

    windows = Windows(product.windows, product.order, blocks.n, at)
    in_specs, scratch, operands = [], [], []
    for number, w in enumerate(weights):
        in_specs += [*windows.of_words(number), *windows.of_small(number, w)]
        scratch.append(pltpu.VMEM((blocks.m, outer_tile), jnp.float32))
        scratch += [pltpu.VMEM((part.rows, blocks.n), jnp.int32) for part in windows.words if product.rows_of_words]
        scratch += product.copies(w)
        operands += [*[w.words] * len(windows.words), *w.small]
    return pl.pallas_call(
        functools.partial(_kernel, product, product.copied(weights[0]), len(weights), epilogue),
        out_shape=jax.ShapeDtypeStruct((stack, m, outer), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(stack, pl.cdiv(m, blocks.m), pl.cdiv(outer, outer_tile), pl.cdiv(inner, inner_tile)),
            in_specs=[
                pl.BlockSpec((None, blocks.m, inner_tile), lambda b, i, o, s, layers: (b, i, s)),
                *in_specs,
                *map(window_of_result, others),
            ],
            out_specs=pl.BlockSpec((None, blocks.m, outer_tile), lambda b, i, o, s, layers: (b, i, o)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * stack * m * product.k * product.n * len(weights),
            bytes_accessed=x.nbytes
            + sum(w.words.nbytes // w.words.shape[0] for w in weights)
            + sum(a.nbytes for a in others)
            + stack * m * outer * out_dtype.itemsize,
            transcendentals=0,
        ),
        name="fused_matmul" if epilogue else "quantized_matmul",
        interpret=interpret,
    )(jnp.concatenate([w.layers for w in weights]), x, *operands, *others)


def _kernel(
    product: Product, copied: Sequence[bool], weights: int, epilogue: Epilogue | None, _: Any, x_ref: Any, *refs: Any
) -> None:
    """Adds the products of two tiles to their sums; after the last ones what is made of them is written.

    Args:
        product: what is computed.
        copied: which of scales and zero points have a float32 copy.
        weights: how many are multiplied.
        epilogue: what is made of the sums, if not the result itself.
        x_ref: a tile of x.
        refs: words, scales, zero points of each weight; other operands of the epilogue; the result; the sum, transposed
            words, and copies of each weight.
    """
    parts, others = len(product.windows), epilogue.others if epilogue else 0
    rest, turned = iter(refs), parts if product.rows_of_words else 0

    def take(count: int) -> list[Any]:
        return list(itertools.islice(rest, count))

    column, step = pl.program_id(2), pl.program_id(3)
    given = [take(parts + len(copied)) for _ in range(weights)]
    other_refs, (out_ref,) = take(others), take(1)
    scratch = [take(1 + turned + sum(copied)) for _ in range(weights)]
    sums = []
    for inputs, (sum_ref, *buffers) in zip(given, scratch, strict=True):
        scale = accumulate(product, copied, x_ref, inputs[:parts], inputs[parts:], sum_ref, buffers, step, column)
        sums.append((sum_ref, scale if product.blocks.scale == "after" and product.whole else None))

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _finish() -> None:
        if epilogue is None:
            ((sum_ref, scale),) = sums
            result = sum_ref[...]
            if scale is not None:
                result *= scale[...]
            out_ref[...] = result.astype(out_ref.dtype)
        else:
            finish_strips(epilogue, sums, other_refs, out_ref)


def accumulate(
    product: Product,
    copied: Sequence[bool],
    x_ref: Any,
    word_refs: Sequence[Any],
    small: Sequence[Any],
    sum_ref: Any,
    buffers: Sequence[Any],
    step: Any,
    column: Any,
) -> Any:
    """Adds the product of a tile of x and one of a weight to the sum; returns the scales in float32.

    Args:
        product, copied, x_ref: as for `_kernel`.
        word_refs, small: words; scales and zero points.
        sum_ref: the sum.
        buffers: for transposed words, and for copies.
    """
    blocks = product.blocks
    size, tile = product.contracted
    size = round_up(size, LANES) if product.moved else size  # as `ordered` pads x
    left = size - step * tile  # of the contracted axis, from this tile on
    copies = buffers

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    if product.rows_of_words:
        parts = product.windows
        turned, copies = buffers[: len(parts)], buffers[len(parts) :]

        def turn() -> None:
            for ref, target in zip(word_refs, turned, strict=True):
                target[...] = ref[...].T

        if product.transpose or all(part.step for part in parts):  # each step has other words
            turn()
        else:
            pl.when(step == 0)(turn)
        word_refs = turned

    def copy() -> None:
        for ref, target in zip(itertools.compress(small, copied), copies, strict=True):
            rows = jnp.broadcast_to(ref[...].astype(jnp.float32), target.shape)
            rows = _zero_from(left, rows, 1) if product.transpose and product.ragged else rows
            target[...] = _paired(rows) if product.paired else rows

    if product.transpose:  # each step has other columns of them
        copy()
    elif copies:
        pl.when(step == 0)(copy)
    targets = iter(copies)
    scales, *zeros = (next(targets) if one else ref for ref, one in zip(small, copied, strict=True))
    zero = zeros[0] if zeros else None

    x = x_ref[...]
    if product.ragged:
        x = _zero_from(left, x.astype(jnp.float32), 1)  # as in `_scaled_sums`
    x = x.astype(product.dtype)
    at = column if product.transpose else step
    if product.rows_of_codes:
        words = word_refs[0][...]
    else:
        words = tpu_tile.load(word_refs, product.spec.format, product.k, blocks.k, at)
    if blocks.scale == "before":
        weights = _weights(product, words, scales, zero, at, left)
        sum_ref[...] += _dot(x, weights, product, 1 if product.transpose else 0)
    else:
        sum_ref[...] += _scaled_sums(product, x, words, scales, zero, at, left)
    return scales


def _paired(rows: Float32[Array, "G N"]) -> Float32[Array, "G N"]:
    """For each value of bfloat16, a lane that `pltpu.bitcast` reads as two of them."""
    bits = pltpu.bitcast(rows, jnp.int32)
    return pltpu.bitcast(bits | lax.shift_right_logical(bits, jnp.int32(16)), jnp.float32)


def _zero_from(limit: Any, a: Array, axis: int) -> Array:
    """`a` with zeros from index `limit` of an axis on, whatever was there."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, axis) < limit, a, 0)


def _dot(x: Array, w: Array, product: Product, axis: int) -> Array:
    """Contracts the last axis of x with this one of w."""
    precision = lax.Precision.HIGHEST if product.dtype == jnp.float32 else lax.Precision.DEFAULT
    k = x.shape[1]
    depth = min(k, 2 * LANES) if tpu_chips.chip() in LATER and x.shape[0] <= MOST_CUT else k

    def part(i: int) -> Array:
        dimensions = (((1,), (axis,)), ((), ()))
        cut = (x[:, i : i + depth], lax.slice_in_dim(w, i, i + depth, axis=axis))
        return lax.dot_general(*cut, dimensions, precision=precision, preferred_element_type=jnp.float32)

    return functools.reduce(jnp.add, map(part, range(0, k, depth)))


def _groups(product: Product) -> tuple[int, int]:
    """How many groups a tile has (part of one counts), and how much of K it has of each."""
    size = product.blocks.k if product.whole else min(product.group, product.blocks.k)
    return product.blocks.k // size, size


def _row(ref: Any, product: Product, at: Any, g: int) -> Float[Array, "1 N"]:
    """What belongs to group g of tile `at` along K; in a tile that reaches beyond K, anything that is finite."""
    if ref.shape[0] == 1:
        return ref[...]
    count, size = _groups(product)
    first = at * count if product.group == size else lax.div(at, product.group // size)
    return ref[pl.ds(jnp.minimum(first + g, ref.shape[0] - 1), 1), :]


def _codes(product: Product, words: Array, dtype: Any, left: Any) -> Array:
    """Unscaled values, finite ones beyond the contracted axis: any bits are an integer or an entry of a codebook."""
    if product.spec.format.kind != "float" or not product.ragged:
        return tpu_tile.codes(words, product.spec.format, dtype)
    codes = tpu_tile.codes(words, product.spec.format, jnp.float32)
    return _zero_from(left, codes, int(product.transpose != product.rows_of_codes)).astype(dtype)


def _weights(product: Product, words: Array, scales: Any, zero: Any, at: Any, left: Any) -> Float[Array, "K N"]:
    """The tile of the weight."""
    count, size = _groups(product)
    gathered = product.codes == "gathered"
    # Groups within 128 codes that are not in order: each has a part of every fourth of them.
    turns = max(1, LANES // size) if gathered else 1

    def stretch(ref: Any) -> Array:
        rows = [_row(ref, product, at, g) for g in range(count)]
        if turns > 1:
            rows = [row for i in range(0, count, turns) for row in rows[i : i + turns] * 4]
        height = size // 4 if turns > 1 else size
        if product.paired:
            tall = [jnp.broadcast_to(row, (height // 2, row.shape[1])) for row in rows]
            return pltpu.bitcast(jnp.concatenate(tall), jnp.bfloat16)
        return jnp.concatenate([jnp.broadcast_to(row, (height, row.shape[1])) for row in rows]).astype(dtype)

    dtype = product.dtype if product.narrow else jnp.float32
    if gathered:
        values = tpu_tile.gathered_codes(words, product.spec.format).astype(dtype)
    else:
        values = _codes(product, words, dtype, left)
    if product.rows_of_codes:
        values = values.T
    if zero is not None:
        values -= stretch(zero)
    values *= stretch(scales)
    for narrower in product.rounding:
        values = values.astype(narrower)
    return values.astype(product.dtype)


def _scaled_sums(
    product: Product, x: Array, words: Array, scales: Any, zero: Any, at: Any, left: Any
) -> Float[Array, "M N"]:
    """Sums over each group, times its scale; with one scale for all of K, the sum without it.

    Groups shorter than the matrix unit is deep go through it side by side: x is repeated, each time with zeros outside
    of one of them. That multiplies rows of x, of which there are few, and each weight is loaded once.
    """
    count, size = _groups(product)
    rows = x.shape[0]
    beside = max(1, depth_of_unit(rows) // size)
    depth = beside * size
    height = tpu_tile.rows(product.spec.format, depth)
    total = jnp.zeros((rows, product.blocks.n), jnp.float32)
    if product.codes != "plain":
        x = tpu_tile.reordered(x)
    for i in range(count // beside):
        part = x[:, i * depth : (i + 1) * depth]
        if beside > 1:  # in float32, as Mosaic has no mask for the tiles of 4 rows of bfloat16
            part = part.astype(jnp.float32)
            column = lax.broadcasted_iota(jnp.int32, part.shape, 1)
            column = column if product.codes == "plain" else tpu_tile.origin(column)
            group = lax.div(column, jnp.int32(size))  # // asks for the TPU
            part = jnp.concatenate([jnp.where(group == g, part, 0) for g in range(beside)]).astype(product.dtype)
        packed = slice(i * height, (i + 1) * height)
        packed = words[:, packed] if product.rows_of_codes else words[packed]
        if product.codes == "biased":
            sums = _sums_of_biased(part, packed)
        elif product.codes == "gathered":
            sums = _dot(part, tpu_tile.gathered_codes(packed, product.spec.format), product, 0)
        else:
            codes = _codes(product, packed, product.dtype, left - i * depth)
            sums = _dot(part, codes, product, 1 if product.rows_of_codes else 0)
        if zero is not None:
            shift = jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True)
        for g in range(beside):
            own = slice(g * rows, (g + 1) * rows)
            of_group = sums[own]
            if zero is not None:
                of_group -= shift[own] * _row(zero, product, at, i * beside + g)
            total += of_group if product.whole else of_group * _row(scales, product, at, i * beside + g)
    return total


def _sums_of_biased(x: Array, words: Array) -> Float[Array, "M N"]:
    """`x @ codes` by way of `tpu_tile.biased_codes`; the bias is taken off before sums grow and lose digits to it."""
    height = LANES // 8
    total = jnp.zeros((x.shape[0], words.shape[1]), jnp.float32)
    for i in range(x.shape[1] // LANES):
        part = x[:, i * LANES : (i + 1) * LANES]
        codes = tpu_tile.biased_codes(words[i * height : (i + 1) * height])
        sums = jnp.dot(part, codes, preferred_element_type=jnp.float32)
        total += sums - tpu_tile.BIAS * jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True)
    return total
