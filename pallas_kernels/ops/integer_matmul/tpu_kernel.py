"""The TPU kernel of integer products: sums of codes in int32, scaled and added up group by group.

    grid    (stack, M / bm, N / bn, K / bk)   the last in order, the others in any
    x       (bm, bk) int8     a tile of the codes of x
    words   (rows, bn)        a tile of the packed weight, a window for each plane (`tpu_tile`); unpacked to int8
    scales  (G, bn)           those of all groups of these columns; held while the tiles along K go by
    acc     (bm, bn) int32    a sum that takes several tiles
    total   (bm, bn) float32  the sum over groups

Dots of int8 add up in int32, which is exact, so tiles may be any. A group is converted to float32 once and the groups
are added in ascending order, as in the reference; the clamp of `exact.finite` stands between product and addition, so
no compiler can fuse the two into one rounding.

Everything that adds up codes is in that one dot, because the vector unit would have to widen them to int32 first:

* Zero points of x need the sum of each column of the weight: a row of ones under the rows of x, in the padding of M to
  32 rows where there is some. Zero points of the weight need the sum of each row of x: columns of ones beside the
  weight, one register wide, so that each sum arrives in all lanes.
* Groups of less than 128 values are narrower than the matrix unit. The tile of x is stacked on itself, each copy zero
  outside one of the groups: a single dot gives their sums apart.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Int32

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.tpu_operands import Packed, Windows, finish_strips
from qjax.pallas_kernels.backends.tpu_tile import LANES
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.numbers.packing import PLANES
from qjax.pallas_kernels.ops.integer_matmul.reference import rescale
from qjax.pallas_kernels.ops.integer_matmul.tpu_product import Product
from qjax.pallas_kernels.ops.integer_matmul.tpu_tiles import ROWS

_BYTES = 4  # int8 in a lane of a register


def call(
    product: Product,
    x: Activation,
    weights: Sequence[Packed],
    others: Sequence[Float[Array, "_ _ _"]],
    n: int,
    out_dtype: Any,
    interpret: bool,
) -> Array:
    """What the epilogue makes of the products with each matrix of one layer, or the only product: `(B, M, N)`.

    Args:
        product: what is computed.
        x: codes `(B, M, K)`, with scales and zero points of each row.
        weights, others: operands.
        n: columns of the result.
        out_dtype: of the result, one that the kernel writes.
        interpret: as for `matmul`.
    """
    size, (matrices, m, k) = product.blocks, x.codes.shape
    operands, specs = [x.codes], [pl.BlockSpec((None, size.m, size.k), lambda s, i, j, t, layers: (s, i, t))]
    for a in (x.scale, x.zero):
        if a is not None:  # along the lanes: as a column, each number would fill a register
            operands.append(a.reshape(-1, 1, m))
            specs.append(pl.BlockSpec((None, 1, min(size.m, m)), lambda s, i, j, t, layers: (s, 0, i)))
    windows = Windows(product.windows, product.order, size.n, lambda s, i, j, t, layers: (layers, s, t, j))
    for number, w in enumerate(weights):
        operands += [*w.small, *[w.words] * len(windows.words)]
        specs += [*windows.of_small(number, w), *windows.of_words(number)]

    def window_of_other(a: Array) -> pl.BlockSpec:
        once = [length == 1 for length in a.shape]
        return pl.BlockSpec(
            (None, 1 if once[1] else product.stored, 1 if once[2] else size.n),
            lambda s, i, j, t, layers: tuple(0 if o else at for o, at in zip(once, (s, i, j), strict=True)),
        )

    return pl.pallas_call(
        functools.partial(_kernel, product),
        out_shape=jax.ShapeDtypeStruct((matrices, m, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(matrices, pl.cdiv(m, size.m), pl.cdiv(n, size.n), product.steps),
            in_specs=[*specs, *map(window_of_other, others)],
            out_specs=pl.BlockSpec((None, product.stored, size.n), lambda s, i, j, t, layers: (s, i, j)),
            scratch_shapes=[
                *([pltpu.VMEM((product.stored, 1), jnp.int32)] if product.zero else []),
                *list(product.scratch().values()) * len(weights),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * matrices * m * k * n * len(weights),
            bytes_accessed=x.codes.size
            + matrices * k * n * product.format.bits // 8 * len(weights)
            + sum(a.nbytes for a in others)
            + matrices * m * n * 4,
            transcendentals=0,
        ),
        interpret=interpret,
        name="fused_integer_matmul" if product.epilogue else "integer_matmul",
    )(jnp.concatenate([w.layers for w in weights]), *operands, *others)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight in the kernel.

    Attributes:
        product: what is computed.
        columns: references to scales and zero points, by the names of `Product.scratch`.
        words: references to the windows of its words.
        kept: what is kept of it, by name.
        zero: reference to the zero points of x as a column, or None.
    """

    product: Product
    columns: dict[str, Any]
    words: list[Any]
    kept: dict[str, Any]
    zero: Any

    def begin(self) -> None:
        """Before the first tile along K."""
        for name, ref in self.columns.items():
            if name in self.kept:  # rows of narrow types cannot be picked one by one
                self.kept[name][...] = ref[...].astype(self.kept[name].dtype)
        for name in ("total", "acc") if self.product.groups > 1 else ("acc",):
            if name in self.kept:
                self.kept[name][...] = jnp.zeros_like(self.kept[name])

    def of_group(self, name: str, g: Any) -> Array:
        """Row g of a scale array, as a number."""
        product, kept = self.product, self.kept
        if name not in kept:
            return self.columns[name][...].astype(jnp.int32 if name == "weight_zero" else jnp.float32)
        if product.steps * product.blocks.k <= product.groups * product.group:
            return kept[name][pl.ds(g, 1), :]
        # the last tile reaches beyond the last group
        return jnp.where(g < product.groups, kept[name][pl.ds(jnp.minimum(g, product.groups - 1), 1), :], 0)

    def scaled(self, acc: Int32[Array, "_ _"], g: Any) -> Float[Array, "_ bn"]:
        """The sums of group g, zero points taken out, times the scales of the weight."""
        product, rows, bn = self.product, self.product.stored, self.product.blocks.n
        sums, of_columns = acc[:rows, :bn], acc[product.ones : product.ones + 1, :bn]
        weight_zero = self.of_group("weight_zero", g) if product.weight_zero else None
        if self.zero is not None:
            if weight_zero is not None:
                of_columns -= jnp.clip(product.k - g * product.group, 0, product.group) * weight_zero
            sums -= self.zero[...] * of_columns
        if weight_zero is not None:
            of_rows = jnp.concatenate([acc[:rows, bn:]] * (bn // LANES), axis=1)
            sums -= of_rows * weight_zero
        return finite(sums.astype(jnp.float32) * self.of_group("values", g))

    def add_groups(self, rows: Int8[Array, "_ _"], step: Any, i: Any) -> None:
        """Adds the groups of part i of a tile along K to the total."""
        product, part = self.product, self.product.part
        first = step * (product.blocks.k // product.group) + i * (part // product.group)
        for p, acc in enumerate(_groups(product, rows, _weight(product, self.words, step, i, part))):
            self.kept["total"][...] += self.scaled(acc, first + p)

    def add(self, rows: Int8[Array, "_ _"], step: Any) -> Int32[Array, "_ _"]:
        """The sum of a group, or of what of it this tile is the end of; adds it to the total where it is complete."""
        product, kept, deep = self.product, self.kept, self.product.blocks.k
        acc = _dot(product, rows, _weight(product, self.words, step, 0, deep))
        if "acc" in kept:
            acc += kept["acc"][...]
            kept["acc"][...] = acc
        if product.groups > 1:
            tiles = product.group // deep

            @pl.when((step == product.steps - 1) | (lax.rem(step + 1, tiles) == 0))
            def _() -> None:
                kept["total"][...] += self.scaled(kept["acc"][...], lax.div(step, tiles))
                kept["acc"][...] = jnp.zeros_like(kept["acc"])

        return acc


def _kernel(product: Product, first: Any, x: Any, scale: Any, *refs: Any) -> None:
    """One tile along K; the last one stores the result.

    Args:
        product: what is computed.
        first: indices of matrices, which index maps read.
        x, scale: tiles of the codes of x and of their scales.
        refs: zero points of x, where there are some; scales, zero points and words of each weight; other operands of
            the epilogue; the result; zero points of x as a column, and what is kept of each weight.
    """
    rest = iter(refs)

    def take(count: int) -> list[Any]:
        return list(itertools.islice(rest, count))

    step, deep, names = pl.program_id(3), product.blocks.k, list(product.scratch())
    zero = take(1)[0] if product.zero else None
    given = [take(product.arrays) for _ in range(product.weights)]
    others, (out,) = take(product.epilogue.others if product.epilogue else 0), take(1)
    column: Any = take(1)[0] if product.zero else None
    weights, small = [], 2 if product.weight_zero else 1
    for arrays in given:
        columns: dict[str, Any] = dict(zip(("values", "weight_zero"), arrays[:small], strict=False))
        kept = dict(zip(names, take(len(names)), strict=True))
        weights.append(_Weight(product, columns, arrays[small:], kept, column))

    @pl.when(step == 0)
    def _() -> None:
        if zero is not None:
            column[...] = _column(zero[...], product.stored).astype(jnp.int32)
        for weight in weights:
            weight.begin()

    sums = [None] * len(weights)
    if product.groups > 1 and product.group <= deep:

        def add(i: Any, _: None) -> None:
            tile = _rows(product, x, step, i, product.part)
            for weight in weights:
                weight.add_groups(tile, step, i)

        lax.fori_loop(0, deep // product.part, add, None)
    else:
        tile = _rows(product, x, step, 0, deep)
        sums = [weight.add(tile, step) for weight in weights]

    @pl.when(step == product.steps - 1)
    def _() -> None:
        scales = _column(scale[...], product.stored)
        for weight, acc in zip(weights, sums, strict=True):
            kept = weight.kept
            if product.groups > 1:
                total = kept["total"][...]
            else:
                total = weight.scaled(kept["acc"][...] if "acc" in kept else acc, 0)
            target = out if product.epilogue is None else kept["total"]
            target[...] = rescale(total, scales, target.dtype)
        if product.epilogue is not None:
            finish_strips(product.epilogue, [(weight.kept["total"], None) for weight in weights], others, out)


def _column(row: Float[Array, "1 M"], rows: int) -> Float[Array, "{rows} 1"]:
    """The numbers of a row one below the other."""
    parts = []
    for start in range(0, rows, LANES):
        part = row[:, start : start + LANES]
        square = (min(rows - start, LANES), part.shape[1])
        diagonal = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(jnp.int32, square, 1)
        parts.append(jnp.sum(jnp.where(diagonal, part, 0), axis=1, keepdims=True))
    return jnp.concatenate(parts)


def _rows(product: Product, x: Any, step: Any, i: Any, size: int) -> Int8[Array, "_ {size}"]:
    """Part i of the tile of x, `size` wide: zeros beyond K, and a row of ones where x has zero points."""
    words = pltpu.bitcast(_window(x, i, size, 1)[...], jnp.int32)  # row r holds rows 4r .. 4r+3: int8 has no selects
    if product.rows > product.blocks.m:
        words = jnp.concatenate([words, jnp.full((ROWS // _BYTES, size), 0x01010101, jnp.int32)], axis=0)
    elif product.zero:
        row, shift = product.ones // _BYTES, product.ones % _BYTES * 8
        ones = words & (1 << shift) - 1 | 1 << shift  # the rows above are padding
        words = jnp.where(lax.broadcasted_iota(jnp.int32, words.shape, 0) == row, ones, words)
    if product.k % product.blocks.k:
        lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
        words = jnp.where(lane < product.k - step * product.blocks.k - i * size, words, 0)
    return pltpu.bitcast(words, jnp.int8)


def _weight(product: Product, refs: list[Any], step: Any, i: Any, size: int) -> Int8[Array, "_ _"]:
    """The codes of part i of the tile, `(size, bn)` or, in order "nk", `(bn, size)`."""
    if product.order == "nk":
        return _window(refs[0], i, size, 1)[...]
    deep, format = product.blocks.k, product.format
    if len(refs) < len(PLANES.get(format.bits, (8,))):  # one window of all rows of all planes
        planes = tpu_tile.load(refs, format, product.k, size, step * (deep // size) + i)
    else:
        parts = [_window(ref, i, ref.shape[0] * size // deep, 0) for ref in refs]
        planes = tpu_tile.load(parts, format, product.k, size, 0)
    return tpu_tile.codes(planes, format, jnp.int8)


def _window(ref: Any, i: Any, size: int, axis: int) -> Any:
    """Part i of the rows (axis 0) or of the columns of a tile, `size` of them."""
    part = pl.ds(pl.multiple_of(i * size, size), size)
    return ref.at[part, :] if axis == 0 else ref.at[:, part]


def _dot(product: Product, x: Int8[Array, "_ K"], weight: Int8[Array, "_ _"]) -> Int32[Array, "_ _"]:
    """Sums over K; beside them those of the rows of x, where the weight has zero points."""
    n_axis = 1 if product.order == "kn" else 0
    if product.weight_zero:
        shape = (x.shape[1], LANES) if product.order == "kn" else (LANES, x.shape[1])
        weight = jnp.concatenate([weight, jnp.ones(shape, jnp.int8)], axis=n_axis)
    numbers = (((1,), (1 - n_axis,)), ((), ()))
    return lax.dot_general(x, weight, numbers, preferred_element_type=jnp.int32)


def _groups(product: Product, x: Int8[Array, "_ bk"], weight: Int8[Array, "bk bn"]) -> Iterator[Int32[Array, "_ _"]]:
    """The sums of each group of the tile."""
    group, deep = product.group, x.shape[1]
    if group % LANES == 0:
        for k in range(0, deep, group):
            yield _dot(product, x[:, k : k + group], weight[k : k + group])
        return
    words = pltpu.bitcast(x, jnp.int32)
    lane = lax.broadcasted_iota(jnp.int32, (words.shape[0], LANES), 1)
    for k in range(0, deep, LANES):
        part = words[:, k : k + LANES]
        copies = [jnp.where((first <= lane) & (lane < first + group), part, 0) for first in range(0, LANES, group)]
        dot = _dot(product, pltpu.bitcast(jnp.concatenate(copies), jnp.int8), weight[k : k + LANES])
        for row in range(0, dot.shape[0], product.rows):
            yield dot[row : row + product.rows]
