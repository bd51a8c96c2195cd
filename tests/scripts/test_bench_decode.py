"""The decoder that `scripts/bench/bench_decode.py` times, and that it does so; with small models, on the CPU."""

from __future__ import annotations

import dataclasses

import bench_decode
import gpu_check_pages
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama import Decoder

from qjax.pallas_kernels.packed.qtensor import QTensor

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = dataclasses.replace(bench_decode.config_of(dry=True), dtype=jnp.float32)


def test_a_prompt_and_the_tokens_after_it_are_one_sequence():
    """Read at once, or one by one through the cache."""
    model = Decoder(CONFIG)
    weights = {"params": jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32), jnp.int32(0))["params"]}
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    apply = jax.jit(lambda cache, *inputs: model.apply({**weights, **cache}, *inputs, mutable=["cache"]))
    whole, _ = apply(bench_decode.empty_cache(model, CONFIG, 1), tokens, jnp.int32(0))
    logits, cache = None, bench_decode.empty_cache(model, CONFIG, 1)
    for position in range(8):
        logits, cache = apply(cache, tokens[:, position : position + 1], jnp.int32(position))
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-4)
    other, _ = apply(bench_decode.empty_cache(model, CONFIG, 1), tokens.at[0, 0].set(7), jnp.int32(0))
    assert float(jnp.abs(other - whole).max()) > 0.01


def test_weights_are_packed_and_random():
    config = bench_decode.config_of(dry=True)
    packed = bench_decode.random_weights(bench_decode.model_of("int4 g128", config), config, dry=True)["params"]
    gate, scale = packed["layers"]["gate"]["kernel"], packed["layers"]["mlp_norm"]["scale"]
    assert isinstance(gate, QTensor)
    assert (str(gate.spec), gate.order, gate.shape) == ("int4/g128", "nk", (2, 128, 256))  # as Hopper reads it
    assert all(scale.ravel() == 1)
    values = np.asarray(gate.dequantize(), np.float64)
    assert abs(values.std() * config.dim**0.5 - 1) < 0.05
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.05


def test_a_dry_run_has_all_that_the_page_says():
    result = bench_decode.measure("int4 g128", dry=True)
    assert list(result["tokens_per_second"]) == ["decode 1", "prefill 1", "decode 16"]
    assert all(rate > 0 for rate in result["tokens_per_second"].values())
    assert result["left_out"] == []
    rates = {"decode 1": 500.0, "prefill 1": 20000.0, "decode 16": 6000.0}
    result |= {
        "tokens_per_second": rates,
        "weight_bytes": 4e9,
        "memory": {"made": {"in_use": 5e9}, "end": {"peak": 9e9}},
    }
    said = {"layers": 4, "same_tokens": True, "same_bits": False}
    entries = [{"do": do, "options": {}, "result": r} for do, r in (("model", result), ("exported", said))]
    page = gpu_check_pages.page({"date": "2026-01-01", "dry": True, "results": entries, "left_out": 0})
    assert "| int4 g128 | 20,000 | 500 | 2.00 | 6,000 | 4.00 | 5.00 | 9.00 |" in page  # 4 GB, 500 times a second
    assert "with 4 layers says the same tokens." in page


def test_what_there_is_no_time_for_is_said():
    result = bench_decode.measure("int4 g128", dry=True, seconds=0.0)
    assert result["left_out"] == ["decode 1", "prefill 1", "decode 16"]
    assert result["tokens_per_second"] == {}


def test_an_exported_model_says_the_same():
    result = bench_decode.exported(dry=True)
    assert result["same_tokens"]
    assert len(result["tokens"]) == 4
