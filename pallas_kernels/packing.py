"""Codes to packed words and back.

Sub-byte codes are packed along K into int32 words. Code k of a 4-bit column lies in word k // 8, low bits first, so
word 0 = code0 | code1 << 4 | ... | code7 << 28: what a bitcast of int32 to int4 gives without shifts on TPU and GPU.

Other widths are split into planes of 4, 2 and 1 bits, lowest bits first (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1), and the words of the planes follow each other along the row axis. Example, int3, K = 32: rows 0-1
hold the low two bits of all 32 codes (16 a word), row 2 their high bit (32 a word): 3 words, exactly 3 bits a code.
K is padded with code 0 to a multiple of the codes in a word of the narrowest plane.

8-bit codes stay int8 `(K, N)`: they need no unpacking on any backend, and XLA multiplies int8 directly.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8

from pallas_kernels.formats import Format

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def _padded(k: int, fmt: Format) -> int:
    per_word = 32 // min(_PLANES[fmt.bits])
    return -(-k // per_word) * per_word


def packed_rows(k: int, fmt: Format) -> int:
    """Rows of the packed array for K codes: int32 words, or bytes for 8-bit formats."""
    return k if fmt.bits == 8 else _padded(k, fmt) * fmt.bits // 32


def pack(codes: Int8[Array, "*stack K N"], fmt: Format) -> Int[Array, "*stack R N"]:
    """Packs codes along K; `unpack` is its exact inverse.

    Args:
        codes: signed integers, codebook indices or float bit patterns, as `numerics.quantize` gives them.
        fmt: their format.

    Returns:
        int32 words, R = `packed_rows(K, fmt)`; the int8 codes themselves for 8-bit formats.
    """
    if fmt.bits == 8:
        return codes
    *stack, k, n = codes.shape
    size = _padded(k, fmt)
    padding = [(0, 0)] * len(stack) + [(0, size - k), (0, 0)]
    bits = jnp.pad(codes, padding).astype(jnp.int32)
    rows, low = [], 0
    for width in _PLANES[fmt.bits]:
        per_word = 32 // width
        plane = lax.shift_right_logical(bits, low) & ((1 << width) - 1)
        plane = plane.reshape(*stack, size // per_word, per_word, n)
        word = jnp.zeros((*stack, size // per_word, n), jnp.int32)
        for i in range(per_word):
            word = word | lax.shift_left(plane[..., i, :], i * width)
        rows.append(word)
        low += width
    return jnp.concatenate(rows, axis=-2)


def unpack(words: Int[Array, "*stack R N"], fmt: Format, k: int) -> Int8[Array, "*stack K N"]:
    """The first `k` codes of packed words, as `pack` took them."""
    if fmt.bits == 8:
        return words[..., :k, :]
    *stack, _, n = words.shape
    size, start, low = _padded(k, fmt), 0, 0
    codes: Array | None = None
    for width in _PLANES[fmt.bits]:
        per_word = 32 // width
        rows = size // per_word
        word = lax.slice_in_dim(words, start, start + rows, axis=-2)[..., :, None, :]
        # The top plane of an integer carries the sign: shift it up to bit 31 and back down arithmetically.
        shifts = jnp.arange(per_word, dtype=jnp.int32)[:, None] * width
        top = low + width == fmt.bits and fmt.kind == "int"
        up = lax.shift_left(word, jnp.broadcast_to(32 - width - shifts, (*stack, rows, per_word, n)))
        down = lax.shift_right_arithmetic if top else lax.shift_right_logical
        plane = down(up, jnp.full(up.shape, 32 - width, jnp.int32)).reshape(*stack, size, n)
        codes = plane if codes is None else codes | lax.shift_left(plane, jnp.full(plane.shape, low, jnp.int32))
        start += rows
        low += width
    assert codes is not None
    return codes[..., :k, :].astype(jnp.int8)


def _offsets(shape: tuple[int, ...], width: int) -> Int[Array, "..."]:
    """How far each field of `(..., per_word, N)` lies from the lowest bit of its word."""
    return width * lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
