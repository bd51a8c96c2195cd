"""Timing of `scripts/gpu_check`: programs that take turns, over weights several times the size of the cache."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_check_cases import INTEGERS, WEIGHTS
from gpu_check_products import integer_product, product

ROOT = Path(__file__).resolve().parents[2]

CACHE = 50e6  # bytes

ROUNDS = 5


def copy(dry: bool) -> dict[str, float]:
    """Bytes a second, read and written, of adding 1 to a large array."""
    import jax
    import jax.numpy as jnp

    size = 2**14 if dry else 2**29
    add = jax.jit(lambda a: a + 1)
    seconds = medians({"add": functools.partial(add, jnp.zeros(size, jnp.int32))}, dry)["add"]
    return {"bytes_per_second": 8 * size / seconds}


def time_program(dry: bool, what: str, k: int, n: int, m: int) -> dict[str, Any]:
    """Seconds of a program of `TIMED`, and of the same one in bfloat16."""
    import jax
    import jax.numpy as jnp
    from jax.extend.core import primitives as prims

    from qjax.pallas_kernels.backends.epilogue import Epilogue, Step
    from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.packed.qtensor import reorder

    k, n, m = small(k, n, m, dry)
    pair = what.startswith("gated")
    each = 2 if pair else 1  # weights of a program
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 2)
    x, copies = jax.random.normal(keys[0], (m, k), jnp.bfloat16), each * copies_of(k, n, 16)
    floats = [0.02 * jax.random.normal(key, (k, n), jnp.bfloat16) for key in jax.random.split(keys[1], copies)]
    packed = random_weight("int4" if pair else "nf4", 128 if pair else 64, k, n, each * copies_of(k, n, 4))
    kernel = "mosaic"
    if matmul_mosaic.unsupported(x, packed, (), x.dtype) is not None:
        kernel, packed = "triton", reorder(packed, "kn")
    bf16 = jnp.dtype(jnp.bfloat16)
    steps = (Step(prims.logistic_p, (0,), (("accuracy", None),), bf16), Step(prims.mul_p, (0, 2), (), bf16))
    epilogue = Epilogue(bf16, 2, 0, (*steps, Step(prims.mul_p, (3, 1), (), bf16)), 4)
    how: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None}
    module = matmul_gpu if dry else matmul_mosaic

    @jax.jit
    def gated(x: Any, w: Any, i: Any) -> Any:
        return module.fused_matmul(x, [w, w], [], layers=[i, i + 1], epilogue=epilogue, **how)

    one = gated if pair else jax.jit(product(kernel, dry))

    def floating(x: Any, ws: Any) -> Any:
        if not pair:
            return [jnp.dot(x, w) for w in ws]
        return [jax.nn.silu(jnp.dot(x, a)) * jnp.dot(x, b) for a, b in zip(ws[::2], ws[1::2], strict=True)]

    indices = range(0, packed.words.shape[0], each)
    programs = {
        "bfloat16": functools.partial(jax.jit(floating), x, floats),
        what: functools.partial(jax.jit(lambda x, w: [one(x, w, jnp.int32(i)) for i in indices]), x, packed),
    }
    seconds, number = medians(programs, dry), {"bfloat16": copies // each, what: len(indices)}
    return {"k": k, "n": n, "m": m, "seconds": {name: s / number[name] for name, s in seconds.items()}}


def random_weight(format: str, group: int | None, k: int, n: int, copies: int) -> Any:
    """A stack of weights of random words, K contiguous, and scales about those of a trained model."""
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.numbers.stored_scales import Scales
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import QTensor

    scale = "bfloat16" if group else "float32"
    spec = QuantSpec(
        FORMATS[format], PerGroup(group) if group else PerChannel(), scale_dtype=scale, scale_rule=AbsMax()
    )
    bits = FORMATS[format].bits
    shape, dtype = ((copies, n, k // 8), jnp.uint32) if bits == 4 else ((copies, n, k), jnp.uint8)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")))
    signed = jnp.int32 if bits == 4 else jnp.int8
    words = jax.jit(lambda key: jax.lax.bitcast_convert_type(jax.random.bits(key, shape, dtype), signed))(keys[0])
    values = (
        0.05 / 2**bits * jax.random.uniform(keys[1], (copies, n, k // group if group else 1), minval=0.5, maxval=1.5)
    )
    layout = Layout((((k, "k"),), ((n, "n"),)))
    return QTensor(words, Scales(values.astype(scale)), spec, layout, jnp.dtype(jnp.bfloat16), "nk")


def copies_of(k: int, n: int, bits: int) -> int:
    """How many weights of this size are several times as large as the cache."""
    return max(2, min(16, round(3 * CACHE / (k * n * bits / 8))))


def medians(programs: dict[str, Callable[[], Any]], dry: bool) -> dict[str, float]:
    """Seconds of each program, the median of rounds in which they take turns."""
    import jax

    repeats = {}
    for name, program in programs.items():
        jax.block_until_ready(program())
        start = time.perf_counter()
        jax.block_until_ready(program())
        repeats[name] = 1 if dry else max(1, min(200, round(0.02 / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 if dry else ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(repeats[name] - 1):
                program()
            jax.block_until_ready(program())
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def small(k: int, n: int, m: int, dry: bool) -> tuple[int, int, int]:
    """These sizes, or small ones in a dry run."""
    return (128, 64, min(m, 16)) if dry else (k, n, m)


def packed_program(x: Any, w: Any, dry: bool, blocks: Any = None) -> Callable[[], Any]:
    """The product with each weight of the stack; the kernel is lowered once."""
    import jax
    import jax.numpy as jnp

    one = jax.jit(functools.partial(product("mosaic", dry), blocks=blocks))
    every = jax.jit(lambda x, w: [one(x, w, jnp.int32(i)) for i in range(w.words.shape[0])])
    return functools.partial(every, x, w)


def time_layer(dry: bool, k: int, n: int, m: int, weights: Sequence[str]) -> dict[str, Any]:
    """Seconds of a product with each kind of weight, and with bfloat16."""
    import jax
    import jax.numpy as jnp

    k, n, m = small(k, n, m, dry)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 2)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    copies = copies_of(k, n, 16)
    floats = [0.02 * jax.random.normal(key, (k, n), jnp.bfloat16) for key in jax.random.split(keys[1], copies)]
    programs: dict[str, Callable[[], Any]] = {
        "bfloat16": functools.partial(jax.jit(lambda x, ws: [jnp.dot(x, w) for w in ws]), x, floats)
    }
    number, errors = {"bfloat16": copies}, {}
    for name in weights:
        format, group = WEIGHTS[name]
        number[name] = copies_of(k, n, 4 if format == "int4" else 8)
        program = packed_program(x, random_weight(format, group, k, n, number[name]), dry)
        try:
            jax.block_until_ready(program())
            programs[name] = program
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    seconds = medians(programs, dry)
    return {"k": k, "n": n, "m": m, "seconds": {a: s / number[a] for a, s in seconds.items()}, "errors": errors}


def spoiled_tiles(weight: str) -> set[tuple[int, ...]]:
    """Those that the compiler cannot make well for such a weight, by the table of `scripts/gpu/prefilter_gpu.py`."""
    rows = json.loads((ROOT / "benchmarks" / "gpu_tiles.json").read_text())["rows"]
    bad = (r for r in rows if r["weight"] == weight and ("error" in r or r["spilled"] or r["serialized"]))
    return {(r["m"], r["n"], r["k"], r["ways"]) for r in bad}


def sweep(dry: bool, k: int, n: int, m: int, weight: str, most: int) -> dict[str, Any]:
    """Seconds of a product in the tiles that should be best; those that give another result are left out."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.chips import table
    from qjax.pallas_kernels.ops.matmul import mosaic_tiles

    k, n, m = small(k, n, m, dry)
    format, group = WEIGHTS[weight]
    bits = 4 if format == "int4" else 8
    x = jax.random.normal(jax.random.key(int.from_bytes(os.urandom(3), "little")), (m, k), jnp.bfloat16)
    w = random_weight(format, group, k, n, copies_of(k, n, bits))
    spoiled = spoiled_tiles(weight)
    ranked = mosaic_tiles.ranked(m, k, n, bits, out_dtype=jnp.bfloat16)
    ranked = [blocks for blocks in ranked if (blocks.m, blocks.n, blocks.k, blocks.ways) not in spoiled]
    # The best ones, and the best of each shape: the order among shapes is what is least certain.
    shapes: dict[Any, Any] = {}
    for blocks in ranked:
        shapes.setdefault((blocks.m, blocks.n, blocks.ways), blocks)
    chosen = list(dict.fromkeys([*ranked[:2], *shapes.values(), *ranked]))[: 2 if dry else most]
    programs, errors, names = {}, {}, {}
    want = None
    for blocks in chosen:
        name = json.dumps(dataclasses.asdict(blocks))
        program = packed_program(x, w, dry, blocks)
        try:
            got = np.asarray(jax.block_until_ready(program())[0], np.float64)
            want = got if want is None else want
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            if not error < 0.005:
                raise RuntimeError(f"differs from the first tiles by {error}")
            programs[name], names[name] = program, dataclasses.asdict(blocks)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    seconds = {name: s / w.words.shape[0] for name, s in medians(programs, dry).items()}
    best = min(seconds, key=lambda name: seconds[name])
    row = {"weight": table.weight(w.spec, k), "x": "bfloat16", "k": k, "n": n, "m": m, "blocks": names[best]}
    default = json.dumps(dataclasses.asdict(ranked[0]))
    return {"row": row, "best": seconds[best], "default": seconds.get(default), "seconds": seconds, "errors": errors}


def time_integers(dry: bool, k: int, n: int, m: int) -> dict[str, Any]:
    """Seconds of a product with each kind of weight, of one of bfloat16, and of rounding the input of one."""
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels.numbers import activation_ranges, activations
    from qjax.pallas_kernels.numbers.formats import FORMATS

    k, n, m = small(k, n, m, dry)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 2)
    xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in jax.random.split(keys[0], 2)]
    copies = copies_of(k, n, 16)
    floats = [0.02 * jax.random.normal(key, (k, n), jnp.bfloat16) for key in jax.random.split(keys[1], copies)]
    spec = activation_ranges.ActSpec(FORMATS["int8"], zero_point=True)

    def rounded(x: Any) -> tuple[Any, ...]:
        activation = activations.quantize(x, spec, (1,))
        return activation.codes, activation.scale, activation.zero

    programs: dict[str, Callable[[], Any]] = {
        "bfloat16": functools.partial(jax.jit(lambda x, ws: [jnp.dot(x, w) for w in ws]), xs[0], floats),
        "rounding": functools.partial(jax.jit(lambda xs: [rounded(x) for x in xs]), xs),
    }
    number, errors = {"bfloat16": copies, "rounding": len(xs)}, {}
    one, x = jax.jit(integer_product("mosaic", dry), static_argnums=5), jax.jit(rounded)(xs[0])
    every = jax.jit(lambda x, w: [one(*x, w, jnp.int32(i), "bfloat16") for i in range(w.words.shape[0])])
    for name, (format, group) in INTEGERS.items():
        number[name] = copies_of(k, n, 4 if format == "int4" else 8)
        program = functools.partial(every, x, random_weight(format, group, k, n, number[name]))
        try:
            jax.block_until_ready(program())
            programs[name] = program
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    seconds = medians(programs, dry)
    return {"k": k, "n": n, "m": m, "seconds": {a: s / number[a] for a, s in seconds.items()}, "errors": errors}
