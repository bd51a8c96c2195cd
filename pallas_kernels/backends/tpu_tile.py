"""Packed words to codes inside a Pallas kernel for TPU: what `packing.unpack` gives, one tile of it.

What costs time on a TPU is arithmetic on unpacked values. So fields are widened while they are still packed, four or
eight to a 32-bit lane, until `pltpu.bitcast` can read them: it gives row r of int32 words as rows 8r .. 8r+7 of int4,
lowest bits first, and takes no operation at all. That is the canonical packing, so formats of 2, 4 and 8 bits need
nothing else. The planes of a format of 3, 5, 6 or 7 bits are spread and put together to words of int4 (3 bits) or int8
in some 20 operations for 8192 or 4096 values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8, Num

from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.numbers.packing import PLANES, WORD_BITS

SUBLANES, LANES = 8, 128
"""Height and width of a vector register of 32-bit values."""

K_MULTIPLE = 256
"""Tiles are multiples of this along K, so that even a plane of single bits has a whole number of registers in each."""

_SIGNED = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}

_UNSIGNED = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}


def round_up(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


@dataclasses.dataclass(frozen=True)
class Window:
    """The rows of the packed words that one operand of a kernel holds for tile i along K.

    In units of a block of `rows` rows, it is block `first + step * i`, the same one for every tile where `step` is 0;
    rows beyond the array are not defined.
    """

    rows: int
    first: int
    step: int


def windows(format: Format, k: int, bk: int, unit: int = 1) -> list[Window]:
    """How packed words with K = `k` enter a kernel in tiles of `bk`, a multiple of `K_MULTIPLE`: one window an operand.

    Each operand is the whole array of words. The planes of a format lie one after another in it, so each plane has a
    window of its own. Where the tiles do not divide K, a plane does not start at a multiple of its window: then one
    window holds all rows, and `load` cuts it. So it is where windows must be multiples of `unit` rows and are not:
    where rows of words lie along the lanes, that is `LANES`.
    """
    parts = _parts(format, k, bk)
    if all(rows % unit == 0 for _, rows in parts) and (len(parts) == 1 or k % bk == 0):
        return [Window(rows, start // rows, 1) for start, rows in parts]
    tiles = -(-k // bk)
    most = max(_aligned(start) + tiles * rows + SUBLANES for start, rows in parts)
    return [Window(-(-most // unit) * unit, 0, 0)]


def load(refs: Sequence[Any], format: Format, k: int, bk: int, i: Any) -> Int[Array, "R N"]:
    """The words of tile i along K, from the operands that `windows` describes; one code after another, see `rows`."""
    parts = _parts(format, k, bk)
    if [ref.shape[0] for ref in refs] == [height for _, height in parts]:
        planes = [ref[...] for ref in refs]
    else:
        planes = []
        for start, height in parts:
            first = pl.multiple_of(_aligned(start) + i * height, SUBLANES)  # Mosaic loads from nowhere else
            block = refs[0][pl.ds(first, height + SUBLANES), :]
            planes.append(pltpu.roll(block, (block.shape[0] - start % SUBLANES) % block.shape[0], 0)[:height])
    return planes[0] if len(planes) == 1 else _join(planes, format.bits)


def rows(format: Format, k: int) -> int:
    """Rows of what `load` gives for K = `k`: a tile of groups that are multiples of `LANES` can be cut into them."""
    return k if format.bits == 8 else k * _field(format.bits) // WORD_BITS


def codes(words: Int[Array, "R N"], format: Format, dtype: Any) -> Num[Array, "K N"]:
    """The codes of a tile: integers as they are, of codebooks and floats the unscaled value that each stands for.

    Args:
        words: what `load` gave, or some rows of it; N is a multiple of `LANES`.
        format: of the packed words.
        dtype: of the result. It must hold the codes: int8 (not for codebooks and floats), bfloat16 (which rounds the
            values of NF4) or float32.
    """
    if format.kind == "float":
        return pltpu.bitcast(words, jnp.dtype(format.dtype)).astype(dtype)
    if words.dtype != jnp.int8:
        words = pltpu.bitcast(words, _SIGNED[_field(format.bits)])
    if not format.values:
        return words.astype(dtype)
    if dtype == jnp.bfloat16:
        return _look_up_pairs(words.astype(jnp.int32), format.values)
    return _look_up(words.astype(jnp.int32), format.values).astype(dtype)


BIAS = 136
"""What `biased_codes` adds."""


def can_bias(format: Format) -> bool:
    """Whether `biased_codes` has the codes of a format: integers whose fields are of 4 bits."""
    return format.kind == "int" and format.bits < 8 and _field(format.bits) == 4


def biased_codes(words: Int[Array, "16 N"]) -> Float[Array, "128 N"]:
    """The codes of 16 rows of words, plus `BIAS`, in bfloat16 and in the order of `reordered`.

    128 + n with n below 128 has the bits 0x4300 + n in bfloat16, so that codes need no conversion, only a mask, two to
    a 32-bit lane. Worth it on chips whose vector unit has no bfloat16, where a conversion goes through float32.
    """
    words ^= _every(4, 8)  # from -8 .. 7 to 0 .. 15
    planes = [lax.shift_right_logical(words, jnp.int32(4 * i)) if i else words for i in range(4)]
    exponent, mantissa = _every(16, 0x4300), _every(16, 0xF)
    return jnp.concatenate([pltpu.bitcast(plane & mantissa | exponent, jnp.bfloat16) for plane in planes])


def can_gather_bytes(format: Format) -> bool:
    """Whether `gathered_codes` has the values of a format: a codebook of 16."""
    return len(format.values) == 16


def gathered_codes(words: Int[Array, "R N"], format: Format) -> Float[Array, "_ N"]:
    """The values of 4-bit codes in bfloat16, those of each 16 rows of words in the order of `reordered`.

    For chips that gather bytes, each from any of the 32 rows of a register: the low and the high bytes of values come
    from a table each, four at a time, where `codes` gathers one value. What is left is to put the two side by side.
    """
    n = words.shape[1]
    low, high = (_bytes_in_rows(format.values, shift, n) for shift in (0, 8))
    ends = pltpu.bitcast(jnp.full(words.shape, _every(16, 0xFF), jnp.int32), jnp.int8) != 0  # bytes 0 and 2 of a lane

    def gather(table: Int8[Array, "32 N"], index: Int[Array, "R N"]) -> Int[Array, "R N"]:
        codes = pltpu.bitcast(index, jnp.int8).reshape(-1, *table.shape)
        table = jnp.broadcast_to(table, codes.shape)
        found = jnp.take_along_axis(table, codes, axis=1, mode="promise_in_bounds")
        return pltpu.bitcast(found.reshape(-1, n), jnp.int32)

    def choose(a: Int[Array, "R N"], b: Int[Array, "R N"]) -> Float[Array, "2*R N"]:
        return pltpu.bitcast(jnp.where(ends, pltpu.bitcast(a, jnp.int8), pltpu.bitcast(b, jnp.int8)), jnp.bfloat16)

    even, odd = (
        (gather(low, index), gather(high, index))
        for index in (words & _every(8, 0xF), lax.shift_right_logical(words, jnp.int32(4)) & _every(8, 0xF))
    )
    planes = [choose(lows, highs << 8) for lows, highs in (even, odd)]
    planes += [choose(lax.shift_right_logical(lows, jnp.int32(8)), highs) for lows, highs in (even, odd)]
    height = LANES // len(planes)
    chunks = range(0, 2 * words.shape[0], height)
    return jnp.concatenate([plane[i : i + height] for i in chunks for plane in planes])


def reordered(x: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """Each 128 columns in the order in which `biased_codes` and `gathered_codes` have rows.

    A product with a permutation, which the matrix unit does exactly and without the unit that moves data between lanes.
    """
    row, column = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    moves = (row == origin(column)).astype(jnp.float32).astype(x.dtype)
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    moved = jnp.dot(jnp.concatenate(parts), moves, preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.concatenate([moved[i * x.shape[0] : (i + 1) * x.shape[0]] for i in range(len(parts))], axis=1)


def origin(position: Int[Array, "*S"]) -> Int[Array, "*S"]:
    """Which of some codes `reordered` has at a position: of each 128 of them 0, 4, 8 ... 124, 1, 5 ... 125, 2 ...."""
    return (position & -LANES) + ((position & 31) << 2) + ((position & LANES - 1) >> 5)


def _parts(format: Format, k: int, bk: int) -> list[tuple[int, int]]:
    """For each plane its first row, and its rows in a tile."""
    if format.bits == 8:
        return [(0, bk)]
    parts, start = [], 0
    for width in PLANES[format.bits]:
        parts.append((start, bk * width // WORD_BITS))
        start += -(-k * width // WORD_BITS)
    return parts


def _aligned(row: int) -> int:
    return row // SUBLANES * SUBLANES


def _field(bits: int) -> int:
    """The narrowest field that a code of `bits` bits fits into and that a bitcast can read."""
    return next(field for field in _SIGNED if field >= bits)


def _join(planes: Sequence[Int[Array, "_ N"]], bits: int) -> Int[Array, "R N"]:
    """Words of signed codes, each in a field of its own, from the planes of a format."""
    field = _field(bits)
    words, low = jnp.int32(0), 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        part = _spread(plane, width, field)
        words |= part << low
        low += width
    sign = (part >> (width - 1)) & _every(field, 1)  # the topmost bit of the last plane
    return words | sign * (2**field - 2**bits)


def _spread(plane: Int[Array, "_ N"], width: int, field: int) -> Int[Array, "R N"]:
    """Words with fields of `field` bits, whose low bits are the fields of `width` bits of a plane, in order."""
    count = WORD_BITS // field
    words = pltpu.bitcast(plane, _UNSIGNED[count * width]).astype(jnp.int32)
    while count > 1:  # the upper half of the fields moves away from the lower, in each part that moved before
        count //= 2
        words = (words | words << (count * (field - width))) & _every(count * field, 2 ** (count * width) - 1)
    return words


def _every(distance: int, bits: int) -> Int[Array, ""]:
    """The int32 in which `bits` appear at bit 0, `distance`, twice `distance` ..."""
    pattern = sum(bits << shift for shift in range(0, WORD_BITS, distance))
    return jnp.int32(pattern - 2**WORD_BITS if pattern >= 2 ** (WORD_BITS - 1) else pattern)


def _bfloat16_bits(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float32).astype(jnp.bfloat16).view(np.uint16)


def _in_rows(entries: np.ndarray, dtype: Any, n: int) -> Num[Array, "8 N"]:
    """A register of each row of which is one entry, as often as columns need it."""
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    table = jnp.full(row.shape, entries[0].item(), dtype)
    for i, entry in enumerate(entries[1:], 1):
        table = jnp.where(row == i, jnp.asarray(entry.item(), dtype), table)
    return jnp.tile(table, (1, n // LANES))


def _bytes_in_rows(values: Sequence[float], shift: int, n: int) -> Int8[Array, "32 N"]:
    """The bytes of 16 values in bfloat16 from bit `shift` on, each in the row of its index, and again 16 rows below."""
    table = (_bfloat16_bits(values) >> shift & 0xFF).astype(np.uint8)
    return pltpu.bitcast(_in_rows(np.tile(table, 2).view(np.int32), jnp.int32, n), jnp.int8)  # four rows to a lane


def _gather_rows(table: Num[Array, "8 N"], code: Int[Array, "K N"]) -> Num[Array, "K N"]:
    """Of each column of the table the row that the low three bits of a code say.

    A gather from 8 rows is an operation or two of the vector unit, a gather from 128 lanes holds up the one unit that
    moves data between lanes.
    """
    row = (code & 7).reshape(-1, *table.shape)
    table = jnp.broadcast_to(table, row.shape)
    return jnp.take_along_axis(table, row, axis=1, mode="promise_in_bounds").reshape(code.shape)


def _look_up(code: Int[Array, "K N"], values: Sequence[float]) -> Float[Array, "K N"]:
    """The values of 4-bit codes, -8 .. 7 for 8 .. 15, 0 .. 7; a tree of selects would take fifteen operations."""
    low, high = (
        _in_rows(np.asarray(half, np.float32), jnp.float32, code.shape[1]) for half in (values[:8], values[8:])
    )
    return jnp.where(code < 0, _gather_rows(high, code), _gather_rows(low, code))


def _look_up_pairs(code: Int[Array, "K N"], values: Sequence[float]) -> Float[Array, "K N"]:
    """As `_look_up`, in bfloat16: one table has both values that a code may stand for, and its sign shifts one down."""
    low, high = np.split(_bfloat16_bits(values).astype(np.uint32), 2)
    pair = _gather_rows(_in_rows((low | high << 16).view(np.int32), jnp.int32, code.shape[1]), code)
    return pltpu.bitcast(lax.shift_right_logical(pair, code & 16).astype(jnp.int16), jnp.bfloat16)
