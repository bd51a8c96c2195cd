"""Codes of 4 bits to the values of a codebook inside a Mosaic GPU kernel, in registers.

`prmt` picks four of eight bytes, each by three bits. The 16 values are two tables of 16 bytes, their low and their high
ones: two instructions look up four codes in either half of a table, and a third one takes, by the highest bit of each
code, what one or the other found. 22 instructions unpack eight codes; to select values by the bits of a code would take
more than a hundred.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxtyping import Array, Float, Int


def look_up(
    codes: Int[Array, "N K"], values: Sequence[float], dtype: Any, *, interpret: bool = False
) -> Float[Array, "N K"]:
    """The value of each code, rounded to the dtype.

    Args:
        codes: int4, of which the bits count; in the layout of a left operand of `wgmma`, K a multiple of 32.
        values: 16 of them.
        dtype: of 16 bits.
        interpret: whether XLA operations are to do it.
    """
    if interpret:
        unsigned = codes.astype(jnp.int32) & 15
        rounded = [jnp.asarray(value, dtype) for value in values]
        each = enumerate(rounded[1:], 1)
        first = jnp.full(codes.shape, rounded[0])
        return functools.reduce(lambda found, one: jnp.where(unsigned == one[0], one[1], found), each, first)
    layout, tables = plgpu.Layout.WGMMA, byte_tables(values, dtype)
    result: Any = plgpu.ShapeDtypeStruct(codes.shape, jnp.dtype(dtype), layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=result)

    @inline
    def run(_: Any, codes: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        element = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
        pair = ir.VectorType.get((2,), element)

        def constant(value: int) -> Any:
            return mgpu.c(value, i32)

        do = Instructions(
            permute=utils.prmt,
            both=arith.andi,
            either=arith.ori,
            shift=arith.shrui,
            constant=constant,
        )
        # Registers of two codes, in the order of columns along axis 1; four of them came out of one of 32 bits.
        registers = np.moveaxis(codes.registers, 1, -1)
        found = []
        for four in registers.reshape(-1, 4):
            word = utils.bitcast(utils.vector_concat(list(four)), i32)
            found += [utils.bitcast(one, pair) for one in pairs(word, tables, do)]
        ordered = np.empty(len(found), dtype=object)
        ordered[:] = found
        like = mgpu.FragmentedArray.splat(mgpu.c(0.0, element), codes.shape, codes.layout)
        return jax.tree.unflatten(
            jax.tree.structure(like), list(np.moveaxis(ordered.reshape(registers.shape), -1, 1).flat)
        )

    return run(codes)


def byte_tables(values: Sequence[float], dtype: Any) -> tuple[list[int], list[int]]:
    """The low and the high bytes of 16 values of this dtype, four to a word, the first one in the lowest bits."""
    bits = np.asarray(values, dtype).view(np.uint16).astype(np.uint32).reshape(4, 4)
    places = 8 * np.arange(4, dtype=np.uint32)
    low, high = (((bits >> shift & 0xFF) << places).sum(axis=1) for shift in (0, 8))
    return [int(word) for word in low], [int(word) for word in high]


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What `pairs` is made of: instructions on registers of 32 bits; in a test, functions of integers.

    Attributes:
        permute: `prmt`: the bytes of two words, numbered from the lowest of the first one, that the four lowest digits
            of base 16 of the selector name.
        both, either, shift: bits that both words have, that either has, and moved towards the lowest.
        constant: a word.
    """

    permute: Callable[[Any, Any, Any], Any]
    both: Callable[[Any, Any], Any]
    either: Callable[[Any, Any], Any]
    shift: Callable[[Any, Any], Any]
    constant: Callable[[int], Any]


def pairs(word: Any, tables: tuple[Sequence[int], Sequence[int]], do: Instructions) -> list[Any]:
    """Four words of two values each: those of the eight codes of a word, the lowest first."""
    low, high = ([do.constant(one) for one in table] for table in tables)
    index = do.both(word, do.constant(0x77777777))
    half = do.either(do.shift(do.both(word, do.constant(0x88888888)), do.constant(1)), do.constant(0x32103210))
    found = []
    for part in range(2):
        if part:
            index, half = do.shift(index, do.constant(16)), do.shift(half, do.constant(16))
        lower, upper = (
            do.permute(do.permute(table[0], table[1], index), do.permute(table[2], table[3], index), half)
            for table in (low, high)
        )
        found += [do.permute(lower, upper, do.constant(selector)) for selector in (0x5140, 0x7362)]
    return found
