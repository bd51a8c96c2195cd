"""Packing: the layout against a pure Python reference, and properties of the round trip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from qjax.pallas_kernels.numbers.formats import FORMATS
from qjax.pallas_kernels.numbers.packing import pack, packed_rows, unpack

SUB_BYTE = [f for f in FORMATS.values() if f.bits < 8]
pack_jit = jax.jit(pack, static_argnums=1)
unpack_jit = jax.jit(unpack, static_argnums=(1, 2))


def random_codes(format, shape, seed=0):
    rng = np.random.default_rng(seed)
    low, high = (format.qmin, format.qmax + 1) if format.kind == "int" else (0, 2**format.bits)
    if format.kind == "float":
        low, high = -128, 128
    return rng.integers(low, high, shape).astype(np.int8)


def reference_words(column, bits):
    """The words of one column as Python integers, written from the layout that the module documents."""
    words, taken = [], 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        fields = [(int(code) >> taken) & (2**width - 1) for code in column]
        per_word = 32 // width
        for start in range(0, len(fields), per_word):
            words.append(sum(f << (width * i) for i, f in enumerate(fields[start : start + per_word])))
        taken += width
    return [w - 2**32 if w >= 2**31 else w for w in words]


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
@pytest.mark.parametrize("k", [1, 33, 64])
def test_layout_is_the_documented_one_and_unpack_inverts_it(format, k):
    codes = random_codes(format, (2, k, 3), seed=k)
    words = pack(jnp.asarray(codes), format)
    assert words.shape == (2, packed_rows(k, format), 3)
    if format.bits == 8:
        assert words.dtype == jnp.int8
        np.testing.assert_array_equal(words, codes)
    else:
        assert words.dtype == jnp.int32
        expected = [[reference_words(codes[s, :, n], format.bits) for n in range(3)] for s in range(2)]
        np.testing.assert_array_equal(words, np.asarray(expected).transpose(0, 2, 1))
    back = unpack(words, format, k)
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, codes)


def test_worked_example_of_the_docstring():
    codes = np.zeros((40, 1), np.int8)
    codes[17] = -3
    words = pack(jnp.asarray(codes), FORMATS["int3"])
    np.testing.assert_array_equal(words[:, 0], [0, 0b01 << 2, 0, 1 << 17, 0])


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_storage_is_exact_when_32_divides_k(format):
    word_bits = 8 if format.bits == 8 else 32
    for k in (32, 96, 4096):
        assert packed_rows(k, format) * word_bits == k * format.bits
    assert packed_rows(0, format) == 0


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_a_4_bit_word_is_what_a_bitcast_reads(name):
    codes = random_codes(FORMATS[name], (64, 5))
    words = pack(jnp.asarray(codes), FORMATS[name])
    native = lax.bitcast_convert_type(words, jnp.int4 if name == "int4" else jnp.uint4)  # (8, 5, 8): k innermost
    read = np.asarray(native.astype(jnp.int8)).transpose(0, 2, 1).reshape(64, 5)
    np.testing.assert_array_equal(read, codes)


@pytest.mark.parametrize("format", SUB_BYTE, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), edge=st.booleans())
def test_round_trip_under_jit(format, seed, edge):
    codes = random_codes(format, (37, 4), seed)
    if edge:  # only the extreme codes: all the sign and carry cases
        codes = np.where(codes > np.median(codes), codes.max(), codes.min()).astype(np.int8)
    words = pack_jit(jnp.asarray(codes), format)
    np.testing.assert_array_equal(unpack_jit(words, format, 37), codes)
    np.testing.assert_array_equal(words, pack(jnp.asarray(codes), format))


@pytest.mark.parametrize("format", SUB_BYTE, ids=str)
def test_only_the_low_bits_of_a_code_are_stored(format):
    codes = random_codes(format, (32, 4))
    unsigned = codes & (2**format.bits - 1)
    np.testing.assert_array_equal(pack(jnp.asarray(unsigned), format), pack(jnp.asarray(codes), format))


def test_columns_and_stack_elements_do_not_mix():
    format = FORMATS["int5"]
    codes = random_codes(format, (2, 3, 40, 6))
    words = pack(jnp.asarray(codes), format)
    np.testing.assert_array_equal(words[1, 2, :, 4:], pack(jnp.asarray(codes[1, 2, :, 4:]), format))
    _, scanned = lax.scan(lambda carry, w: (carry, unpack(w, format, 40)), 0, words[0])
    np.testing.assert_array_equal(scanned, codes[0])
    np.testing.assert_array_equal(jax.vmap(lambda w: unpack(w, format, 40))(words), codes)
