"""A decoder of the shape of Llama 3 8B on one GPU: tokens a second, in bfloat16, int4, and with int8 and fp8 inputs.

`measure` times, for one kind of weights, the reading of a prompt of 2048 tokens and the tokens after it, for one
sequence and for 16 at once; `exported` writes an int4 model of a few layers with `qjax.export`, loads it again, and
compares what both say. Weights are random: they are made on the device, one layer at a time, and packed there at once,
so that no float copy of the model is ever in memory. Quantized models have an int8 key-value cache.

A step is one call of a compiled program that hands its cache on; tokens stay on the device. XLA's own flags apply
(`XLA_FLAGS` is in the result): by default it launches operations from command buffers. Layers are a scan over stacks of
weights and caches. Kernels read packed weights where they lie, and packed caches are written in place. Of float ones
XLA may first copy a layer out of the stack: bfloat16 is what this program takes, not the least that a GPU could.

    python scripts/bench/bench_decode.py           on a GPU of 80 GB, a few minutes; prints the results as JSON
    python scripts/bench/bench_decode.py --dry     a small model, on the CPU too

`scripts/gpu_check` runs it, each kind of weights in a process of its own: `peak` is that of the process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from llama import Config, Decoder, nbytes

import qjax
from qjax.pallas_kernels.chips.gpu import CHIPS
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed, quantize

SCALE = qjax.AbsMax()  # of random weights, no better one needs to be looked for
RECIPES: dict[str, list[qjax.Rule] | None] = {
    "int4 g128": [qjax.Rule("**", qjax.int4(group=128, scale=SCALE))],
    "bfloat16": None,
    "w8a8": [qjax.Rule("**", qjax.int8(scale=SCALE), qjax.dynamic(zero_point=True))],
    "w8a8 fp8": [qjax.Rule("**", qjax.fp8_e4m3(scale=SCALE), qjax.dynamic("fp8_e4m3"))],
}
PROMPT, ROOM = 2048, 256  # tokens
STEPS, ROUNDS = 32, 3
EXPORTED_LAYERS = 4  # all 32 would take minutes to write


def config_of(dry: bool) -> Config:
    """Sizes of the model."""
    if dry:
        return Config(layers=2, dim=128, hidden=256, heads=4, kv_heads=2, vocab=256, cache=24)
    return Config(cache=PROMPT + ROOM)


def target(dry: bool) -> contextlib.AbstractContextManager[Any]:
    """`qjax.target_chip` of this GPU, if its kernels are known here."""
    chip = chip_name(dry)
    return qjax.target_chip(chip) if chip else contextlib.nullcontext()


def chip_name(dry: bool) -> str | None:
    """A key of `CHIPS`, or None."""
    kind = CHIPS["h100"].kind if dry else jax.devices()[0].device_kind
    return next((name for name, chip in CHIPS.items() if kind.startswith(chip.kind)), None)


# --- The model and its weights --------------------------------------------------------------------------------------


def model_of(recipe: str, config: Config) -> Any:
    """The decoder, quantized as `RECIPES` says."""
    rules = RECIPES[recipe]
    return Decoder(config) if rules is None else qjax.quantize(Decoder(config), rules, kv_cache="int8")


def shapes_of(model: Any, config: Config, batch: int) -> Any:
    """The variables that `model` serves, as shapes."""
    inputs = jax.ShapeDtypeStruct((batch, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    floats = jax.eval_shape(Decoder(config).init, jax.random.key(0), *inputs)
    if isinstance(model, Decoder):
        return floats
    return jax.eval_shape(lambda v: model.convert(v, *inputs, mutable=["cache"]), floats)


def empty_cache(model: Any, config: Config, batch: int) -> Any:
    """`{"cache": ...}` for so many sequences."""
    shapes = shapes_of(model, config, batch)["cache"]
    return {"cache": jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)}


def weight_shapes(model: Any, config: Config, dry: bool) -> Any:
    """`{"params": ...}` as shapes, in the order that the kernels of the chip read (`qjax.arrange`)."""
    params, chip = shapes_of(model, config, 1)["params"], chip_name(dry)
    return {"params": params if chip is None else jax.eval_shape(lambda tree: qjax.arrange(tree, chip), params)}


def random_weights(model: Any, config: Config, dry: bool) -> Any:
    """What `weight_shapes` says, normal; scales of norms are 1."""
    found, tree = jax.tree_util.tree_flatten_with_path(weight_shapes(model, config, dry), is_leaf=is_packed)
    keys = jax.random.split(jax.random.key(2024), len(found))
    arrays = []
    for key, (path, leaf) in zip(keys, found, strict=True):
        layers = path[1].key == "layers"
        packed = (leaf.spec, leaf.layout, leaf.order) if isinstance(leaf, QTensor) else None
        std = 0.0 if path[-1].key == "scale" else config.dim**-0.5
        each = jax.random.split(key, config.layers) if layers else key
        arrays.append(_random(each, leaf.shape[layers:], leaf.dtype, std, packed, layers))
    return jax.tree.unflatten(tree, arrays)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float, packed: Any, layers: bool) -> Any:
    """A parameter, one layer after the other: normal, or ones where `std` is 0."""

    def one(key: jax.Array) -> Any:
        values = (std * jax.random.normal(key, shape)).astype(dtype) if std else jnp.ones(shape, dtype)
        return values if packed is None else quantize(values, *packed)

    return lax.map(one, key) if layers else one(key)


# --- Tokens a second ------------------------------------------------------------------------------------------------


def step_of(model: Any) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, jax.Array, jax.Array]]:
    """(weights, cache, tokens, position) -> (cache, the likeliest token after those of each sequence, its position)"""

    def step(weights: Any, cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        logits, cache = model.apply({**weights, **cache}, tokens, position, mutable=["cache"])
        return cache, logits.argmax(-1).astype(jnp.int32), position + tokens.shape[1]

    return step


def memory() -> dict[str, int | None]:
    """Bytes in use on the device, and the most so far; None where the platform does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"in_use": stats.get("bytes_in_use"), "peak": stats.get("peak_bytes_in_use")}


def measure(recipe: str, dry: bool, seconds: float = 60.0) -> dict[str, Any]:
    """Tokens a second with one kind of weights, and the memory that it takes.

    Args:
        recipe: a key of `RECIPES`.
        dry: a small model, and few steps.
        seconds: after which nothing new is begun; it is in "left_out".

    Returns:
        By name of a program, such as "decode 16": "tokens_per_second"; and in "programs" the seconds that it took to
        compile, bytes of temporary memory, custom calls (kernels in the body of the scan count once). Bytes of weights
        and cache of one sequence, and what `memory` says with those in place, and in the end.
    """
    begun, config = time.perf_counter(), config_of(dry)
    steps, prompt = (2, 8) if dry else (STEPS, PROMPT)
    model = model_of(recipe, config)
    rates: dict[str, float] = {}
    programs: dict[str, Any] = {}
    left_out: list[str] = []
    with target(dry):
        weights = random_weights(model, config, dry)
        caches = {1: empty_cache(model, config, 1)}
        jax.block_until_ready((weights, caches))
        made, seconds_to_make = memory(), time.perf_counter() - begun
        cache_bytes = nbytes(caches)
        jitted = jax.jit(step_of(model), donate_argnums=1)
        for kind, batch in (("decode", 1), ("prefill", 1), ("decode", 16)):
            name = f"{kind} {batch}"
            if time.perf_counter() - begun > seconds:
                left_out.append(name)
                continue
            # Tokens come after a prompt of zeros: they take as long after any other.
            length, position, repeats = (prompt, 0, 1) if kind == "prefill" else (1, prompt, steps)
            cache = caches.pop(batch, None) or empty_cache(model, config, batch)
            state = [cache, jnp.zeros((batch, length), jnp.int32), jnp.int32(position)]
            start = time.perf_counter()
            program = jitted.lower(weights, *state).compile()
            programs[name] = {
                "seconds_to_compile": time.perf_counter() - start,
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                "calls": collections.Counter(re.findall(r'custom_call_target="([^"]+)"', program.as_text())),
            }
            times = []
            for _ in range(1 + (1 if dry else ROUNDS)):  # the first round is not counted
                start = time.perf_counter()
                for _ in range(repeats):
                    state[0], *following = program(weights, *state)
                    if kind == "decode":
                        state[1:] = following
                jax.block_until_ready((state, following))
                times.append(time.perf_counter() - start)
            rates[name] = batch * length * repeats / statistics.median(times[1:])
            caches[batch] = state[0]
    return {
        "recipe": recipe,
        "chip": chip_name(dry),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "prompt": prompt,
        "tokens_per_second": rates,
        "programs": programs,
        "left_out": left_out,
        "weight_bytes": nbytes(weights),
        "cache_bytes": cache_bytes,
        "memory": {"made": made, "end": memory()},
        "seconds": {"made": seconds_to_make, "all": time.perf_counter() - begun},
    }


# --- An exported model ----------------------------------------------------------------------------------------------


def exported(dry: bool) -> dict[str, Any]:
    """Whether an int4 model, exported and loaded again, says the same as before.

    Returns:
        "tokens" that it gives, one after the other; whether they, and all bits of the logits, are the same; layers,
        bytes of the folder, seconds to write and to load it.
    """
    config = config_of(dry)
    config = dataclasses.replace(config, layers=min(config.layers, EXPORTED_LAYERS))
    model = model_of("int4 g128", config)
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    first = jnp.ones((1, 1), jnp.int32)

    def told(step: Callable[..., Any], cache: Any) -> tuple[list[int], jax.Array]:
        """The tokens that follow, and all logits."""
        tokens, logits = [first], []
        for position in range(4 if dry else 16):
            out, cache = step(cache, tokens[-1], jnp.int32(position))
            logits.append(out)
            tokens.append(jnp.argmax(out, axis=-1).astype(jnp.int32))
        return [int(token[0, 0]) for token in tokens[1:]], jnp.concatenate(logits, axis=1)

    with target(dry), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama"
        weights, cache = random_weights(model, config, dry), empty_cache(model, config, 1)
        apply = jax.jit(lambda w, c, *inputs: model.apply({**w, **c}, *inputs, mutable=["cache"]), donate_argnums=1)
        start = time.perf_counter()
        how: dict[str, Any] = {"mutable": ["cache"], "platforms": [platform]}
        qjax.export(path, model, {**weights, **cache}, first, jnp.int32(0), **how)
        written = time.perf_counter()
        loaded = qjax.load_exported(path)
        jax.block_until_ready(loaded.weights)
        seconds = {"written": written - start, "loaded": time.perf_counter() - written}
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        tokens, logits = told(functools.partial(apply, weights), cache)
        again, logits_again = told(loaded, loaded.init_state())
    return {
        "layers": config.layers,
        "tokens": tokens,
        "same_tokens": tokens == again,
        "same_bits": bool((logits == logits_again).all()),
        "bytes": size,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a small model, on the CPU too")
    dry = parser.parse_args().dry
    for recipe in RECIPES:
        print(json.dumps(measure(recipe, dry), indent=1), flush=True)
    print(json.dumps(exported(dry), indent=1))


if __name__ == "__main__":
    main()
