"""Codes to words and back: how values of 2 to 8 bits lie in memory.

Formats of 8 bits are stored as they are, one int8 each, `(*stack, K, N)`: every backend reads int8 directly, so
packing them four to a word would only add an unpack step.

Below 8 bits, codes are packed along K into int32 words `(*stack, R, N)`; column n of the words holds column n of
the matrix. 4-bit codes: word r holds k = 8r .. 8r+7, the lowest k in the lowest nibble, as
`lax.bitcast_convert_type(word, int4)` reads it. A 2-bit word holds 16 codes. Other widths are split into bit planes
whose widths are powers of two, widest first, low bits of the code first, and the planes are stacked along the row
axis:

    bits  planes
    2     2
    3     2 + 1
    4     4
    5     4 + 1
    6     4 + 2
    7     4 + 2 + 1

Example: 3-bit codes of K = 40 values. The plane of the low two bits packs 16 values in a word: rows 0-2, with
k = 0..15, 16..31, 32..39 (the rest zero). The plane of the high bit packs 32 values in a word: rows 3-4. The code
-3 = 0b101 at k = 17 is 0b01 in bits 2-3 of row 1 and 0b1 in bit 17 of row 3. R = packed_rows(40, int3) = 5.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8

from qjax.pallas_kernels.numbers.formats import Format

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}

WORD_BITS = 32


def packed_rows(k: int, format: Format) -> int:
    """Rows R of the packed words of a matrix with K = `k`."""
    if format.bits == 8:
        return k
    return sum(_plane_rows(k, width) for width in PLANES[format.bits])


def pack(codes: Int8[Array, "*stack K N"], format: Format) -> Int[Array, "*stack R N"]:
    """Packs codes along K: int32 words, or the codes themselves for an 8-bit format.

    Args:
        codes: what `numerics.quantize` returns; only the low `format.bits` bits of each are stored.
        format: says how many bits a code has.
    """
    if format.bits == 8:
        return codes
    *stack, k, n = codes.shape
    planes, shift = [], 0
    for width in PLANES[format.bits]:
        per_word, rows = WORD_BITS // width, _plane_rows(k, width)
        bits = (codes.astype(jnp.int32) >> shift) & (2**width - 1)
        bits = jnp.pad(bits, [(0, 0)] * len(stack) + [(0, rows * per_word - k), (0, 0)])
        bits = bits.reshape(*stack, rows, per_word, n)
        # The fields do not overlap, so their sum is their union; int32 wraps as two's complement.
        words = jnp.sum(bits << _offsets(bits.shape, width), axis=-2, dtype=jnp.int32)  # (*stack, rows, N)
        planes.append(words)
        shift += width
    return jnp.concatenate(planes, axis=-2)


def unpack(words: Int[Array, "*stack R N"], format: Format, k: int) -> Int8[Array, "*stack {k} N"]:
    """The codes that `pack` stored: signed for int formats, `0 .. 2**bits - 1` for codebooks.

    Args:
        words: packed words, or int8 codes of an 8-bit format.
        format: says how the words are laid out and whether codes are signed.
        k: the number of values K, which the words alone do not tell.
    """
    if format.bits == 8:
        return words
    *stack, _, n = words.shape
    codes, shift, row = jnp.zeros((*stack, k, n), jnp.int8), 0, 0
    for width in PLANES[format.bits]:
        per_word, rows = WORD_BITS // width, _plane_rows(k, width)
        plane = lax.slice_in_dim(words, row, row + rows, axis=words.ndim - 2)[..., :, None, :]
        plane = jnp.broadcast_to(plane, (*stack, rows, per_word, n))
        bits = (plane >> _offsets(plane.shape, width)).astype(jnp.int8) & (2**width - 1)
        bits = bits.reshape(*stack, rows * per_word, n)
        codes |= lax.slice_in_dim(bits, 0, k, axis=bits.ndim - 2) << shift
        shift, row = shift + width, row + rows
    if format.kind == "int":
        unused = 8 - format.bits
        codes = (codes << unused) >> unused
    return codes


def _plane_rows(k: int, width: int) -> int:
    return -(-k * width // WORD_BITS)


def _offsets(shape: tuple[int, ...], width: int) -> Array:
    """How far each field of `(..., per_word, N)` lies from the lowest bit of its word."""
    return width * lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
