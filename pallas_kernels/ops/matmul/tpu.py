"""`quantized_matmul` on TPU: a Pallas kernel that reads packed words and makes one tile of the weight at a time.

The grid runs over the stack, over tiles of the result, and along what is contracted; sums are a float32 scratch. The
index of a layer is prefetched, so that its words are read from the whole stack and nothing is sliced or copied. Sizes
are any: Pallas cuts the edges of the result, and what lies beyond the contracted axis counts as zero.

**Lookup tables** (order "nk") have the words of a column in a row. A tile of 32-bit words is transposed before it is
unpacked, an eighth of the work that 4-bit codes would be, and is then like any other. Codes of 8 bits stay: the product
contracts the last axes of both. Where a row does not fill registers, XLA lays the array out along the other axis, so
that a transpose outside of the kernel moves nothing: that is how scales enter, and the words of such tables.

**Epilogues.** Products of one x with two weights that are packed alike share its tiles, and what a program does with
the results (`pallas_kernels.backends.epilogue`) is done to finished sums, a strip of rows at a time, so that it stays
in registers.

**Precision.** Sums are float32. bfloat16 is multiplied as it is, float32 at default precision rounded to bfloat16 (the
single pass that XLA makes of it on TPU), float32 at a higher precision as float32. Scales that go in after the product
multiply sums of exact codes, so that weights are not rounded at all, other than the values of NF4 to bfloat16. From
`reference.matmul`, which rounds weights, a result differs by at most eps of what is multiplied in each product, as
`eps * (abs(x) @ abs(w))`; by 1.5 of it where gathered values are scaled before the product and so are rounded twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.tpu_operands import Beside, Packed, no_float16, operand_dtype
from qjax.pallas_kernels.backends.tpu_tile import LANES, SUBLANES
from qjax.pallas_kernels.ops.matmul import reference, tpu_kernel
from qjax.pallas_kernels.ops.matmul.tpu_product import Product
from qjax.pallas_kernels.ops.matmul.tpu_tiles import MOST_K, Blocks, default_blocks, k_unit
from qjax.pallas_kernels.packed.qtensor import QTensor


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
    """What `reference.matmul` computes, up to rounding; the reference itself where `unsupported` says why.

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
    out = tpu_kernel.call(product, x, packed, others, epilogue, written, interpret)
    return out.reshape(*stack, m, out.shape[-1]).astype(out_dtype)


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
