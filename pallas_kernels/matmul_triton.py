"""`quantized_matmul` on NVIDIA GPUs before and after Hopper: a Pallas kernel for Triton, on words in either order.

One program of the grid makes a tile of the result, or of one of the parts that K is split into where tiles are few.
Words are unpacked as integers, multiplied as exact bfloat16 or float16 codes with zero points taken off, and scales go
into the float32 sums of each group: weights are not rounded at all. Edges are masked. The layer of a scanned stack is
an operand that offsets the loads, so that nothing is sliced.

Triton multiplies with `mma`, never with `wgmma`, and carries the unpacked tile through shared memory: on Hopper this is
the kernel for what `matmul_mosaic_gpu` does not take. Pallas will lose its Triton backend in a version of JAX that is
not named yet, and products run on the reference then; `compiler_params` says which backend is meant, as the default has
changed between versions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu_operands, matmul_reference
from pallas_kernels.qtensor import QTensor

pltriton: Any
try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:
    pltriton = None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut; powers of two.

    Attributes:
        m: rows of x in a tile, at least 16.
        n: columns of the weight in a tile, at least 16.
        k: how much of K is unpacked at a time, at least 32; the size of a group is a multiple of it.
        splits: parts that K is cut into, for different programs.
        warps: of a program.
        stages: tiles that are loaded ahead.
    """

    m: int
    n: int
    k: int
    splits: int
    warps: int
    stages: int


def matmul(
    x: Float[Array, "*stack M K"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"]:
    """What `matmul_reference.matmul` computes, up to rounding; the reference itself where `unsupported` says why.

    Args:
        x, w, layer, casts, precision, preferred_element_type, transpose: as for the reference.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform.
    """
    chain = (w.dtype, *casts)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, chain[-1]))
    if unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose):
        return matmul_reference.matmul(
            x,
            w,
            layer=layer,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
            transpose=transpose,
        )
    *stack, m, k = x.shape
    x = gpu_operands.split(x.reshape(-1, m, k), gpu_operands.operand_dtype(x.dtype, chain))
    blocks = blocks or default_blocks(x.shape[1], k, w.layout.n, w.group_size, batch=x.shape[0])
    if w.group_size != k and w.group_size % blocks.k:
        raise ValueError(f"qjax: {blocks}: the size {w.group_size} of a group must be a multiple of k.")
    words, scales, zeros = (
        None if a is None else a.reshape(-1, *a.shape[-2:]) for a in (w.words, w.scales.values, w.scales.zero)
    )
    assert words is not None
    assert scales is not None
    kept = jnp.dtype(jnp.float32) if x.shape[1] > m or blocks.splits > 1 else out_dtype
    product = _Product(k, w.layout.n, w.spec.format.bits, w.group_size, w.order, kept, blocks)
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1)
    out = _call(product, index, x, words, scales, zeros, interpret)
    out = out[0] if blocks.splits == 1 else out.sum(axis=0)
    return gpu_operands.join(out, m).reshape(*stack, m, w.layout.n).astype(out_dtype)


def finds_device() -> bool:
    """Whether there is the device, of this machine or abstract, that Triton's lowering asks for from jax 0.11 on."""
    if jax.__version_info__ < (0, 11):
        return True
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract is not None or jax.devices()[0].platform == "gpu"


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape and a dtype."""
    if reason := gpu_operands.unsupported(x, w, casts, out_dtype, precision, transpose):
        return reason
    if pltriton is None:
        return "this version of JAX has no Triton"
    if w.group_size != w.layout.k and w.group_size % _LEAST_K:
        return f"the size of a group must be a multiple of {_LEAST_K}"
    return None


_LEAST_K, _MOST_K = 32, 64
_PROCESSORS = 108  # streaming multiprocessors of an NVIDIA A100


def default_blocks(m: int, k: int, n: int, group: int, *, batch: int = 1) -> Blocks:
    """Tiles by shape alone: tall ones for many rows of x, enough programs for every multiprocessor. Nothing was timed.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix.
        group: values that share a scale, k if all of K does.
        batch: products of this size.
    """
    rows = min(128, max(16, pl.next_power_of_2(m)))
    columns = min(128 if rows > 16 else 64, max(16, pl.next_power_of_2(n)))
    depth = _MOST_K if group == k or group % _MOST_K == 0 else _LEAST_K
    tiles = batch * pl.cdiv(m, rows) * pl.cdiv(n, columns)
    splits = max(1, min(2 * _PROCESSORS // tiles, pl.cdiv(k, 8 * depth), 16))
    return Blocks(m=rows, n=columns, k=depth, splits=splits, warps=8 if rows * columns >= 128 * 128 else 4, stages=4)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands."""

    k: int
    n: int
    bits: int
    group: int
    order: str
    out_dtype: Any
    blocks: Blocks


def _call(
    product: _Product,
    layer: Int[Array, " 1"],
    x: Float[Array, "B M K"],
    words: Int[Array, "LB _ _"],
    scales: Float[Array, "LB _ _"],
    zeros: Int[Array, "LB _ _"] | None,
    interpret: bool,
) -> Float[Array, "splits B M N"]:
    """The product with each matrix of one layer of the stack, in parts along K."""
    blocks, (stack, m, _) = product.blocks, x.shape
    operands = [layer, x, words, scales, *([] if zeros is None else [zeros])]
    return pl.pallas_call(
        functools.partial(_kernel, product, stack),
        out_shape=jax.ShapeDtypeStruct((blocks.splits, stack, m, product.n), product.out_dtype),
        grid=(pl.cdiv(product.n, blocks.n), pl.cdiv(m, blocks.m), stack * blocks.splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=pltriton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="quantized_matmul",
        interpret=interpret,
    )(*operands)


def _kernel(product: _Product, stack: int, layer_ref: Any, x_ref: Any, w_ref: Any, s_ref: Any, *refs: Any) -> None:
    """A tile of the result.

    Args:
        product: what is computed.
        stack: matrices of a layer.
        layer_ref: index of the layer.
        x_ref, w_ref, s_ref: x, words and scales.
        refs: zero points where there are some; the result.
    """
    *zero_refs, out_ref = refs
    blocks, kn = product.blocks, product.order == "kn"
    per_word = 8 if product.bits == 4 else 1
    matrix, part = lax.rem(pl.program_id(2), stack), lax.div(pl.program_id(2), stack)
    layers = w_ref.shape[0] // stack
    layer = layer_ref[0]
    layer = jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)  # as lax.dynamic_index_in_dim
    at = layer * stack + matrix
    rows = pl.program_id(1) * blocks.m + jnp.arange(blocks.m)
    columns = pl.program_id(0) * blocks.n + jnp.arange(blocks.n)
    steps = pl.cdiv(pl.cdiv(product.k, blocks.k), blocks.splits)

    def small(ref: Any, group: Any) -> Array:
        """Scales or zero points of a group, by column."""
        group, of = jnp.minimum(group, ref.shape[-2 if kn else -1] - 1), columns
        if ref.shape[-1 if kn else -2] == 1:  # one for the whole matrix
            of = jnp.zeros_like(columns)
        source = ref.at[(at, group, of) if kn else (at, of, group)]
        return pltriton.load(source, mask=columns < product.n, other=0)

    def step(i: Any, sums: Array) -> Array:
        first = (part * steps + i) * blocks.k
        ks = first + jnp.arange(blocks.k)
        x = pltriton.load(
            x_ref.at[matrix, rows[:, None], ks[None, :]],
            mask=(rows[:, None] < x_ref.shape[1]) & (ks[None, :] < product.k),
            other=0,
        )
        units = lax.div(first, per_word) + jnp.arange(blocks.k // per_word)
        across, along = (columns[None, :], units[:, None]) if kn else (columns[:, None], units[None, :])
        words = pltriton.load(
            w_ref.at[(at, along, across) if kn else (at, across, along)],
            mask=(across < product.n) & (along < w_ref.shape[-2 if kn else -1]),
            other=0,
        )
        codes = (_unpack(words if kn else words.T) if product.bits == 4 else words if kn else words.T).astype(x.dtype)
        group = 0 if product.group == product.k else lax.div(first, product.group)
        if zero_refs:
            codes -= small(zero_refs[0], group).astype(x.dtype)[None, :]
        added = pltriton.dot(x, codes)
        if product.group != product.k:
            added *= small(s_ref, group).astype(jnp.float32)[None, :]
        return sums + added

    sums = lax.fori_loop(0, steps, step, jnp.zeros((blocks.m, blocks.n), jnp.float32))
    if product.group == product.k:
        sums *= small(s_ref, 0).astype(jnp.float32)[None, :]
    pltriton.store(
        out_ref.at[part, matrix, rows[:, None], columns[None, :]],
        sums.astype(product.out_dtype),
        mask=(rows[:, None] < x_ref.shape[1]) & (columns[None, :] < product.n),
    )


def _unpack(words: Int[Array, "R N"]) -> Int[Array, "_ N"]:
    """Codes of 4 bits, as int32: word r holds those of k = 8r .. 8r + 7, the lowest in the lowest bits."""
    r, n = words.shape
    shifts = 28 - 4 * lax.broadcasted_iota(jnp.int32, (r, 8, n), 1)
    spread = lax.broadcast_in_dim(words, (r, 8, n), (0, 2))
    return ((spread << shifts) >> 28).reshape(8 * r, n)
