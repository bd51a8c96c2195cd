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

**Epilogues.** Products of one x with two weights that are packed alike share its tiles, and what a program does with
the results (`pallas_kernels.backends.epilogue`) is done to finished sums, a strip of rows at a time, so that it stays
in registers.

**Bias.** On chips without bfloat16 arithmetic the conversion of codes takes most of the time. There those of 4 bits are
multiplied as `code + 136`, which their bits almost are (`tile_tpu.biased_codes`), and 136 times the sum of x is taken
off each sum over 128 of them. That costs some eight of the 24 bits of float32: twice as many as bfloat16 has remain.

**Codebooks.** Chips that gather bytes look up four values at a time (`tile_tpu.gathered_codes`). Their values are
rounded to bfloat16 wherever scales go, and come in another order along K, in which x then is too.

**Deep matrix units.** Where they are 256 deep, groups of 128 or fewer go through side by side, and tiles with few rows
of x are multiplied in parts of that depth.

**Precision.** Sums are float32. bfloat16 is multiplied as it is, float32 at default precision rounded to bfloat16 (the
single pass that XLA makes of it on TPU), float32 at a higher precision as float32. Scales that go in after the product
multiply sums of exact codes, so that weights are not rounded at all, other than the values of NF4 to bfloat16. From
`matmul_reference`, which rounds weights, a result differs by at most eps of what is multiplied in each product, as
`eps * (abs(x) @ abs(w))`; by 1.5 of it where gathered values are scaled before the product and so are rounded twice.
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
from jaxtyping import Array, Float, Float32, Int

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.tpu_operands import Beside, finish_strips, no_float16, operand_dtype
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES, SUBLANES
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.ops.matmul.tpu_tiles import (
    EARLIER,
    LATER,
    MOST_BIASED,
    MOST_CUT,
    MOST_K,
    Blocks,
    cuts_depth,
    cuts_groups,
    default_blocks,
    depth_of_unit,
    k_unit,
    round_up,
)
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index


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
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    if unsupported(x, w, casts, out_dtype):
        return reference.matmul(x, w, layer=layer, transpose=transpose, **how)
    return fused_matmul(x, [w], [], layers=[layer], transpose=transpose, blocks=blocks, interpret=interpret, **how)


def fused_matmul(
    x: Float[Array, "*stack M _"],
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    epilogue: Epilogue | None = None,
    transpose: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M _"]:
    """The epilogue of the products of x with one or two weights, in one kernel.

    Args:
        x, casts, precision, preferred_element_type, transpose, blocks, interpret: as for `matmul`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, in float32 or bfloat16; None for the product of a single one.
    """
    w, *_ = weights
    chain, order = (w.dtype, *casts), _order(w)
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    dtype = operand_dtype(x.dtype, chain[-1], precision)
    *stack, m, _ = x.shape
    beside = Beside.of(len(weights), [a.shape for a in others])
    blocks = blocks or default_blocks(m, w.layout.k, w.layout.n, w.spec, dtype, order, transpose, beside)
    assert blocks is not None  # `unsupported` asks for fewer rows
    product = Product.of(w, casts, dtype, order, transpose, blocks)
    packed = [Packed.of(w, layer, len(stack), order) for w, layer in zip(weights, layers, strict=True)]
    x = product.ordered(no_float16(x).reshape(math.prod(stack), m, x.shape[-1]))
    if epilogue is not None:
        out_dtype = epilogue.out_dtype
    written = jnp.dtype(jnp.float32) if out_dtype == jnp.float16 else out_dtype
    out = _call(product, x, packed, others, epilogue, written, interpret)
    return out.reshape(*stack, m, out.shape[-1]).astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of a weight as the kernel reads them: `(layers, stack, _, _)`.

    Attributes:
        layers: index of the layer of the words, and of that of the scales.
        words: in the order of the product.
        scales: in order "kn".
    """

    layers: Int[Array, " 2"]
    words: Int[Array, "L B _ _"]
    scales: stored_scales.Scales

    @staticmethod
    def of(w: QTensor, layer: Int[Array, ""] | int | None, stack: int, order: str) -> Packed:
        """From a weight with so many axes of a stack."""
        layers = 1 if layer is None else w.words.shape[0]
        index = layer_index(0 if layer is None else layer, layers)
        words, scales = w.matrix_arrays()
        index_of_scales = index
        if layer is not None and (w.spec.double_quant or scales.values.dtype == jnp.float16):
            # they are converted: those of one layer, not of all
            scales = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0), scales)
            index_of_scales = jnp.zeros_like(index)
        words, scales = jax.tree.map(
            lambda a: no_float16(a).reshape(-1, math.prod(a.shape[-2 - stack : -2]), *a.shape[-2:]),
            (words if order == "kn" else w.words, stored_scales.plain_scales(scales)),
        )
        return Packed(jnp.stack([index, index_of_scales]), words, scales)

    @property
    def small(self) -> list[Array]:
        """Scales, and zero points if there are any."""
        return [a for a in (self.scales.values, self.scales.zero) if a is not None]


def unsupported(x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, beside: Beside = Beside()) -> str | None:
    """Why a product is left to the reference, or None; x is anything with a shape and a dtype."""
    floats = (jnp.float32, jnp.bfloat16, jnp.float16)
    if any(dtype not in floats for dtype in (x.dtype, out_dtype, w.dtype, *casts)):
        return "the kernel multiplies float32, bfloat16 and float16"
    if jnp.float16 in (w.dtype, *casts) and out_dtype != jnp.float16:
        return "no TPU rounds weights to float16"
    if 0 in (*x.shape, *w.words.shape):
        return "empty"
    group = w.group_size
    if group != w.layout.k and (group % SUBLANES or k_unit(w.layout.k, w.spec, _order(w)) > MOST_K):
        return "no tile holds whole groups"
    if default_blocks(1, w.layout.k, w.layout.n, w.spec, jnp.float32, _order(w), beside=beside) is None:
        return "the rows of a column do not fit into VMEM"
    return None


def _order(w: QTensor) -> str:
    """The order in which the kernel reads the words."""
    return w.order if w.words.shape[-1] % LANES == 0 else "kn"


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Product:
    """What the kernel has to know beside its operands: sizes K and N, and dtypes.

    Attributes:
        order: of the words, "kn" or "nk".
        dtype: of the operands of the dot.
        rounding: narrower dtypes that a weight is rounded to before.
        codes: how a tile of codes is made: `tile_tpu.codes`, `biased_codes` or `gathered_codes`.
    """

    spec: QuantSpec
    k: int
    n: int
    order: str
    transpose: bool
    blocks: Blocks
    dtype: Any
    rounding: tuple[Any, ...]
    codes: Literal["plain", "biased", "gathered"]

    @staticmethod
    def of(w: QTensor, casts: tuple[Any, ...], dtype: Any, order: str, transpose: bool, blocks: Blocks) -> Product:
        """With matrices of this weight, for the chip that programs are made for; scales go in before if they have to.

        Raises:
            ValueError: such tiles do not cut the weight.
        """
        group, rounding = w.group_size, ()
        whole = group == w.layout.k
        if blocks.k % K_MULTIPLE or blocks.n % LANES or not (whole or cuts_groups(blocks.k, group)):
            raise ValueError(
                f"qjax: {blocks} for a packed {w.spec} matrix with K={w.layout.k}: k must be a multiple of "
                f"{K_MULTIPLE}, and of the group size or the group size of it; n must be a multiple of {LANES}."
            )
        if dtype == jnp.float32:
            rounding = tuple(d for d in (w.dtype, *casts) if d == jnp.bfloat16)
        if transpose or rounding or not (whole or cuts_depth(group)):
            blocks = dataclasses.replace(blocks, scale="before")
        codes, after, chip = "plain", blocks.scale == "after", tpu_chips.chip()
        if dtype == jnp.bfloat16 and not transpose:
            few = group >= LANES // 2 and blocks.m <= MOST_BIASED
            if chip in EARLIER and tpu_tile.can_bias(w.spec.format) and after and few:
                codes = "biased"
            whole_registers = group % LANES == 0 or group in (32, 64)  # also of every fourth row
            if chip in LATER and tpu_tile.can_gather_bytes(w.spec.format) and (after or whole_registers):
                codes = "gathered"
        return Product(w.spec, w.layout.k, w.layout.n, order, transpose, blocks, dtype, rounding, codes)

    def ordered(self, x: Float[Array, "*B K"]) -> Float[Array, "*B _"]:
        """x as the kernel takes it: with many rows the order of gathered codes costs least outside."""
        if not self.moved:
            return x
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % LANES)])
        parts = x.reshape(*x.shape[:-1], -1, LANES)
        return parts[..., tpu_tile.origin(jnp.arange(LANES))].reshape(x.shape)

    @property
    def narrow(self) -> bool:
        """Whether scales are multiplied in as bfloat16.

        Of integers and 8-bit floats, a value and a scale that are bfloat16 have a product that is rounded once.
        """
        exact = self.codes == "gathered" or not self.spec.format.values
        return exact and self.spec.scale_dtype == "bfloat16" and self.dtype == jnp.bfloat16

    @property
    def paired(self) -> bool:
        """Whether the copies of scales and zero points are `_paired`, so that rows of them need no conversion."""
        whole_registers = self.group % (LANES // 2) == 0  # also where four rows out of order share a group
        return self.blocks.scale == "before" and self.narrow and whole_registers and tpu_chips.chip() in LATER

    @property
    def moved(self) -> bool:
        """Whether x is in the order of `tile_tpu.reordered` when it enters the kernel."""
        return self.codes == "gathered" and self.blocks.scale == "before"

    @property
    def group(self) -> int:
        """Values along K that share a scale."""
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
    def windows(self) -> list[tpu_tile.Window]:
        """Those of the words along K."""
        return tpu_tile.windows(self.spec.format, self.k, self.blocks.k, LANES if self.rows_of_words else 1)

    @property
    def contracted(self) -> tuple[int, int]:
        """Size of the contracted axis, and of its tiles."""
        return (self.n, self.blocks.n) if self.transpose else (self.k, self.blocks.k)

    @property
    def produced(self) -> tuple[int, int]:
        """Size of the other axis of the weight, and of its tiles."""
        return (self.k, self.blocks.k) if self.transpose else (self.n, self.blocks.n)

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the contracted axis."""
        size, tile = self.contracted
        return size % tile != 0


def _call(
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

    def window(which: int, shape: tuple[int, int], move: Callable[[Any, Any], tuple[Any, Any]]) -> pl.BlockSpec:
        def index(b: Any, _: Any, o: Any, s: Any, layers: Any) -> tuple[Any, ...]:
            return (layers[which], b, *(move(o, s) if product.transpose else move(s, o)))

        return pl.BlockSpec((None, None, *shape), index)

    def window_of_words(which: int, part: tpu_tile.Window) -> pl.BlockSpec:
        if product.order == "nk":
            return window(which, (blocks.n, part.rows), lambda k, n: (n, part.first + part.step * k))
        return window(which, (part.rows, blocks.n), lambda k, n: (part.first + part.step * k, n))

    def window_of_result(a: Array) -> pl.BlockSpec:
        repeated = [size == 1 for size in a.shape]
        shape = (None, *(1 if one else size for one, size in zip(repeated[1:], (blocks.m, outer_tile), strict=True)))
        return pl.BlockSpec(
            shape,
            lambda b, i, o, s, layers: tuple(0 if one else at for one, at in zip(repeated, (b, i, o), strict=True)),
        )

    parts, (first, *_) = product.windows, weights
    columns = blocks.n if first.scales.values.shape[-1] == product.n else 1
    copied = [product.transpose or columns == 1 or a.dtype != jnp.float32 for a in first.small]
    in_specs, scratch, operands = [], [], []
    for i, w in enumerate(weights):
        in_specs += [window_of_words(2 * i, part) for part in parts]
        in_specs += [
            window(2 * i + 1, (a.shape[-2], columns), lambda k, n: (0, n if columns > 1 else 0)) for a in w.small
        ]
        scratch.append(pltpu.VMEM((blocks.m, outer_tile), jnp.float32))
        scratch += [pltpu.VMEM((part.rows, blocks.n), jnp.int32) for part in parts if product.rows_of_words]
        scratch += [pltpu.VMEM((a.shape[-2], blocks.n), jnp.float32) for a in itertools.compress(w.small, copied)]
        operands += [*[w.words] * len(parts), *w.small]
    return pl.pallas_call(
        functools.partial(_kernel, product, copied, len(weights), epilogue),
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
        copied: which of scales and zero points have a float32 copy. Mosaic takes a single row at an index that is only
            known at run time from float32, but not from narrower dtypes.
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
    """`x @ codes` by way of `tile_tpu.biased_codes`; the bias is taken off before sums grow and lose digits to it."""
    height = LANES // 8
    total = jnp.zeros((x.shape[0], words.shape[1]), jnp.float32)
    for i in range(x.shape[1] // LANES):
        part = x[:, i * LANES : (i + 1) * LANES]
        codes = tpu_tile.biased_codes(words[i * height : (i + 1) * height])
        sums = jnp.dot(part, codes, preferred_element_type=jnp.float32)
        total += sums - tpu_tile.BIAS * jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True)
    return total
