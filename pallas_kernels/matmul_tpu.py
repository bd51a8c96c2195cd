"""`quantized_matmul` on TPU: a Pallas kernel that reads packed words and makes one tile of the weight at a time.

The grid runs over the stack, over tiles of the result, and along what is contracted; sums are a float32 scratch. The
index of a layer is prefetched, so that its words are read from the whole stack and nothing is sliced or copied. Sizes
are any: Pallas cuts the edges of the result, and what lies beyond the contracted axis counts as zero.

**Lookup tables** (order "nk") have the words of a column in a row. A tile of 32-bit words is transposed before it is
unpacked, an eighth of the work that 4-bit codes would be, and is then like any other. Codes of 8 bits stay: the product
contracts the last axes of both. Where a row does not fill registers, XLA lays the array out along the other axis, so
that a transpose outside of the kernel moves nothing: that is how scales enter, and the words of such tables.

**Where scales go.** Before the product, into every value of the tile: some four operations for a vector register of
weights. Or after it, into the sums over a group: two operations for a register of results of each group, which is
cheaper for few rows of x, and always for one scale over all of K. `default_blocks` chooses. The transposed product, and
one that must round weights on the way, have scales before.

**Precision.** Sums are float32. bfloat16 is multiplied as it is, float32 at default precision rounded to bfloat16 (the
single pass that XLA makes of it on TPU), float32 at a higher precision as float32. Scales that go in after the product
multiply sums of exact codes, so that weights are not rounded at all, other than the values of NF4 to bfloat16. From
`matmul_reference`, which rounds weights, a result differs by at most eps of what is multiplied in each product, as
`eps * (abs(x) @ abs(w))`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import blocks_tpu, matmul_reference, numerics, tile_tpu
from pallas_kernels.formats import QuantSpec
from pallas_kernels.packing import WORD_BITS
from pallas_kernels.qtensor import QTensor
from pallas_kernels.tile_tpu import K_MULTIPLE, LANES, SUBLANES


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        m: rows of x in a tile, a multiple of 16.
        n: columns of the weight in a tile, a multiple of 128.
        k: rows of the weight in a tile, a multiple of 256; a multiple of the group size, or the group size of it.
        scale: whether scales are multiplied in before or after the product.
    """

    m: int
    n: int
    k: int
    scale: Literal["before", "after"]


def matmul(
    x: Float[Array, "*stack M _"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M _"]:
    """What `matmul_reference.matmul` computes, up to rounding; the reference itself where `unsupported` says why.

    Args:
        x, w, layer, casts, precision, preferred_element_type, transpose: as for the reference.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform.
    """
    chain, order = (w.dtype, *casts), _order(w)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, chain[-1]))
    if unsupported(x, w, casts, out_dtype):
        return matmul_reference.matmul(
            x,
            w,
            layer=layer,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
            transpose=transpose,
        )
    one_pass = jnp.promote_types(x.dtype, chain[-1]) == jnp.bfloat16 or (x.dtype != jnp.float16 and _fast(precision))
    dtype = jnp.dtype(jnp.bfloat16 if one_pass else jnp.float32)
    rounding = tuple(d for d in chain if d == jnp.bfloat16) if dtype == jnp.float32 else ()
    *stack, m, _ = x.shape
    blocks = blocks or default_blocks(m, w.layout.k, w.layout.n, w.spec, dtype, order, transpose)
    assert blocks is not None  # `unsupported` asks for fewer rows
    group = w.group_size
    whole = group == w.layout.k
    if blocks.k % K_MULTIPLE or blocks.n % LANES or not (whole or _cuts_groups(blocks.k, group)):
        raise ValueError(
            f"qjax: {blocks} for a packed {w.spec} matrix with K={w.layout.k}: k must be a multiple of {K_MULTIPLE}, "
            f"and of the group size or the group size of it; n must be a multiple of {LANES}."
        )
    if transpose or rounding or not (whole or _cuts_depth(group)):
        blocks = dataclasses.replace(blocks, scale="before")
    product = _Product(w.spec, w.layout.k, w.layout.n, order, transpose, blocks, dtype, rounding)

    layers = 1 if layer is None else w.words.shape[0]
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    index = jnp.clip(jnp.where(index < 0, index + layers, index), 0, layers - 1)  # as lax.dynamic_index_in_dim
    words, scales = w.matrix_arrays()
    index_of_scales = index
    if layer is not None and (w.spec.double_quant or scales.values.dtype == jnp.float16):
        # they are converted: those of one layer, not of all
        scales = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0), scales)
        index_of_scales = jnp.zeros_like(index)
    words, scales = jax.tree.map(
        lambda a: _no_float16(a).reshape(-1, math.prod(stack), *a.shape[-2:]),
        (words if order == "kn" else w.words, numerics.plain_scales(scales)),
    )
    x = _no_float16(x).reshape(math.prod(stack), m, x.shape[-1])
    written = jnp.dtype(jnp.float32) if out_dtype == jnp.float16 else out_dtype
    out = _call(product, jnp.stack([index, index_of_scales]), x, words, scales, written, interpret)
    return out.reshape(*stack, m, out.shape[-1]).astype(out_dtype)


def unsupported(x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any) -> str | None:
    """Why a product is left to the reference, or None; x is anything with a shape and a dtype."""
    floats = (jnp.float32, jnp.bfloat16, jnp.float16)
    if any(dtype not in floats for dtype in (x.dtype, out_dtype, w.dtype, *casts)):
        return "the kernel multiplies float32, bfloat16 and float16"
    if jnp.float16 in (w.dtype, *casts) and out_dtype != jnp.float16:
        return "no TPU rounds weights to float16"
    if 0 in (*x.shape, *w.words.shape):
        return "empty"
    group = w.group_size
    if group != w.layout.k and (group % SUBLANES or _k_unit(w.layout.k, w.spec, _order(w)) > _MOST_K):
        return "no tile holds whole groups"
    if default_blocks(1, w.layout.k, w.layout.n, w.spec, jnp.float32, _order(w)) is None:
        return "the rows of a column do not fit into VMEM"
    return None


def _order(w: QTensor) -> str:
    """The order in which the kernel reads the words."""
    return w.order if w.words.shape[-1] % LANES == 0 else "kn"


def _no_float16(a: Array) -> Array:
    return a.astype(jnp.float32) if a.dtype == jnp.float16 else a


def _fast(precision: Any) -> bool:
    """Whether a precision, as `lax.dot_general` takes it, means one pass of bfloat16 for float32."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    each = precision if isinstance(precision, tuple) else (precision,)
    names = {str(getattr(p, "name", p)).upper() for p in each}
    return names <= {"NONE", "DEFAULT", "FASTEST", "BFLOAT16", "BF16_BF16_F32"}


# --- Tiles ----------------------------------------------------------------------------------------------------------

# A kernel has 16 MiB of VMEM on every chip, if it asks for no more; what `_vmem` does not count gets the rest.
_VMEM = 11 * 2**20
_MOST_M, _MOST_K = 512, 2048
_DEPTH = 128  # of the matrix unit; from v6e on it is twice that, but with groups of 128 as fast filled to a half
_STEP = 128  # a step of the grid takes about as long as so many rows of a tile more


def default_blocks(
    m: int, k: int, n: int, spec: QuantSpec, dtype: Any, order: str = "kn", transpose: bool = False
) -> Blocks | None:
    """What the table of `blocks_tpu` says for this chip, cut to the matrix and to VMEM, or a choice by shape alone.

    Few rows of x read the weight once: tiles are long, so that there is enough to read in each step. With many rows the
    product takes the time, and large tiles of the result read x and the weight less often.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix.
        spec: of the weight.
        dtype: of the operands of the product.
        order: of the words as the kernel reads them.
        transpose: whether N is contracted; the table has no rows for that.

    Returns:
        Blocks, or None if no tile fits into VMEM.
    """
    group, unit = spec.group_size(k), _k_unit(k, spec, order)
    bm = _round_up(-(-m // -(-m // _MOST_M)), 16)
    entry = None if transpose else blocks_tpu.lookup("quantized_matmul", bm, k, spec, order, dtype)
    most_n, most_k = (entry.n, entry.k) if entry else (512, 2048) if bm <= 64 else (1024, 512)
    halvings = sorted(itertools.product(range(6), range(4), range(4)), key=lambda h: (h[0], sum(h), h))
    for less_m, less_n, less_k in halvings:
        rows = max(16, _round_up(bm >> less_m, 16))
        by_shape = "after" if group == k or (_cuts_depth(group) and 2 * rows <= group) else "before"
        blocks = Blocks(
            m=rows,
            n=_tile(n, LANES, max(LANES, most_n >> less_n)),
            k=_tile(k, unit, max(unit, most_k >> less_k), 1 if group == k else group),
            scale=(entry and entry.scale) or by_shape,
        )
        if fits(blocks, k, spec, dtype, order):
            return blocks
    return None


def fits(blocks: Blocks, k: int, spec: QuantSpec, dtype: Any, order: str) -> bool:
    """Whether a kernel with such tiles has enough VMEM, by an estimate; arguments as for `default_blocks`."""
    return _vmem(blocks, k, spec, dtype, order) <= _VMEM


def _cuts_depth(group: int) -> bool:
    """Whether groups are whole tiles of the matrix unit, or several of them are one."""
    return group % _DEPTH == 0 or _DEPTH % group == 0


def _k_unit(k: int, spec: QuantSpec, order: str) -> int:
    """Tiles are multiples of this along K, which cuts no word."""
    group, bits = spec.group_size(k), spec.format.bits
    unit = K_MULTIPLE if group == k or group % K_MULTIPLE == 0 else math.lcm(K_MULTIPLE, group)
    if order == "nk" and bits in (2, 4):  # if words of a tile fill lanes, it has a window of its own
        filled = math.lcm(unit, LANES * WORD_BITS // bits)
        if filled < k and filled <= _MOST_K and (group == k or _cuts_groups(filled, group)):
            return filled
    return unit


def _tile(size: int, unit: int, most: int, group: int = 1) -> int:
    """The multiple of `unit` up to `most` that covers `size` in the least time, in whole groups or parts of one."""
    choices = range(unit, min(most, _round_up(size, unit)) + 1, unit)
    allowed = [tile for tile in reversed(choices) if _cuts_groups(tile, group)]
    return min(allowed, key=lambda tile: -(-size // tile) * (tile + _STEP))


def _cuts_groups(tile: int, group: int) -> bool:
    return tile % group == 0 or group % tile == 0


def _vmem(blocks: Blocks, k: int, spec: QuantSpec, dtype: Any, order: str) -> int:
    """Bytes of the windows, each of which Pallas holds twice, of the scratch and of the tile."""
    size = jnp.dtype(dtype).itemsize
    m, bn, bk = blocks.m, blocks.n, blocks.k
    turned = order == "nk" and spec.format.bits < 8
    windows = tile_tpu.windows(spec.format, k, bk, LANES if turned else 1)
    words = sum(w.rows for w in windows) * bn * (1 if spec.format.bits == 8 else 4)
    scales = -(-k // spec.group_size(k)) * bn * 4 * (2 if spec.zero_point else 1)
    windows = m * max(bk, bn) * 4 + words + scales + m * max(bn, bk) * size
    return 2 * windows + m * bn * 4 + scales + bk * bn * size + (words if turned else 0)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands: sizes K and N, and dtypes.

    Attributes:
        order: of the words, "kn" or "nk".
        dtype: of the operands of the dot.
        rounding: narrower dtypes that a weight is rounded to before.
    """

    spec: QuantSpec
    k: int
    n: int
    order: str
    transpose: bool
    blocks: Blocks
    dtype: Any
    rounding: tuple[Any, ...]

    @property
    def group(self) -> int:
        return self.spec.group_size(self.k)

    @property
    def whole(self) -> bool:
        """Whether all of K shares a scale."""
        return self.group == self.k

    @property
    def rows_of_codes(self) -> bool:
        """Whether the tile of codes is `(N, K)`: in order "nk", where they are not packed."""
        return self.order == "nk" and self.spec.format.bits == 8

    @property
    def rows_of_words(self) -> bool:
        """Whether the windows of words are `(N, R)`, to be transposed: in order "nk", where they are packed."""
        return self.order == "nk" and self.spec.format.bits < 8

    @property
    def windows(self) -> list[tile_tpu.Window]:
        """Those of the words along K."""
        return tile_tpu.windows(self.spec.format, self.k, self.blocks.k, LANES if self.rows_of_words else 1)

    @property
    def contracted(self) -> tuple[int, int]:
        """Size of the contracted axis, and of its tiles."""
        return (self.n, self.blocks.n) if self.transpose else (self.k, self.blocks.k)

    @property
    def produced(self) -> tuple[int, int]:
        return (self.k, self.blocks.k) if self.transpose else (self.n, self.blocks.n)

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the contracted axis."""
        size, tile = self.contracted
        return size % tile != 0


def _call(
    product: _Product,
    layers: Int[Array, " 2"],
    x: Float[Array, "B M _"],
    words: Int[Array, "L B _ _"],
    scales: numerics.Scales,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "B M _"]:
    """The product with each matrix of one layer of the stack.

    Args:
        product: what is computed.
        layers: index of the layer of the words, and of that of the scales.
        x, words, scales: operands; the words in the order of the product, the scales in order "kn".
        out_dtype: of the result.
        interpret: as for `matmul`.
    """
    (inner, inner_tile), (outer, outer_tile), blocks = product.contracted, product.produced, product.blocks
    stack, m, _ = x.shape

    def window(which: int, shape: tuple[int, int], move: Callable[[Any, Any], tuple[Any, Any]]) -> pl.BlockSpec:
        def index(b: Any, _: Any, o: Any, s: Any, layers: Any) -> tuple[Any, ...]:
            return (layers[which], b, *(move(o, s) if product.transpose else move(s, o)))

        return pl.BlockSpec((None, None, *shape), index)

    def window_of_words(part: tile_tpu.Window) -> pl.BlockSpec:
        if product.order == "nk":
            return window(0, (blocks.n, part.rows), lambda k, n: (n, part.first + part.step * k))
        return window(0, (part.rows, blocks.n), lambda k, n: (part.first + part.step * k, n))

    parts = product.windows
    small = [a for a in (scales.values, scales.zero) if a is not None]
    columns = blocks.n if scales.values.shape[-1] == product.n else 1
    copied = [product.transpose or columns == 1 or a.dtype != jnp.float32 for a in small]
    return pl.pallas_call(
        functools.partial(_kernel, product, copied),
        out_shape=jax.ShapeDtypeStruct((stack, m, outer), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(stack, pl.cdiv(m, blocks.m), pl.cdiv(outer, outer_tile), pl.cdiv(inner, inner_tile)),
            in_specs=[
                pl.BlockSpec((None, blocks.m, inner_tile), lambda b, i, o, s, layers: (b, i, s)),
                *map(window_of_words, parts),
                *(window(1, (a.shape[-2], columns), lambda k, n: (0, n if columns > 1 else 0)) for a in small),
            ],
            out_specs=pl.BlockSpec((None, blocks.m, outer_tile), lambda b, i, o, s, layers: (b, i, o)),
            scratch_shapes=[
                pltpu.VMEM((blocks.m, outer_tile), jnp.float32),
                *(pltpu.VMEM((part.rows, blocks.n), jnp.int32) for part in parts if product.rows_of_words),
                *(pltpu.VMEM((a.shape[-2], blocks.n), jnp.float32) for a in itertools.compress(small, copied)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * stack * m * product.k * product.n,
            bytes_accessed=x.nbytes + words.nbytes // words.shape[0] + stack * m * outer * out_dtype.itemsize,
            transcendentals=0,
        ),
        name="quantized_matmul",
        interpret=interpret,
    )(layers, x, *[words] * len(parts), *small)


def _kernel(product: _Product, copied: Sequence[bool], _: Any, x_ref: Any, *refs: Any) -> None:
    """Adds the product of two tiles to the sum; after the last one that is written to the result.

    Args:
        product: what is computed.
        copied: which of scales and zero points have a float32 copy. Mosaic takes a single row at an index that is only
            known at run time from float32, but not from narrower dtypes.
        x_ref: a tile of x.
        refs: words, scales, zero points; the result; the sum, transposed words, and copies.
    """
    parts = product.windows
    word_refs, small = refs[: len(parts)], refs[len(parts) : len(parts) + len(copied)]
    out_ref, sum_ref, *copies = refs[len(parts) + len(copied) :]
    step, blocks = pl.program_id(3), product.blocks
    size, tile = product.contracted
    left = size - step * tile  # of the contracted axis, from this tile on

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    if product.rows_of_words:
        turned, copies = copies[: len(parts)], copies[len(parts) :]

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
            target[...] = _zero_from(left, rows, 1) if product.transpose and product.ragged else rows

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
    at = pl.program_id(2) if product.transpose else step
    if product.rows_of_codes:
        words = word_refs[0][...]
    else:
        words = tile_tpu.load(word_refs, product.spec.format, product.k, blocks.k, at)
    if blocks.scale == "before":
        weights = _weights(product, words, scales, zero, at, left)
        sum_ref[...] += _dot(x, weights, product, 1 if product.transpose else 0)
    else:
        sum_ref[...] += _scaled_sums(product, x, words, scales, zero, at, left)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish() -> None:
        result = sum_ref[...]
        if blocks.scale == "after" and product.whole:
            result *= scales[...]
        out_ref[...] = result.astype(out_ref.dtype)


def _zero_from(limit: Any, a: Array, axis: int) -> Array:
    """`a` with zeros from index `limit` of an axis on, whatever was there."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, axis) < limit, a, 0)


def _dot(x: Array, w: Array, product: _Product, axis: int) -> Array:
    """Contracts the last axis of x with this one of w."""
    precision = lax.Precision.HIGHEST if product.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _groups(product: _Product) -> tuple[int, int]:
    """How many groups a tile has (part of one counts), and how much of K it has of each."""
    size = product.blocks.k if product.whole else min(product.group, product.blocks.k)
    return product.blocks.k // size, size


def _row(ref: Any, product: _Product, at: Any, g: int) -> Float[Array, "1 N"]:
    """What belongs to group g of tile `at` along K; in a tile that reaches beyond K, anything that is finite."""
    if ref.shape[0] == 1:
        return ref[...]
    count, size = _groups(product)
    first = at * count if product.group == size else lax.div(at, product.group // size)
    return ref[pl.ds(jnp.minimum(first + g, ref.shape[0] - 1), 1), :]


def _codes(product: _Product, words: Array, dtype: Any, left: Any) -> Array:
    """Unscaled values, finite ones beyond the contracted axis: any bits are an integer or an entry of a codebook."""
    if product.spec.format.kind != "float" or not product.ragged:
        return tile_tpu.codes(words, product.spec.format, dtype)
    codes = tile_tpu.codes(words, product.spec.format, jnp.float32)
    return _zero_from(left, codes, int(product.transpose != product.rows_of_codes)).astype(dtype)


def _weights(product: _Product, words: Array, scales: Any, zero: Any, at: Any, left: Any) -> Float[Array, "K N"]:
    """The tile of the weight."""
    count, size = _groups(product)

    def stretch(ref: Any) -> Array:
        rows = [_row(ref, product, at, g) for g in range(count)]
        return jnp.concatenate([jnp.broadcast_to(row, (size, row.shape[1])) for row in rows])

    # Of integers and 8-bit floats, a value and a scale that are bfloat16 have a product that is rounded once.
    narrow = product.spec.scale_dtype == "bfloat16" and product.dtype == jnp.bfloat16 and not product.spec.format.values
    dtype = product.dtype if narrow else jnp.float32
    values = _codes(product, words, dtype, left)
    if product.rows_of_codes:
        values = values.T
    if zero is not None:
        values -= stretch(zero).astype(dtype)
    values *= stretch(scales).astype(dtype)
    for narrower in product.rounding:
        values = values.astype(narrower)
    return values.astype(product.dtype)


def _scaled_sums(
    product: _Product, x: Array, words: Array, scales: Any, zero: Any, at: Any, left: Any
) -> Float[Array, "M N"]:
    """Sums over each group, times its scale; with one scale for all of K, the sum without it.

    Groups shorter than the matrix unit is deep go through it side by side: x is repeated, each time with zeros outside
    of one of them. That multiplies rows of x, of which there are few, and each weight is loaded once.
    """
    count, size = _groups(product)
    rows = x.shape[0]
    beside = max(1, _DEPTH // size)
    depth = beside * size
    height = tile_tpu.rows(product.spec.format, depth)
    total = jnp.zeros((rows, product.blocks.n), jnp.float32)
    for i in range(count // beside):
        part = x[:, i * depth : (i + 1) * depth]
        if beside > 1:  # in float32, as Mosaic has no mask for the tiles of 4 rows of bfloat16
            part = part.astype(jnp.float32)
            group = lax.div(lax.broadcasted_iota(jnp.int32, part.shape, 1), jnp.int32(size))  # // asks for the TPU
            part = jnp.concatenate([jnp.where(group == g, part, 0) for g in range(beside)]).astype(product.dtype)
        packed = slice(i * height, (i + 1) * height)
        packed = words[:, packed] if product.rows_of_codes else words[packed]
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
