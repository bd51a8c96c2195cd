"""`integer_matmul` on TPU: the same bits as `integer_matmul.matmul_reference`, as one Pallas kernel.

    grid    (stack, M / bm, N / bn, K / bk)   the last in order, the others in any
    x       (bm, bk) int8     a tile of the codes of x
    words   (rows, bn)        a tile of the packed weight, a window for each plane (`tile_tpu`); unpacked to int8
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

Products of one x with two weights that are packed alike share its tiles, and what a program does with the results
(`pallas_kernels.backends.epilogue`) is done to scaled sums, a strip of rows at a time: codes of x come in, and codes of
the next product's x may go out.

No array is copied before the kernel, but scales that it cannot read: float16 and double-quantized ones. A stack axis is
a grid axis, and `layer` a prefetched scalar that index maps add, so no matrix is sliced out of a stack. What lies
beyond the edge of an array is undefined there: x is set to 0, so that the weight does not count, and scales are; rows
and columns of the result are not stored.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8, Int32

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.tpu_operands import STRIP, Beside, finish_strips
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES, SUBLANES
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.numbers.packing import PLANES
from qjax.pallas_kernels.ops.integer_matmul.reference import rescale
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index

# Rows of int8 in a register, and int8 in a lane of it.
_ROWS, _BYTES = 32, 4

# Groups are multiples of LANES or divide it down to this: x is stacked 8 times.
_LEAST_GROUP = 16

# Rows of sums of groups that one pass of the loop over a tile makes: more would be longer code, and no faster.
_SUMS = 512

# What tiles may take of VMEM: every chip gives a kernel 16 MiB.
_VMEM = 12 * 2**20

_ALONE = Beside()

# --- Tiles -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the tiles.

    `m` is a multiple of 32 (where M takes several tiles, of 128), `n` of 128, `k` of 256; `k` divides a group or holds
    whole ones.
    """

    m: int
    n: int
    k: int


def default_blocks(m: int, w: QTensor, beside: Beside = _ALONE) -> Blocks:
    """Tiles for `m` rows of x: those that `chips/tpu.json` has for this chip, cut to the matrix, or chosen by size.

    With few rows the time goes to reading the weight, and tiles are deep. With many, the larger the tile of the result
    the fewer times anything is read.

    Args:
        m: rows of x.
        w: the weight.
        beside: what else is in the kernel.
    """
    k, n = w.layout.k, w.layout.n
    bm = _up(m, _ROWS) if m <= 512 else _up(pl.cdiv(m, pl.cdiv(m, 512)), LANES)
    entry = tpu_chips.lookup("integer_matmul", min(m, bm), k, w.spec, w.order, jnp.int8)
    most_n, most_k = (entry.n, entry.k) if entry else (512, 4096 if m <= 64 else 1024)
    chosen = Blocks(bm, min(_up(n, LANES), most_n), _depth(k, w.group_size, most_k))
    while not fits(chosen, w, beside) and max(chosen.m, chosen.n) > LANES:
        if chosen.n > LANES and chosen.n >= chosen.m:
            chosen = dataclasses.replace(chosen, n=_up(chosen.n // 2, LANES))
        else:
            chosen = dataclasses.replace(chosen, m=_up(chosen.m // 2, LANES))
    return chosen


def fits(blocks: Blocks, w: QTensor, beside: Beside = _ALONE) -> bool:
    """Whether a kernel with such tiles has enough VMEM, by an estimate."""
    return _vmem_bytes(blocks, w, beside) <= _VMEM


def _depth(k: int, group: int, most: int) -> int:
    """Values of a tile along K, about `most`."""
    unit = math.lcm(group, K_MULTIPLE) if group < k else K_MULTIPLE
    if unit > most and group % K_MULTIPLE == 0:  # part of a group
        return max(size for size in range(K_MULTIPLE, most + 1, K_MULTIPLE) if group % size == 0)
    tiles = pl.cdiv(k, max(1, most // unit) * unit)
    return _up(pl.cdiv(k, tiles), unit)


def _vmem_bytes(blocks: Blocks, w: QTensor, beside: Beside) -> int:
    """What windows (twice, as the next is read meanwhile), scratch and the largest values take."""
    m, n, k = blocks.m + _ROWS, blocks.n + LANES, blocks.k
    rows = k if w.order == "nk" else sum(part.rows for part in tpu_tile.windows(w.spec.format, w.layout.k, k))
    words = rows * n * (1 if w.spec.format.bits == 8 else 4)
    groups = pl.cdiv(w.layout.k, w.group_size)
    copies = max(1, LANES // w.group_size) if groups > 1 else 1
    others = sum((m if rows else SUBLANES) * (n if columns else LANES) * 4 for rows, columns in beside.others)
    windows = 2 * (m * k + beside.weights * (words + 6 * groups * n) + others + 4 * m * n)
    held = beside.weights * (8 * groups * n + 2 * 4 * m * n)
    return windows + held + k * n + copies * m * LANES + copies * 4 * m * n


def _up(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def unsupported(shape: tuple[int, ...], w: QTensor, beside: Beside = _ALONE) -> str | None:
    """Why x of this shape times this weight is left to the reference; None if it is not."""
    k, group = w.layout.k, w.group_size
    if 0 in (*shape, w.layout.n):
        return "there is nothing to multiply"
    if w.order == "nk" and (w.spec.format.bits < 8 or group < k):
        return "words that are packed along the lanes are not unpacked here"
    if group < k and group % LANES and (group < _LEAST_GROUP or LANES % group):
        return f"groups of {group} values neither divide a register of {LANES} lanes nor fill several"
    if group < k and group % LANES == 0 and group % K_MULTIPLE and group > 4 * K_MULTIPLE:
        return f"groups of {group} values are cut by tiles of {K_MULTIPLE}"
    if beside != _ALONE and not fits(default_blocks(shape[-2], w, beside), w, beside):
        return "what the epilogue reads does not fit into VMEM"
    return None


# --- The call --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """What is known when the kernel is compiled.

    Attributes:
        m, k: rows of x and values to contract.
        format: of the weight.
        order: of its words, "kn" or "nk".
        group: values along K that share a scale.
        zero, weight_zero: whether x and the weight have zero points.
        blocks: sizes of the tiles.
        weights: how many are multiplied.
        epilogue: what is made of the products, if not the result itself.
    """

    m: int
    k: int
    format: Format
    order: str
    group: int
    zero: bool
    weight_zero: bool
    blocks: Blocks
    weights: int
    epilogue: Epilogue | None

    @property
    def groups(self) -> int:
        """How many there are."""
        return pl.cdiv(self.k, self.group)

    @property
    def steps(self) -> int:
        """Tiles along K."""
        return pl.cdiv(self.k, self.blocks.k)

    @property
    def stored(self) -> int:
        """Rows of the tile of the result: what fills registers of it; padding of x beyond that is not scaled."""
        if self.epilogue is not None and self.epilogue.codes is not None:
            return self.blocks.m
        strips = self.epilogue is not None and self.m > SUBLANES
        return min(self.blocks.m, _up(self.m, STRIP if strips else SUBLANES))

    @property
    def ones(self) -> int:
        """The row of the tile of x that is of ones where x has zero points: after the rows of x."""
        return min(self.m, self.blocks.m)

    @property
    def rows(self) -> int:
        """Rows of the tile of x and that of ones."""
        return self.blocks.m + (_ROWS if self.zero and self.ones == self.blocks.m else 0)

    @property
    def columns(self) -> int:
        """Columns of the tile of the weight and those of ones."""
        return self.blocks.n + (LANES if self.weight_zero else 0)

    @property
    def part(self) -> int:
        """Values along K of a tile of whole groups that are unpacked at once: what registers hold the sums of."""
        unit = math.lcm(self.group, K_MULTIPLE)
        units, most = self.blocks.k // unit, max(1, _SUMS // (self.rows * (unit // self.group)))
        return unit * max(count for count in range(1, most + 1) if units % count == 0)

    @property
    def windows(self) -> list[tpu_tile.Window]:
        """Those of the words along K, in order "kn"."""
        return tpu_tile.windows(self.format, self.k, self.blocks.k)

    @property
    def arrays(self) -> int:
        """How many windows a weight has, those of scales and zero points included."""
        return (2 if self.weight_zero else 1) + (1 if self.order == "nk" else len(self.windows))

    def scratch(self) -> dict[str, Any]:
        """By name, what is kept of a weight from one tile along K to the next."""
        n, kept = self.blocks.n, {}
        if self.groups > 1:
            kept["values"] = pltpu.VMEM((self.groups, n), jnp.float32)
            kept["total"] = pltpu.VMEM((self.stored, n), jnp.float32)
            if self.weight_zero:
                kept["weight_zero"] = pltpu.VMEM((self.groups, n), jnp.int32)
        if self.steps > 1 and self.group > self.blocks.k:
            kept["acc"] = pltpu.VMEM((self.rows, self.columns), jnp.int32)
        if self.epilogue is not None and self.groups == 1:
            kept["total"] = pltpu.VMEM((self.stored, n), jnp.float32)
        return kept


def matmul(
    x: Int8[Array, "*stack M K"],
    scale: Float[Array, "*stack M 1"],
    zero: Float[Array, "*stack M 1"] | None,
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    out_dtype: Any,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"]:
    """What `integer_matmul.matmul_reference` computes, bit for bit; `unsupported` must have nothing against it.

    Args:
        x, scale, zero, w, layer, out_dtype: as for `integer_matmul`; no axis is empty.
        blocks: sizes of the tiles; by default `default_blocks` chooses.
        interpret: run the kernel as plain JAX operations, on any platform.
    """
    stored = jnp.dtype(jnp.float32 if out_dtype == jnp.float16 else out_dtype)
    how: dict[str, Any] = {"blocks": blocks, "interpret": interpret}
    return _multiplied(Activation(x, scale, zero), [w], [], [layer], None, stored, **how).astype(out_dtype)


def fused_matmul(
    x: Activation,
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    epilogue: Epilogue,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"] | Int8[Array, "*stack M N"]:
    """The epilogue of the products of x with one or two weights, in one kernel; it starts from the bits of `matmul`.

    Args:
        x: codes `(*stack, M, K)`, with scales and zero points `(*stack, M, 1)`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products.
        blocks, interpret: as for `matmul`.
    """
    return _multiplied(x, weights, others, layers, epilogue, epilogue.out_dtype, blocks=blocks, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """The arrays of a weight as the kernel reads them, all matrices along one axis.

    Attributes:
        first: index of the first matrix of the layer in the words, and in the scales.
        words: in the order of the product.
        values, zero: scales, and zero points if there are any, in order "kn".
    """

    first: Int[Array, " 2"]
    words: Int[Array, "B _ _"]
    values: Float[Array, "_ G _"]
    zero: Int8[Array, "_ G _"] | None

    @staticmethod
    def of(w: QTensor, layer: Int[Array, ""] | int | None, matrices: int) -> _Packed:
        """From a weight with so many matrices in a layer."""
        first = first_scales = jnp.zeros((), jnp.int32)
        scales = w.matrix_arrays()[1]
        if layer is not None:
            layer = layer_index(layer, w.words.shape[0])
            first = layer * matrices
            if not (w.spec.double_quant or scales.values.dtype == jnp.float16):
                first_scales = first
            else:  # they are converted: those of one layer, not of all
                scales = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), scales)
        scales = stored_scales.plain_scales(scales)
        values = scales.values.astype(jnp.float32) if scales.values.dtype == jnp.float16 else scales.values
        words, values, *zero = (a.reshape(-1, *a.shape[-2:]) for a in (w.words, values, scales.zero) if a is not None)
        return _Packed(jnp.stack([first, first_scales]), words, values, zero[0] if zero else None)


def _multiplied(
    x: Activation,
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    layers: Sequence[Int[Array, ""] | int | None],
    epilogue: Epilogue | None,
    out_dtype: Any,
    *,
    blocks: Blocks | None,
    interpret: bool,
) -> Array:
    """What the epilogue makes of the products, or the only product, in a dtype that the kernel writes."""
    w, *_ = weights
    *stack, m, k = x.codes.shape
    n, matrices = w.layout.n, math.prod(stack)
    size = blocks or default_blocks(m, w, Beside.of(len(weights), [a.shape for a in others]))
    packed = [_Packed.of(w, layer, matrices) for w, layer in zip(weights, layers, strict=True)]
    zeros = x.zero is not None, w.scales.zero is not None
    product = _Product(m, k, w.spec.format, w.order, w.group_size, *zeros, size, len(weights), epilogue)
    operands, specs = [], []

    def add(a: Array, block: tuple[int, int], index: Any) -> None:
        """An operand with one axis in front of the last two, which `index` counts too."""
        operands.append(a)
        specs.append(pl.BlockSpec((None, *block), index))

    add(x.codes.reshape(-1, m, k), (size.m, size.k), lambda s, i, j, t, first: (s, i, t))
    for a in (x.scale, x.zero):
        if a is not None:  # along the lanes: as a column, each number would fill a register
            add(a.reshape(-1, 1, m), (1, min(size.m, m)), lambda s, i, j, t, first: (s, 0, i))
    for which, own in enumerate(packed):
        at, at_scales = 2 * which, 2 * which + 1
        for a in own.values, own.zero:
            if a is not None:
                wide = a.shape[-1] > 1
                block = a.shape[-2], size.n if wide else 1
                add(a, block, lambda s, i, j, t, first, w=wide, at=at_scales: (first[at] + s, 0, j * w))
        if w.order == "nk":
            add(own.words, (size.n, size.k), lambda s, i, j, t, first, at=at: (first[at] + s, j, t))
        else:
            for part in product.windows:
                add(
                    own.words,
                    (part.rows, size.n),
                    lambda s, i, j, t, first, part=part, at=at: (first[at] + s, part.first + part.step * t, j),
                )
    for a in others:
        once = [length == 1 for length in a.shape]
        block = 1 if once[1] else product.stored, 1 if once[2] else size.n
        add(
            a,
            block,
            lambda s, i, j, t, first, once=once: tuple(0 if o else at for o, at in zip(once, (s, i, j), strict=True)),
        )
    out = pl.pallas_call(
        functools.partial(_kernel, product),
        out_shape=jax.ShapeDtypeStruct((matrices, m, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(matrices, pl.cdiv(m, size.m), pl.cdiv(n, size.n), product.steps),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, product.stored, size.n), lambda s, i, j, t, first: (s, i, j)),
            scratch_shapes=[
                *([pltpu.VMEM((product.stored, 1), jnp.int32)] if product.zero else []),
                *list(product.scratch().values()) * len(weights),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * matrices * m * k * n * len(weights),
            bytes_accessed=x.codes.size
            + matrices * k * n * w.spec.format.bits // 8 * len(weights)
            + sum(a.nbytes for a in others)
            + matrices * m * n * 4,
            transcendentals=0,
        ),
        interpret=interpret,
        name="fused_integer_matmul" if epilogue else "integer_matmul",
    )(jnp.concatenate([own.first for own in packed]), *operands)
    return out.reshape(*stack, m, n)


# --- The kernel ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight in the kernel.

    Attributes:
        product: what is computed.
        columns: references to scales and zero points, by the names of `_Product.scratch`.
        words: references to the windows of its words.
        kept: what is kept of it, by name.
        zero: reference to the zero points of x as a column, or None.
    """

    product: _Product
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


def _kernel(product: _Product, first: Any, x: Any, scale: Any, *refs: Any) -> None:
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


def _rows(product: _Product, x: Any, step: Any, i: Any, size: int) -> Int8[Array, "_ {size}"]:
    """Part i of the tile of x, `size` wide: zeros beyond K, and a row of ones where x has zero points."""
    words = pltpu.bitcast(_window(x, i, size, 1)[...], jnp.int32)  # row r holds rows 4r .. 4r+3: int8 has no selects
    if product.rows > product.blocks.m:
        words = jnp.concatenate([words, jnp.full((_ROWS // _BYTES, size), 0x01010101, jnp.int32)], axis=0)
    elif product.zero:
        row, shift = product.ones // _BYTES, product.ones % _BYTES * 8
        ones = words & (1 << shift) - 1 | 1 << shift  # the rows above are padding
        words = jnp.where(lax.broadcasted_iota(jnp.int32, words.shape, 0) == row, ones, words)
    if product.k % product.blocks.k:
        lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
        words = jnp.where(lane < product.k - step * product.blocks.k - i * size, words, 0)
    return pltpu.bitcast(words, jnp.int8)


def _weight(product: _Product, refs: list[Any], step: Any, i: Any, size: int) -> Int8[Array, "_ _"]:
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


def _dot(product: _Product, x: Int8[Array, "_ K"], weight: Int8[Array, "_ _"]) -> Int32[Array, "_ _"]:
    """Sums over K; beside them those of the rows of x, where the weight has zero points."""
    n_axis = 1 if product.order == "kn" else 0
    if product.weight_zero:
        shape = (x.shape[1], LANES) if product.order == "kn" else (LANES, x.shape[1])
        weight = jnp.concatenate([weight, jnp.ones(shape, jnp.int8)], axis=n_axis)
    numbers = (((1,), (1 - n_axis,)), ((), ()))
    return lax.dot_general(x, weight, numbers, preferred_element_type=jnp.int32)


def _groups(product: _Product, x: Int8[Array, "_ bk"], weight: Int8[Array, "bk bn"]) -> Iterator[Int32[Array, "_ _"]]:
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
