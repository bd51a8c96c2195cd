"""The same numbers as bitsandbytes (NF4) and compressed-tensors (int4, int8), bit for bit, on CPU."""

from __future__ import annotations

import numpy as np
import pytest

from qjax.pallas_kernels.numbers import numerics, stored_scales
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec

torch = pytest.importorskip("torch")

K, N = 256, 48


def make_weights(seed=0):
    """(K, N), with tails, an outlier and a group of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((K, N)) * 0.02
    w[:, 8:16] = rng.standard_t(3, (K, 8))
    w[70, 3] = 5.0
    w[64:128, 5] = 0.0
    w[:, 20] = np.abs(w[:, 20])
    return w.astype(np.float32)


W = make_weights()


def quantized(spec, w=W):
    codes, scales = numerics.quantize(w, spec)
    return np.asarray(codes), scales, np.asarray(numerics.dequantize(codes, scales, spec))


def out_in(w):
    """Our (K, N) as the (out, in) weight of a torch Linear."""
    return torch.from_numpy(np.ascontiguousarray(w.T))


@pytest.fixture(scope="module")
def bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.filterwarnings("ignore")
def test_nf4_equals_bitsandbytes(bitsandbytes, block, double_quant):
    packed, state = bitsandbytes.quantize_4bit(
        out_in(W), blocksize=block, quant_type="nf4", compress_statistics=double_quant
    )
    high_first = packed.numpy().reshape(-1)
    their_codes = np.stack([high_first >> 4, high_first & 15], -1).reshape(N, K).T
    theirs = bitsandbytes.dequantize_4bit(packed, state).numpy().T

    spec = QuantSpec(FORMATS["nf4"], PerGroup(block), scale_rule=AbsMax(), double_quant=double_quant)
    codes, scales, w_hat = quantized(spec)
    blocks = (N, K // block)
    np.testing.assert_array_equal(codes, their_codes)
    np.testing.assert_array_equal(scales.values, state.absmax.numpy().reshape(blocks).T)
    if double_quant:  # torch adds up the mean in an order of its own: the last bit may differ
        np.testing.assert_allclose(scales.absmax[:, 0], state.state2.absmax.numpy(), rtol=2e-7)
        np.testing.assert_allclose(scales.offset.item(), float(state.offset), rtol=2e-7)
        last_bits = 4 * np.spacing(np.abs(np.asarray(scales.absmax)).max() + np.asarray(scales.offset).item())
        np.testing.assert_allclose(w_hat, theirs, rtol=0, atol=last_bits)
    else:
        np.testing.assert_array_equal(w_hat, theirs)


@pytest.mark.filterwarnings("ignore")
def test_the_dynamic_map_and_its_codes_equal_bitsandbytes(bitsandbytes):
    rng = np.random.default_rng(1)
    absmax = np.abs(rng.standard_normal((64, 512))).astype(np.float32)  # scales (G, N)
    flat = torch.from_numpy(absmax.T.reshape(-1).copy())
    codes, state = bitsandbytes.quantize_blockwise(flat - flat.mean(), blocksize=256)
    np.testing.assert_array_equal(stored_scales.dynamic_map(), state.code.numpy())

    spec = QuantSpec(FORMATS["nf4"], PerGroup(1), scale_rule=AbsMax(), double_quant=True)
    _, scales, _ = quantized(spec, absmax)  # groups of one value: the scales are the values
    np.testing.assert_array_equal(np.asarray(scales.values).T.reshape(-1), codes.numpy())
    np.testing.assert_array_equal(scales.absmax[:, 0], state.absmax.numpy())


@pytest.fixture(scope="module")
def compressed_tensors():
    pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")

    def run(bits, symmetric, group):
        args = quantization.QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy="group" if group else "channel", group_size=group
        )
        weight = out_in(W)
        grouped = weight.reshape(N, -1, group or K)
        scale, zero = helpers.calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        codes = forward.quantize(weight, scale, zero, args)
        values = forward.dequantize(codes, scale, zero, args)
        return [a.numpy().T for a in (codes, scale, zero, values)]

    return run


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    [(4, True, 64), (4, False, 64), (4, True, 32), (3, True, 128), (8, True, None), (8, False, None)],
    ids=["int4", "int4z", "int4/g32", "int3", "int8/channel", "int8z/channel"],
)
@pytest.mark.filterwarnings("ignore")
def test_integers_equal_compressed_tensors(compressed_tensors, bits, symmetric, group):
    their_codes, their_scale, their_zero, theirs = compressed_tensors(bits, symmetric, group)
    granularity = PerGroup(group) if group else PerChannel()
    spec = QuantSpec(FORMATS[f"int{bits}"], granularity, zero_point=not symmetric, scale_rule=AbsMax())
    codes, scales, w_hat = quantized(spec)
    # a group of zeros has scale 0 here and an arbitrary small one there: its values are zeros in both
    live = np.asarray(scales.values) > 0
    np.testing.assert_array_equal(np.asarray(scales.values)[live], their_scale[live])
    if symmetric:
        np.testing.assert_array_equal(codes, their_codes)
    else:
        np.testing.assert_array_equal(np.asarray(scales.zero)[live], their_zero[live])
        per_value = np.repeat(live, group or K, axis=0)
        np.testing.assert_array_equal(codes[per_value], their_codes[per_value])
    np.testing.assert_array_equal(w_hat, theirs)
