"""`cache_dot_general` on TPU: a Pallas kernel that reads the packed cache as it is stored.

The grid runs over sequences, over tiles of the rows of x and over tiles of positions; a tile has all heads. Rows of x
are all queries, and all query heads, that read the same head of the cache: grouped queries read it once.

**Where XLA puts things.** A TPU array lies in tiles whose last axis fills 128 lanes, and XLA chooses as last the axis
that wastes least. A transpose outside of the kernel to that order moves nothing; to any other it would copy the cache.
So of a cache `[batch, position, head, dim]` the kernel reads

    vectors of 128 bytes, heads by fours   [batch, position * head, dim]    as they are stored
    other vectors of 128 bytes             [batch, head, position, dim]
    shorter ones, and all packed words     [batch, head, dim, position]
    scales and zero points                 [batch, head, position]

In the last two, positions fill lanes. Packed words, which lie along the vector, become codes by a bitcast (`tpu_tile`),
and the tile is the matrix that queries are multiplied by. In the first, a 32-bit lane has codes of four heads, and each
head takes its byte out of every lane. Where a program needs another order, and of 4 heads of more than 128 values, XLA
copies the codes before the kernel; keys that a program repeats for the queries that share them, it repeats in memory.

`unsupported` says what is left to plain operations: formats of other widths, codebooks and floats, and vectors whose
codes do not fill registers of 8 rows (8-bit vectors of a multiple of 32 values do, 4-bit of 64, 2-bit of 128).

**Numerics.** As `cache_dot.reference`: codes are exact in bfloat16; x in bfloat16, or in float32 at default precision
(the single pass that XLA makes of it on TPU), is multiplied in bfloat16, at a higher precision in float32; sums are
float32; scales go on scores after, on probabilities before the product. A zero point is subtracted from the sum, as
`zero * sum(x)`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.tpu_operands import no_float16, operand_dtype
from qjax.pallas_kernels.backends.tpu_tile import LANES, SUBLANES, round_up
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.numbers.packing import WORD_BITS
from qjax.pallas_kernels.ops.cache_dot.axes import View, restored, rows_of, sides
from qjax.pallas_kernels.packed.qcache import QCache

_BYTES = 4  # of a 32-bit lane

_MOST_ROWS = 128

# Values of the cache in a tile: reading them takes several times as long as a step of the grid does by itself.
_TILE = 2**20

VMEM = 11 * 2**20  # of the 16 MiB that a kernel has; the rest is for what `_vmem` does not count


def unsupported(
    x: Any, cache: QCache, *, numbers: Any, operand: Literal[0, 1], precision: Any, out_dtype: Any
) -> str | None:
    """Why a dot is left to plain operations, or None; arguments as for `cache_dot.reference`, arrays or their types."""
    format = cache.spec.format
    if format.kind != "int" or format.bits not in (2, 4, 8):
        return "the kernel reads integers of 2, 4 and 8 bits"
    if any(dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) for dtype in (x.dtype, out_dtype)):
        return "the kernel multiplies float32, bfloat16 and float16"
    if not all(isinstance(size, int) for size in (*x.shape, *cache.shape)):
        return "sizes are symbols"
    if 0 in (*x.shape, *cache.shape):
        return "empty"
    if cache.size % (SUBLANES * WORD_BITS // format.bits):
        return "vectors do not fill whole registers"
    return None if view_of(x, cache, numbers, operand) else "no tile fits into VMEM"


def dot_general(
    x: Float[Array, "*_"],
    cache: QCache,
    *,
    numbers: Any,
    operand: Literal[0, 1],
    precision: Any,
    out_dtype: Any,
    interpret: bool = False,
) -> Float[Array, "*_"]:
    """What `cache_dot.reference` computes, up to rounding, where `unsupported` has nothing to say.

    Args:
        x, cache, numbers, operand, precision, out_dtype: as there.
        interpret: runs the kernel as XLA operations, on any platform.
    """
    view = view_of(x, cache, numbers, operand)
    assert view is not None
    dtype = operand_dtype(x.dtype, x.dtype, precision)
    written = jnp.dtype(jnp.float32) if out_dtype == jnp.float16 else jnp.dtype(out_dtype)
    codes, small = stored(cache, view, numbers, operand)
    out = _call(view, cache, dtype, rows_of(no_float16(x), view, numbers, operand), codes, small, written, interpret)
    return restored(out, x.shape, cache, view, numbers, operand).astype(out_dtype)


def stored(cache: QCache, view: View, numbers: Any, operand: int) -> tuple[Array, list[Array]]:
    """The codes in the form of the view, and scales `(B, H, T)`, with zero points after them where there are some."""
    vector = cache.axis + cache.ndim
    own_batch = numbers[1][operand]
    batch = [own_batch[i] for i in view.batch]
    units = [i for i in range(cache.ndim) if i not in (*batch, *view.tokens, vector)]

    def arranged(a: Array, axes: list[int], *shape: int) -> Array:
        return a.transpose(*units, *axes).reshape(view.lead, *shape)

    if view.form == "heads":
        codes = cache.codes.reshape(view.lead, view.t * view.heads, view.d)
    elif view.form == "rows":
        codes = arranged(cache.codes, [*batch, *view.tokens, vector], view.heads, view.t, view.d)
    else:
        codes = arranged(cache.codes, [*batch, vector, *view.tokens], view.heads, -1, view.t)
    small = [
        arranged(jnp.expand_dims(no_float16(a), vector), [*batch, *view.tokens, vector], view.heads, view.t)
        for a in (cache.scale, cache.zero)
        if a is not None
    ]
    return codes, small


def stored_together(stack: QCache, view: View, numbers: Any, operand: int) -> Array:
    """The codes of a stack of caches, one after another, in the form of the view.

    Args:
        stack: the caches along the first axis; the rest is said of one of them.
        view, numbers, operand: as for `stored`.
    """
    codes = jax.vmap(lambda one: stored(one, view, numbers, operand)[0])(stack)
    return codes.reshape(-1, *codes.shape[2:])


# --- Tiles ----------------------------------------------------------------------------------------------------------


def view_of(x: Any, cache: QCache, numbers: Any, operand: int, vmem: int = VMEM) -> View | None:
    """How the kernel sees a dot, or None where no tile fits into VMEM."""
    (own_contract, own_batch), (x_contract, x_batch) = sides(numbers, operand)
    vector, shape = cache.axis + cache.ndim, cache.shape
    scores = vector in own_contract
    free = [i for i in range(cache.ndim) if i not in (*own_contract, *own_batch)]
    tokens = tuple(free if scores else sorted(own_contract))
    batch = tuple(sorted(range(len(own_batch)), key=own_batch.__getitem__))
    stored = [own_batch[i] for i in batch]
    m = math.prod(x.shape[i] for i in range(x.ndim) if i not in (*x_contract, *x_batch))
    t = math.prod(shape[i] for i in tokens)

    def view(form: Any, count: int) -> View | None:
        """With so many of the last batch axes as heads."""
        lead = len(stored) - count
        sequences, heads = (math.prod(shape[i] for i in axes) for axes in (stored[:lead], stored[lead:]))
        kind = "scores" if scores else "values"
        return _tiled(View(kind, form, batch, sequences, heads, tokens, t, m, cache.size), cache, vmem)

    whole = cache.spec.format.bits == 8 and cache.size % LANES == 0
    inside = [i for i in stored if i > min(tokens, default=-1)]
    together = whole and [*range(cache.ndim)] == [*stored[: len(stored) - len(inside)], *tokens, *inside, vector]
    count = math.prod(shape[i] for i in inside)
    if together and (count == _BYTES or count % SUBLANES == 0):
        return view("heads", len(inside))
    form = "rows" if whole and vector > max(tokens, default=-1) else "columns"
    return view(form, min(len(stored), 1)) or view(form, 0)


def _tiled(view: View, cache: QCache, vmem: int) -> View | None:
    """With the largest tile that fits into VMEM."""
    rows = min(view.m, _MOST_ROWS)
    most = max(LANES, min(_TILE // (view.heads * view.d), round_up(view.t, LANES)) // LANES * LANES)
    while True:
        for positions in range(most, 0, -LANES):
            tiled = dataclasses.replace(view, rows=rows, positions=_even(view.t, positions))
            if _vmem(tiled, cache) <= vmem:
                return tiled
        if rows <= 2 * SUBLANES:
            return None
        rows = round_up(rows // 2, 2 * SUBLANES)


def _even(size: int, most: int) -> int:
    """The multiple of `LANES` up to `most` with which the last of the tiles that cover `size` is as full as can be."""
    return round_up(-(-size // -(-size // most)), LANES)


def _vmem(view: View, cache: QCache) -> int:
    """Bytes of the windows, each of which Pallas holds twice, of the scratch and of the codes of a head."""
    rows, heads = round_up(view.rows, SUBLANES), round_up(view.heads, SUBLANES)
    values = view.positions * view.d
    windows = view.heads * values * cache.spec.format.bits // 8
    windows += heads * view.positions * 4 * (1 if cache.zero is None else 2)
    windows += view.heads * rows * (view.positions + view.d) * 4
    copied = view.heads * values if view.form == "heads" and view.d > LANES else 0
    return 2 * windows + view.heads * rows * view.d * 4 + 2 * values * 4 + copied


# --- The kernel -----------------------------------------------------------------------------------------------------


def _call(
    view: View,
    cache: QCache,
    dtype: Any,
    x: Float[Array, "B H M _"],
    codes: Array,
    small: list[Array],
    out_dtype: Any,
    interpret: bool,
) -> Float[Array, "B H M _"]:
    """The products of each sequence: `small` has scales `(B, H, T)`, and zero points where there are some."""
    h, m, t = view.heads, view.rows, view.positions
    by_vector = pl.BlockSpec((None, h, m, view.d), lambda b, i, s: (b, 0, i, 0))
    by_position = pl.BlockSpec((None, h, m, t), lambda b, i, s: (b, 0, i, s))
    scores = view.kind == "scores"
    scratch = [] if scores else [pltpu.VMEM((h, m, view.d), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_kernel, view, cache.spec.format, cache.zero is not None, dtype),
        out_shape=jax.ShapeDtypeStruct((*x.shape[:-1], view.t if scores else view.d), out_dtype),
        grid=(view.lead, pl.cdiv(view.m, m), pl.cdiv(view.t, t)),
        in_specs=[
            by_vector if scores else by_position,
            window(view, codes),
            *(pl.BlockSpec((None, h, t), lambda b, i, s: (b, 0, s)) for _ in small),
        ],
        out_specs=by_position if scores else by_vector,
        scratch_shapes=[*scratch, *copies(view)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel" if scores else "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * (view.t if scores else view.d),
            bytes_accessed=cache.nbytes + x.nbytes + x.size // x.shape[-1] * (view.t if scores else view.d) * 4,
            transcendentals=0,
        ),
        name=f"cache_{view.kind}",
        interpret=interpret,
    )(x, codes, *small)


def window(view: View, codes: Array, first: Callable[..., Any] = lambda: 0) -> pl.BlockSpec:
    """The tile of the codes at step s along the positions of sequence b, of a grid (b, _, s).

    Args:
        view, codes: of the cache.
        first: which sequence of the codes is the first one, from the prefetched scalars.
    """
    h, t = view.heads, view.positions
    if view.form == "heads":
        return pl.BlockSpec((1, t * h, view.d), lambda b, i, s, *p: (first(*p) + b, s, 0))
    if view.form == "rows":
        return pl.BlockSpec((None, h, t, view.d), lambda b, i, s, *p: (first(*p) + b, 0, s, 0))
    return pl.BlockSpec((None, h, codes.shape[2], t), lambda b, i, s, *p: (first(*p) + b, 0, 0, s))


def copies(view: View) -> list[Any]:
    """The scratch that `read` needs."""
    if view.form != "heads" or view.d == LANES:
        return []
    return [pltpu.VMEM((view.positions * view.heads // _BYTES, LANES), jnp.int32)] * (view.d // LANES)


def _kernel(view: View, format: Format, zero_point: bool, dtype: Any, x_ref: Any, codes_ref: Any, *refs: Any) -> None:
    """The products of all heads with one tile of positions.

    Args:
        view, format, zero_point: of the cache.
        dtype: of the operands of the products.
        x_ref, codes_ref: tiles of x and of the codes.
        refs: scales, zero points where there are some; the result; for values, the sums; copies for `read`.
    """
    small, out_ref, scratch = refs[: 1 + zero_point], refs[1 + zero_point], refs[2 + zero_point :]
    scales, *zeros = (ref[...].astype(jnp.float32) for ref in small)
    step = pl.program_id(2)
    if view.kind == "values":
        sum_ref, *scratch = scratch

        @pl.when(step == 0)
        def _start() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

    codes_refs = read(view, codes_ref, scratch)
    for head in range(view.heads):
        codes = codes_of(view, format, dtype, codes_refs, head)
        scale, *zero = (a[head : head + 1] for a in (scales, *zeros))  # (1, T)
        x = x_ref[head]
        if view.kind == "scores":
            x = x.astype(dtype)
            scores = dot(x, codes, dtype, 0 if view.form == "columns" else 1)
            if zero:
                scores -= jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True) * zero[0]
            out_ref[head] = (scores * scale).astype(out_ref.dtype)
            continue
        x = x.astype(jnp.float32) * scale
        if view.t % view.positions:  # scales and x beyond the last position are anything
            position = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(position < view.t - step * view.positions, x, 0)
        x = x.astype(dtype)
        values = dot(x, codes, dtype, 1 if view.form == "columns" else 0)
        if zero:
            values -= jnp.sum(x.astype(jnp.float32) * zero[0], axis=1, keepdims=True)
        sum_ref[head] += values

    if view.kind == "values":

        @pl.when(step == pl.num_programs(2) - 1)
        def _finish() -> None:
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def codes_of(view: View, format: Format, dtype: Any, refs: Sequence[Any], head: int) -> Float[Array, "_ _"]:
    """The codes of one head: `(T, D)`, or `(D, T)` in the form "columns"; the references are those of `read`."""
    if view.form != "heads":
        return tpu_tile.codes(refs[0][head], format, dtype)
    words, byte = divmod(head, _BYTES)
    every = pl.ds(words, view.positions, stride=view.heads // _BYTES)
    lanes = jnp.concatenate([ref[every, :] for ref in refs], axis=1)
    # the byte of this head, with its sign
    return ((lanes << (24 - 8 * byte)) >> 24).astype(jnp.float32).astype(dtype)


def read(view: View, codes_ref: Any, scratch: Sequence[Any]) -> list[Any]:
    """The codes as `codes_of` takes them: in the form "heads" 32-bit lanes, 128 side by side, as strided loads want."""
    if view.form != "heads":
        return [codes_ref]
    words = codes_ref.bitcast(jnp.int32)
    if not scratch:
        return [words.at[0]]
    for i, copy in enumerate(scratch):
        copy[...] = words[0, :, i * LANES : (i + 1) * LANES]
    return list(scratch)


def dot(x: Array, codes: Array, dtype: Any, axis: int) -> Float[Array, "M _"]:
    """Contracts the last axis of x with this one of the codes."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, codes, dimensions, precision=precision, preferred_element_type=jnp.float32)
