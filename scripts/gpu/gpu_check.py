"""Checks and times the kernels for NVIDIA GPUs, on one, within a time limit. `scripts/gpu_check` runs it.

What is done is a list of tasks, the most important first, and what the time is not enough for is left out and said. A
process of its own carries them out, one after the other: one that crashes, or that hangs as a kernel does whose
barriers do not match, is ended, recorded, and followed by another that goes on with the next task. Results are written
after each task, in one step.

* `check`: a product against float64, on new random operands each time, unpacked by NumPy.
* `time`: products of the layers of Llama 3 8B and 70B, in int4 and int8, beside `jnp.dot` of bfloat16.
* `integers`: a product of integers against NumPy, which must have the same bits.
* `time_integers`: such products of the layers of Llama 3 8B beside `jnp.dot` of bfloat16, and what it takes to round
  their inputs. Goal: with 2048 rows and more, 1.7 times as fast as bfloat16.
* `program`: products with an epilogue, several in one kernel, other formats and the transposed one, against float64.
* `time_program`: NF4, and a gated pair, beside bfloat16.
* `sweep`: one such product in the tiles that `default_blocks` likes best. The fastest ones make a table,
  `chips/gpu.json`, that can replace the one of `pallas_kernels`.
* `attention`, `experts`, `time_attention`: `scripts/gpu/gpu_check_attention.py`.
* `fp8`, `time_fp8`: `scripts/gpu/gpu_check_fp8.py`.
* `fused`, `time_mlp`: `scripts/gpu/gpu_check_fused.py`.
* `model`, `exported`: a decoder of the shape of Llama 3 8B (`scripts/bench/bench_decode.py`): tokens a second, and
whether an
  exported one says the same. Three tenths of the time are kept for it, and each has a process of its own: what that
  took of memory is in the result.

Times are those of many products in one program, over weights that are several times the size of the cache, so that each
product reads its weight from memory; programs take turns, and the median of their rounds is what counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import jaxtyping  # noqa: F401
except ModuleNotFoundError:  # annotations only, none of which is evaluated
    stub: Any = types.ModuleType("jaxtyping")
    stub.__getattr__ = lambda name: Any
    sys.modules["jaxtyping"] = stub

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {
    "8B qkv": (4096, 6144),
    "8B out": (4096, 4096),
    "8B gate, up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B qkv": (8192, 10240),
    "70B out": (8192, 8192),
    "70B gate, up": (8192, 57344),
    "70B down": (28672, 8192),
}
"""K and N of the products of a layer of Llama 3."""

ROWS = (1, 4, 16, 64, 256, 2048, 8192)
WEIGHTS: dict[str, tuple[str, int | None]] = {"int4 g128": ("int4", 128), "int8 channel": ("int8", None)}
CACHE = 50e6  # bytes
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Check:
    """A product to check; `stack` counts experts, `layer` picks one of three."""

    kernel: str
    format: str
    group: int | None
    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    zero_point: bool = False
    stack: int | None = None
    layer: int | None = None
    order: str = "nk"


CHECKS = (
    Check("mosaic", "int4", 128, 1, 4096, 1024),
    Check("mosaic", "int4", 128, 16, 4096, 4096),
    Check("mosaic", "int4", 128, 512, 4096, 1024),
    Check("mosaic", "int8", None, 16, 4096, 1024),
    Check("mosaic", "int8", None, 300, 2048, 1024),
    Check("mosaic", "int4", 64, 64, 4096, 1024, layer=1),
    Check("mosaic", "int4", 32, 7, 1024, 192, zero_point=True),
    Check("mosaic", "int4", None, 33, 4032, 320),
    Check("mosaic", "int4", 128, 16, 4096, 1024, dtype="float32"),
    Check("mosaic", "int8", 128, 5, 2048, 448, zero_point=True, stack=3, layer=-1),
    Check("mosaic", "int4", 96, 100, 960, 64, dtype="float16"),
    Check("mosaic", "int8", 32, 130, 1088, 704, dtype="float32", zero_point=True),
    Check("mosaic", "int4", 128, 1000, 1152, 960, zero_point=True),
    Check("triton", "int4", 128, 16, 4096, 1024, order="kn"),
    Check("triton", "int8", None, 300, 1000, 130, order="kn", zero_point=True),
    Check("triton", "int4", 32, 3, 200, 70, dtype="float32", layer=1),
)


@dataclasses.dataclass(frozen=True)
class IntegerCheck:
    """A product of integers to check: `zeros` says which of x and w have zero points; else as `Check`."""

    kernel: str
    bits: int
    group: int | None
    m: int
    k: int
    n: int
    zeros: str = "x"
    dtype: str = "bfloat16"
    stack: int | None = None
    layer: int | None = None
    order: str = "nk"


INTEGER_CHECKS = (
    IntegerCheck("mosaic", 8, None, 1, 4096, 1024),
    IntegerCheck("mosaic", 8, None, 2048, 4096, 1024),
    IntegerCheck("mosaic", 4, 128, 16, 4096, 1024),
    IntegerCheck("mosaic", 4, None, 300, 4096, 1024, zeros=""),
    IntegerCheck("triton", 8, None, 300, 1000, 130, zeros="xw", order="kn"),
    IntegerCheck("mosaic", 8, 64, 100, 1088, 448, zeros="xw", dtype="float32"),
    IntegerCheck("mosaic", 4, 64, 130, 4032, 320, zeros="xw", stack=3, layer=-1),
    IntegerCheck("mosaic", 4, 128, 1000, 1152, 960, zeros="w", dtype="float16"),
    IntegerCheck("triton", 4, 32, 7, 1000, 130, zeros="xw", layer=1, order="kn"),
    IntegerCheck("triton", 4, 128, 64, 4096, 1024),
)
INTEGERS: dict[str, tuple[str, int | None]] = {"w8a8 channel": ("int8", None), "w4a8 g128": ("int4", 128)}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to check; `what` is "gated", "bias, residual", "joint", "transposed" or "product"."""

    what: str
    kernel: str
    format: str
    group: int | None
    m: int
    k: int
    n: int
    zero_point: bool = False
    dtype: str = "bfloat16"


PROGRAMS = (
    Program("gated", "mosaic", "int4", 128, 16, 4096, 14336),
    Program("gated", "mosaic", "int4", 128, 700, 4096, 2048),
    Program("bias, residual", "mosaic", "int4", 128, 300, 2048, 1024),
    Program("joint", "mosaic", "int4", 128, 16, 4096, 4096),
    Program("product", "mosaic", "nf4", 64, 16, 4096, 1024),
    Program("transposed", "triton", "nf4", 64, 300, 1024, 2048),
    Program("gated", "mosaic", "int8", None, 100, 2048, 1024, zero_point=True),
    Program("bias, residual", "mosaic", "int8", None, 40, 1024, 320, dtype="float32"),
    Program("joint", "mosaic", "int8", None, 300, 1024, 512, zero_point=True),
    Program("product", "mosaic", "fp8_e4m3", 128, 16, 4096, 1024),
    Program("product", "triton", "nf4", 64, 300, 1024, 200),
    Program("transposed", "triton", "int4", 64, 5, 200, 130, zero_point=True, dtype="float32"),
    Program("gated", "triton", "int4", 64, 70, 1024, 130),
)

TIMED = {"NF4 g64": 2.5, "gated pair, int4 g128": 2.5}
"""Programs of `time_program`, and how many times as fast as bfloat16 each should be with few rows of x."""


# --- What the worker does -------------------------------------------------------------------------------------------


def worker(tasks: Sequence[dict[str, Any]], dry: bool) -> None:
    """Prints a line of JSON for each task."""
    if dry:
        os.environ.update(JAX_PLATFORMS="cpu", NPROC="64")
    for task in tasks:
        print(json.dumps({"started": task["id"]}), flush=True)
        try:
            result = DO[task["do"]](dry=dry, **task["options"])
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"id": task["id"], "result": result}), flush=True)


def info(dry: bool) -> dict[str, Any]:
    """The device and the versions."""
    import jax

    device = jax.devices()[0]
    if not dry and device.platform != "gpu":
        raise RuntimeError(f"JAX has no GPU here, but {device}")
    return {
        "device": device.device_kind,
        "capability": str(getattr(device, "compute_capability", None)),
        "processors": getattr(device, "core_count", None),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.client.platform_version,
    }


def copy(dry: bool) -> dict[str, float]:
    """Bytes a second, read and written, of adding 1 to a large array."""
    import jax
    import jax.numpy as jnp

    size = 2**14 if dry else 2**29
    add = jax.jit(lambda a: a + 1)
    seconds = medians({"add": functools.partial(add, jnp.zeros(size, jnp.int32))}, dry)["add"]
    return {"bytes_per_second": 8 * size / seconds}


def refuse(reason: str | None) -> None:
    """What a kernel has against a product, as an error."""
    if reason is not None:
        raise RuntimeError(f"the kernel does not take this: {reason}")


def runs(kernel: str, dry: bool) -> bool:
    """Whether the kernel runs, or is interpreted, here; else a dry run has the reference in its place."""
    import jax

    return not (dry and kernel == "mosaic" and jax.__version_info__ < (0, 11))


def product(kernel: str, dry: bool) -> Callable[..., Any]:
    """`matmul` of a kernel as a function of x, the weight, the layer, and tiles."""
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.ops.matmul import reference as matmul_reference
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton

    options: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
    module = {"mosaic": matmul_mosaic, "triton": matmul_triton}[kernel]

    def run(x: Any, w: Any, layer: Any, blocks: Any = None) -> Any:
        refuse(module.unsupported(x, w, (), x.dtype))
        if not runs(kernel, dry):
            return matmul_reference.matmul(x, w, layer=layer, **options)
        return module.matmul(x, w, layer=layer, blocks=blocks, interpret=dry, **options)

    return run


def check(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product: the largest as part of the bound of `ops.matmul.mosaic`, and the relative one of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.backends import gpu_operands
    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import quantize

    case = Check(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    seed = int.from_bytes(os.urandom(4), "little")
    generator = np.random.default_rng(seed)
    spec = QuantSpec(
        FORMATS[case.format],
        PerGroup(case.group) if case.group else PerChannel(),
        scale_dtype="bfloat16" if case.group else "float32",
        scale_rule=AbsMax(),
        zero_point=case.zero_point,
    )
    experts = () if case.stack is None else (case.stack,)
    layout = Layout((*(((size, "stack"),) for size in experts), ((case.k, "k"),), ((case.n, "n"),)))
    lead = () if case.layer is None else (3,)
    values = 0.02 * (0.3 + generator.standard_normal((*lead, *experts, case.k, case.n)))
    order: Any = case.order
    w = jax.jit(lambda w: quantize(w, spec, layout, order))(jnp.asarray(values, case.dtype))
    x = jnp.asarray(generator.standard_normal((*experts, case.m, case.k)), case.dtype)
    run = jax.jit(product(case.kernel, dry))
    layer = None if case.layer is None else jnp.int32(case.layer)
    got = np.asarray(run(x, w, layer), np.float64)
    again = np.asarray(run(x, w, layer), np.float64)

    words, scales = w.matrix_arrays()
    codes = np.asarray(words)
    if case.format == "int4":
        nibbles = (codes[..., :, None, :] >> (4 * np.arange(8))[:, None]) & 15
        codes = nibbles.reshape(*codes.shape[:-2], -1, case.n)[..., : case.k, :]
        codes = codes - 16 * (codes >= 8)

    def spread(a: Any) -> Any:
        return np.repeat(np.asarray(a, np.float64), case.group or case.k, axis=-2)[..., : case.k, :]

    zero = 0.0 if scales.zero is None else spread(scales.zero)
    weights = (codes.astype(np.float64) - zero) * spread(scales.values)
    weights = weights if case.layer is None else weights[case.layer]
    exact = np.asarray(x, np.float64)
    want = exact @ weights
    # Per channel, weights are exact in the kernel; in groups, and in the float parameter, they are rounded.
    eps = float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (w.dtype,))).eps)
    bound = 2 * eps * (np.abs(exact) @ np.abs(weights)) + float(jnp.finfo(x.dtype).eps) * np.abs(want)
    error = np.abs(got - want)
    largest, relative = float((error / bound).max()), float(np.linalg.norm(error) / np.linalg.norm(want))
    return {
        "right": bool(np.isfinite(got).all() and largest < 1 and relative < 0.5 * eps),
        "same_again": bool((got == again).all()),
        "largest": largest,
        "relative": relative,
        "eps": eps,
        "seed": seed,
        "tiles": str(matmul_mosaic.default_blocks(case.m, case.k, case.n, FORMATS[case.format].bits))
        if case.kernel == "mosaic"
        else None,
    }


def program(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a program: as `check` gives them, of weights that XLA dequantizes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.extend.core import primitives as prims

    from qjax.pallas_kernels.backends import gpu_operands
    from qjax.pallas_kernels.backends.epilogue import Epilogue, Step
    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import quantize

    case = Program(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    generator, f32 = np.random.default_rng(int.from_bytes(os.urandom(4), "little")), jnp.dtype(jnp.float32)
    granularity = PerGroup(case.group) if case.group else PerChannel()
    spec = QuantSpec(FORMATS[case.format], granularity, scale_rule=AbsMax(), zero_point=case.zero_point)
    order: Any = "nk" if case.kernel == "mosaic" else "kn"

    def packed(n: int) -> Any:
        layout = Layout((((case.k, "k"),), ((n, "n"),)))
        values = generator.standard_normal((case.k, n)) / case.k**0.5
        return jax.jit(lambda w: quantize(w, spec, layout, order))(jnp.asarray(values, case.dtype))

    def normal(*shape: int) -> Any:
        return jnp.asarray(generator.standard_normal(shape), case.dtype)

    def step(primitive: Any, *operands: int, **params: Any) -> Step:
        return Step(primitive, operands, tuple(params.items()), f32)

    gated = (step(prims.logistic_p, 0, accuracy=None), step(prims.mul_p, 0, 2), step(prims.mul_p, 3, 1))
    added = (step(prims.add_p, 0, 1), step(prims.add_p, 3, 2))
    epilogues = {"gated": Epilogue(f32, 2, 0, gated, 4), "bias, residual": Epilogue(f32, 1, 2, added, 4)}
    epilogue, transpose = epilogues.get(case.what), case.what == "transposed"
    widths = (case.n, 64, 192) if case.what == "joint" else (case.n,) * (epilogue.products if epilogue else 1)
    weights, x = [packed(n) for n in widths], normal(case.m, case.n if transpose else case.k)
    others = [normal(1, 1, case.n), normal(1, case.m, case.n)] if case.what == "bias, residual" else []
    module: Any = {"mosaic": matmul_mosaic, "triton": matmul_triton}[case.kernel]
    how: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": f32}
    refuse(module.unsupported(x, weights[0], (), f32, transpose=transpose))
    refuse(module.unsupported_epilogue(epilogue) if epilogue else None)
    if runs(case.kernel, dry):
        how["interpret"] = dry
    else:
        module = matmul_gpu  # which computes the same without a kernel

    @jax.jit
    def run(x: Any, weights: Any, others: Any) -> list[Any]:
        if epilogue:
            layers = [None] * len(weights)
            return [module.fused_matmul(x, weights, others, layers=layers, epilogue=epilogue, **how)]
        if case.what == "joint" and module is matmul_mosaic:
            return module.joint_matmul(x, weights, layers=[None] * len(weights), **how)
        return [module.matmul(x, w, layer=None, transpose=transpose, **how) for w in weights]

    got, again = ([np.asarray(a, np.float64) for a in run(x, weights, others)] for _ in range(2))
    exact, matrices = np.asarray(x, np.float64), [np.asarray(w.dequantize(), np.float64) for w in weights]
    matrices = [a.T for a in matrices] if transpose else matrices
    want = [exact @ a for a in matrices]
    eps = float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (weights[0].dtype,))).eps)
    off = [2 * eps * (np.abs(exact) @ np.abs(a)) for a in matrices]
    if case.what == "gated":
        gate, up = want
        sigmoid = 1 / (1 + np.exp(-gate))
        want, off = [gate * sigmoid * up], [1.1 * np.abs(up) * off[0] + np.abs(gate * sigmoid) * off[1]]
    elif others:
        want = [want[0] + sum(np.asarray(a, np.float64)[0] for a in others)]
    errors = [np.abs(a - b) for a, b in zip(got, want, strict=True)]
    largest = max(float((e / (o + 1e-5 * (1 + np.abs(w)))).max()) for e, o, w in zip(errors, off, want, strict=True))
    relative = max(float(np.linalg.norm(e) / np.linalg.norm(w)) for e, w in zip(errors, want, strict=True))
    return {
        "right": bool(all(np.isfinite(a).all() for a in got) and largest < 1 and relative < eps),
        "same_again": all(bool((a == b).all()) for a, b in zip(got, again, strict=True)),
        "largest": largest,
        "relative": relative,
        "eps": eps,
    }


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


def integer_product(kernel: str, dry: bool) -> Callable[..., Any]:
    """`matmul` of a kernel of `integer_matmul`, as a function."""
    from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic
    from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton
    from qjax.pallas_kernels.ops.integer_matmul.reference import matmul as matmul_reference

    module = {"mosaic": integer_matmul_mosaic, "triton": integer_matmul_triton}[kernel]

    def run(x: Any, scale: Any, zero: Any, w: Any, layer: Any, dtype: str) -> Any:
        refuse(module.unsupported(x, w, dtype))
        if not runs(kernel, dry):
            return matmul_reference(x, scale, zero, w, layer=layer, out_dtype=dtype)
        return module.matmul(x, scale, zero, w, layer=layer, out_dtype=dtype, interpret=dry)

    return run


def integers(dry: bool, **fields: Any) -> dict[str, Any]:
    """How many elements of a product of random codes have other bits than they should have."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.numbers.stored_scales import Scales
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import QTensor

    case = IntegerCheck(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    seed = int.from_bytes(os.urandom(4), "little")
    generator = np.random.default_rng(seed)
    experts = () if case.stack is None else (case.stack,)
    lead = experts if case.layer is None else (3, *experts)
    size, low = case.group or case.k, -(2 ** (case.bits - 1))
    groups = -(-case.k // size)

    codes = generator.integers(low, -low, (*lead, case.n, case.k))
    scales = (generator.standard_normal((*lead, case.n, groups)) * 0.01).astype(np.float32)
    weight_zero = generator.integers(low, -low, scales.shape) if "w" in case.zeros else None
    words = codes.astype(np.int8)
    if case.bits == 4:
        nibbles = (codes & 15).reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
        words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=-1).view(np.int32)
    granularity = PerGroup(case.group) if case.group else PerChannel()
    zero_point = weight_zero is not None
    spec = QuantSpec(FORMATS[f"int{case.bits}"], granularity, scale_rule=AbsMax(), zero_point=zero_point)
    arrays = [words, scales, *([] if weight_zero is None else [weight_zero.astype(np.int8)])]
    words, *small_arrays = (jnp.asarray(a if case.order == "nk" else np.swapaxes(a, -1, -2)) for a in arrays)
    layout = Layout((((case.k, "k"),), ((case.n, "n"),)))
    order: Any = case.order
    w = QTensor(words, Scales(*small_arrays), spec, layout, jnp.dtype("bfloat16"), order)
    x = generator.integers(-128, 128, (*experts, case.m, case.k))
    scale = (generator.random((*experts, case.m, 1)) + 0.1).astype(np.float32)
    zero = generator.integers(-128, 128, scale.shape).astype(np.float32) if "x" in case.zeros else None

    run = jax.jit(integer_product(case.kernel, dry), static_argnums=5)
    layer = None if case.layer is None else jnp.int32(case.layer)
    operands = (jnp.asarray(x, jnp.int8), jnp.asarray(scale), None if zero is None else jnp.asarray(zero), w, layer)
    got, again = (np.asarray(run(*operands, case.dtype)) for _ in range(2))

    def picked(a: Any) -> Any:
        return a if case.layer is None else a[case.layer]

    centred, want = x - (0 if zero is None else zero.astype(np.int64)), np.zeros((*experts, case.m, case.n), np.float32)
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, case.k))
        weights = picked(codes)[..., part] - (0 if weight_zero is None else picked(weight_zero)[..., g : g + 1])
        exact = centred[..., part].astype(np.float64) @ np.swapaxes(weights, -1, -2).astype(np.float64)
        want = want + exact.astype(np.float32) * picked(scales)[..., None, :, g]
    want = (want * scale).astype(got.dtype)
    bits = f"u{got.itemsize}"
    wrong = int((got.view(bits) != want.view(bits)).sum())
    return {
        "right": wrong == 0,
        "same_again": bool((got.view(bits) == again.view(bits)).all()),
        "wrong": wrong,
        "elements": got.size,
        "seed": seed,
    }


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


def attention(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of attention on packed caches: `gpu_check_attention.attention`."""
    import gpu_check_attention

    return gpu_check_attention.attention(dry, **fields)


def experts(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of rows sorted by expert: `gpu_check_attention.experts`."""
    import gpu_check_attention

    return gpu_check_attention.experts(dry, **fields)


def time_attention(dry: bool, filled: int) -> dict[str, Any]:
    """Seconds of attention on packed caches: `gpu_check_attention.time_attention`."""
    import gpu_check_attention

    return gpu_check_attention.time_attention(dry, filled, medians)


def fp8(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of 8-bit floats: `gpu_check_fp8.fp8`."""
    import gpu_check_fp8

    return gpu_check_fp8.fp8(dry, **fields)


def time_fp8(dry: bool, k: int, n: int, m: int) -> dict[str, Any]:
    """Seconds of a product of 8-bit floats: `gpu_check_fp8.time_fp8`."""
    import gpu_check_fp8

    return gpu_check_fp8.time_fp8(dry, *small(k, n, m, dry), medians, copies_of)


def fused(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of integers with an epilogue: `gpu_check_fused.fused`."""
    import gpu_check_fused

    return gpu_check_fused.fused(dry, refuse, runs, **fields)


def time_mlp(dry: bool, k: int, n: int, m: int) -> dict[str, Any]:
    """Seconds of an MLP with static ranges: `gpu_check_fused.time_mlp`."""
    import gpu_check_fused

    return gpu_check_fused.time_mlp(dry, *small(k, n, m, dry), medians, random_weight)


def model(dry: bool, recipe: str, seconds: float) -> dict[str, Any]:
    """Tokens a second of a whole model: `bench_decode.measure`."""
    import bench_decode

    return bench_decode.measure(recipe, dry, seconds)


def exported(dry: bool) -> dict[str, Any]:
    """Whether an exported model says the same: `bench_decode.exported`."""
    import bench_decode

    result = bench_decode.exported(dry)
    return {**result, "right": result["same_tokens"]}


DO: dict[str, Callable[..., dict[str, Any]]] = {
    "info": info,
    "copy": copy,
    "check": check,
    "time": time_layer,
    "integers": integers,
    "time_integers": time_integers,
    "sweep": sweep,
    "program": program,
    "time_program": time_program,
    "attention": attention,
    "experts": experts,
    "time_attention": time_attention,
    "fp8": fp8,
    "time_fp8": time_fp8,
    "fused": fused,
    "time_mlp": time_mlp,
    "model": model,
    "exported": exported,
}
"""By kind of task, what the worker calls with `dry` and the options."""


# --- The list of tasks ----------------------------------------------------------------------------------------------


def tasks_of() -> list[dict[str, Any]]:
    """All of them, the most important first, with the seconds that each may take."""
    found: list[tuple[str, float, dict[str, Any]]] = [("info", 90, {})]
    found += [("check", 60, dataclasses.asdict(case)) for case in CHECKS[:5]]
    found.append(("copy", 60, {}))
    both = list(WEIGHTS)
    import gpu_check_attention as attending
    from gpu_check_fp8 import FP8_CHECKS
    from gpu_check_fused import FUSED_CHECKS

    of_fused = [("fused", 60, dataclasses.asdict(case)) for case in FUSED_CHECKS]
    of_fp8 = [("fp8", 60, dataclasses.asdict(case)) for case in FP8_CHECKS]
    of_attention, of_experts = (
        [(do, 60, dataclasses.asdict(case)) for case in cases]
        for do, cases in (("attention", attending.ATTENTION_CHECKS), ("experts", attending.EXPERT_CHECKS))
    )

    def timed(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time", 90, {"k": k, "n": n, "m": m, "weights": both}))

    def timed_integers(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time_integers", 90, {"k": k, "n": n, "m": m}))

    def timed_fp8(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time_fp8", 90, {"k": k, "n": n, "m": m}))

    def swept(names: Sequence[str], rows: Sequence[int], most: int) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("sweep", 120, {"k": k, "n": n, "m": m, "weight": "int4 g128", "most": most}))

    timed(["70B out", "8B gate, up"], (1, 16, 2048))
    found += [("check", 60, dataclasses.asdict(case)) for case in CHECKS[5:]]
    found += [("integers", 60, dataclasses.asdict(case)) for case in INTEGER_CHECKS[:5]]
    timed_integers(["8B gate, up", "8B out"], (2048, 16))
    found += of_fp8[:5]
    timed_fp8(["8B gate, up", "8B out"], (2048, 16))
    found += [("program", 60, dataclasses.asdict(case)) for case in PROGRAMS[:6]]
    found += [*of_fused[:4], *(("time_mlp", 90, {"k": 4096, "n": 14336, "m": m}) for m in (2048, 16))]
    for m in (16, 1, 2048):
        found += [("time_program", 90, {"what": what, "k": 4096, "n": 14336, "m": m}) for what in TIMED]
    found += [*of_attention[:3], *of_experts[:1]]
    found += [("time_attention", 90, {"filled": filled}) for filled in attending.FILLED]
    swept(["70B out"], (16, 2048), 8)
    found += [("program", 60, dataclasses.asdict(case)) for case in PROGRAMS[6:]]
    found += [*of_attention[3:], *of_experts[1:]]
    timed(["70B out", "8B gate, up"], (64, 256, 8192, 4))
    timed(["70B down", "8B down"], (16, 2048, 1))
    swept(["70B down", "8B gate, up"], (16, 256, 2048), 6)
    found += [("integers", 60, dataclasses.asdict(case)) for case in INTEGER_CHECKS[5:]]
    timed_integers(["8B down", "8B qkv"], (2048, 16))
    found += [*of_fp8[5:], *of_fused[4:]]
    timed_fp8(["8B down", "8B qkv"], (2048, 16))
    timed_integers(["8B gate, up", "8B out", "8B down", "8B qkv"], (8192, 1, 256))
    timed_fp8(["8B gate, up", "8B out", "8B down", "8B qkv"], (8192, 1, 256))
    timed(["8B out", "70B gate, up", "70B qkv", "8B qkv"], (1, 16, 2048))
    timed(["70B down", "8B down"], (64, 256, 8192, 4))
    swept(["8B out", "8B down", "70B gate, up"], (16, 256, 2048), 5)
    timed(["8B out", "70B gate, up", "70B qkv", "8B qkv"], (64, 256, 4, 8192))
    found += [
        ("model", 90, {"recipe": recipe, "seconds": 40.0}) for recipe in ("int4 g128", "bfloat16", "w8a8", "w8a8 fp8")
    ]
    found.append(("exported", 90, {}))
    return [{"id": i, "do": do, "limit": limit, "options": options} for i, (do, limit, options) in enumerate(found)]


# --- The process that watches ---------------------------------------------------------------------------------------


def run_all(out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Carries out tasks until the time is up; returns what is written to `gpu.json`."""
    start = time.monotonic()
    tasks = tasks_of()
    if dry:  # one of each kind, and all checks
        kinds: dict[str, Any] = {}
        checks = ("check", "integers", "program", "attention", "experts", "fp8", "fused")
        tasks = [task for task in tasks if task["do"] in checks or kinds.setdefault(task["do"], task) is task]
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    record: dict[str, Any] = {"date": date, "dry": dry, "results": [], "left_out": len(tasks)}
    models = [task for task in tasks if task["do"] in ("model", "exported")]
    kernels, end = [task for task in tasks if task not in models], start + seconds
    parts = [(kernels, end - 0.3 * seconds if models else end), *(([task], end) for task in models)]

    def has_no_gpu() -> bool:
        return bool(record["results"]) and "error" in record["results"][0]["result"]

    for left, until in parts:
        while left and time.monotonic() < until and not has_no_gpu():
            finished = watch(left, record, out, until, dry)
            left = [task for task in left if task["id"] not in finished]
            record["left_out"] -= len(finished)
            write(record, out)
    record["minutes"] = round((time.monotonic() - start) / 60, 1)
    write(record, out)
    return record


def watch(tasks: list[dict[str, Any]], record: dict[str, Any], out: Path, deadline: float, dry: bool) -> set[int]:
    """Runs a worker until it has done all tasks, crashes, hangs, or the time is up; returns those that need no more."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(tasks, file)
    command = [sys.executable, __file__, "--worker", file.name, *(["--dry"] if dry else [])]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    by_id, finished = {task["id"]: task for task in tasks}, set()
    current: dict[str, Any] | None = None

    def note(task: dict[str, Any], result: dict[str, Any]) -> None:
        finished.add(task["id"])
        entry = {"do": task["do"], "options": task["options"], "result": result}
        record["results"].append(entry)
        write(record, out)
        print(f"{max(0, deadline - time.monotonic()):4.0f} s left  {summary(entry)}", flush=True)

    try:
        while True:
            limit = current["limit"] if current else 120
            try:
                line = lines.get(timeout=max(0.1, min(limit, deadline - time.monotonic())))
            except queue.Empty:
                if current and time.monotonic() < deadline:
                    note(current, {"error": f"hung: not done after {limit} s"})
                elif not current:
                    note(tasks[0], {"error": "the process did not start"})
                return finished
            if line is None:
                process.wait()
                if current:
                    errors.seek(0)
                    note(current, {"error": f"crashed ({process.returncode}): {errors.read()[-600:]}"})
                return finished
            try:
                message = json.loads(line)
            except json.JSONDecodeError:  # something else that was printed
                continue
            if "started" in message:
                current = by_id[message["started"]]
            elif "id" in message:
                note(by_id[message["id"]], message["result"])
                current = None
    finally:
        process.kill()
        process.wait()
        errors.close()
        os.unlink(file.name)


def summary(entry: dict[str, Any]) -> str:
    """One line on a result."""
    options, result = entry["options"], entry["result"]
    what = " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
    if "error" in result:
        return f"{entry['do']} {what}: {result['error']}"
    if entry["do"] in ("check", "program", "attention", "experts", "fp8", "fused"):
        word = "right" if result["right"] else "WRONG"
        return f"{word} ({result['relative'] / result['eps']:.2f} eps, same again: {result['same_again']}) {what}"
    if entry["do"] == "integers":
        word = "right" if result["right"] else f"WRONG in {result['wrong']} of {result['elements']} elements"
        return f"{word} (same again: {result['same_again']}) integers {what}"
    if entry["do"] == "time_program":
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"{result['m']} x {result['k']} x {result['n']}: {times}"
    if entry["do"] == "time_attention":
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"attention on {result['filled']} of {result['t']} positions: {times} {result['errors'] or ''}"
    if entry["do"] in ("time", "time_integers", "time_fp8", "time_mlp"):
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"{result['m']} x {result['k']} x {result['n']}: {times} {result['errors'] or ''}"
    if entry["do"] == "sweep":
        default = "failed" if result["default"] is None else f"{1e6 * result['default']:.1f} us"
        return f"sweep {what}: {1e6 * result['best']:.1f} us, default {default}, {result['row']['blocks']}"
    if entry["do"] == "model":
        rates = ", ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in result["tokens_per_second"].items())
        return f"{what}: {rates}"
    return f"{entry['do']}: {json.dumps(result)}"


# --- What is written ------------------------------------------------------------------------------------------------


def write(record: dict[str, Any], out: Path) -> None:
    """`gpu.json`, `gpu.md` and `chips/gpu.json`, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"gpu.json": json.dumps(record, indent=1) + "\n", "gpu.md": page(record)}
    if any(entry["do"] == "sweep" for entry in record["results"]):
        texts["blocks_gpu.json"] = table(record)
    for name, text in texts.items():
        temporary = out / f".{name}.new"
        temporary.write_text(text)
        os.replace(temporary, out / name)


def results(record: dict[str, Any], do: str) -> list[dict[str, Any]]:
    """Those of one kind of task that did not fail."""
    return [entry for entry in record["results"] if entry["do"] == do and "error" not in entry["result"]]


def table(record: dict[str, Any]) -> str:
    """The tiles that were fastest, as `pallas_kernels/chips/gpu.json` has them."""
    from qjax.pallas_kernels.chips.gpu import CHIPS, ROWS

    infos = results(record, "info")
    kind = infos[0]["result"]["device"] if infos else ""
    chip = next((name for name, chip in CHIPS.items() if kind.startswith(chip.kind)), kind)
    rows = []
    for entry in results(record, "sweep"):
        row, most = entry["result"]["row"], next(rows for rows in ROWS if entry["result"]["row"]["m"] <= rows)
        rows.append({"chip": chip, **row, "m": most, "microseconds": round(1e6 * entry["result"]["best"], 1)})
    note = "Written by scripts/gpu_check. m: rows of x, at most. microseconds: for that many rows, or the most timed."
    versions = f"jax {infos[0]['result']['jax']}, {record['date']}" if infos else ""
    head = f'{{\n"note": {json.dumps(note)},\n"versions": {json.dumps(versions)},\n"rows": [\n'
    return head + ",\n".join(map(json.dumps, rows)) + "\n]\n}\n"


def page(record: dict[str, Any]) -> str:
    """A page of Markdown."""
    infos, copies = results(record, "info"), results(record, "copy")
    lines = ["# Kernels on a GPU", ""]
    if record["dry"]:
        lines += ["**A dry run on a CPU, with small shapes: the times mean nothing.**", ""]
    if infos:
        about = infos[0]["result"]
        lines += [
            f"`scripts/gpu_check`, {record['date']}: {about['device']} (compute capability {about['capability']}), "
            f"jax {about['jax']}, jaxlib {about['jaxlib']}, {about['platform'].splitlines()[0]}. "
            f"Tasks that there was no time for: {record['left_out']}.",
            "",
        ]
    bandwidth = copies[0]["result"]["bytes_per_second"] if copies else None
    if bandwidth:
        lines += [f"Adding 1 to 2 GiB reads and writes {bandwidth / 1e12:.2f} TB/s: 100% in the table.", ""]
    failed = [entry for entry in record["results"] if "error" in entry["result"]]
    if failed:
        lines += ["## Failed", "", *(f"* {summary(entry)[:400]}".replace("\n", " ") for entry in failed), ""]
    lines += ["## Right or wrong", "", "Against float64, on random operands; errors in eps of the operands' type.", ""]
    lines += ["| product | result | largest / bound | all, relative | same bits again |", "|---|---|---|---|---|"]
    for entry in results(record, "check"):
        r, case = entry["result"], Check(**entry["options"])
        name = f"{case.kernel}, {case.format}{' zero point' if case.zero_point else ''} "
        name += f"{f'g{case.group}' if case.group else 'channel'}, {case.dtype}, {case.m} x {case.k} x {case.n}"
        name += (
            f"{f', {case.stack} experts' if case.stack else ''}{', layer of a stack' if case.layer is not None else ''}"
        )
        relative = f"{r['relative'] / r['eps']:.2f} eps"
        right = "right" if r["right"] else "**wrong**"
        lines.append(
            f"| {name} | {right} | {r['largest']:.3f} | {relative} | {'yes' if r['same_again'] else '**no**'} |"
        )
    for entry in results(record, "program"):
        r, case = entry["result"], Program(**entry["options"])
        name = f"{case.what}: {case.kernel}, {case.format}{' zero point' if case.zero_point else ''} "
        name += f"{f'g{case.group}' if case.group else 'channel'}, {case.dtype}, {case.m} x {case.k} x {case.n}"
        cells = [name, "right" if r["right"] else "**wrong**", f"{r['largest']:.3f}"]
        cells += [f"{r['relative'] / r['eps']:.2f} eps", "yes" if r["same_again"] else "**no**"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Times",
        "",
        "Of a product, in microseconds; words, scales, x and result as part of a copy's bytes a ",
    ]
    lines[-1] += "second; times as fast as `jnp.dot` of bfloat16."
    lines += ["", "| rows | K x N | bfloat16 | TFLOP/s |" + "".join(f" {name} | bytes/s | speed |" for name in WEIGHTS)]
    lines.append("|" + "---|" * (4 + 3 * len(WEIGHTS)))
    for entry in sorted(results(record, "time"), key=lambda e: (e["result"]["m"], e["result"]["k"] * e["result"]["n"])):
        r = entry["result"]
        m, k, n, base = r["m"], r["k"], r["n"], r["seconds"]["bfloat16"]
        cells = [str(m), f"{k} x {n}", f"{1e6 * base:.1f}", f"{2 * m * k * n / base / 1e12:.0f}"]
        for name, (format, group) in WEIGHTS.items():
            if (s := r["seconds"].get(name)) is None:
                cells += ["failed", "", ""]
                continue
            size = k * n / (2 if format == "int4" else 1) + (k // group * n * 2 if group else n * 4) + 2 * m * (k + n)
            part = f"{size / s / bandwidth:.0%}" if bandwidth else f"{size / s / 1e12:.2f} TB/s"
            cells += [f"{1e6 * s:.1f}", part, f"{base / s:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    programs = results(record, "time_program")
    if programs:
        lines += ["", "## Times of other programs", "", "In microseconds; times as fast as bfloat16, and the goal.", ""]
        lines += ["| program | rows | K x N | bfloat16 | packed | speed | goal |", "|---|---|---|---|---|---|---|"]
    for entry in programs:
        r, what = entry["result"], entry["options"]["what"]
        base, own = r["seconds"]["bfloat16"], r["seconds"][what]
        cells = [what, r["m"], f"{r['k']} x {r['n']}", f"{1e6 * base:.1f}", f"{1e6 * own:.1f}", f"{base / own:.2f}x"]
        lines.append("| " + " | ".join(map(str, (*cells, f"{TIMED[what]}x" if r["m"] <= 16 else ""))) + " |")
    sweeps = results(record, "sweep")
    if sweeps:
        lines += [
            "",
            "## Tiles",
            "",
            "The fastest of those tried, and those that are chosen by shape, in microseconds.",
            "",
        ]
        lines += ["| rows | K x N | weight | fastest | its tiles | by shape | tried |", "|---|---|---|---|---|---|---|"]
    for entry in sweeps:
        r, row = entry["result"], entry["result"]["row"]
        b = row["blocks"]
        tiles = f"{b['m']} x {b['n']} x {b['k']}, {b['ways']} ways, {b['stages']} stages, {b['splits']} splits"
        default = "failed" if r["default"] is None else f"{1e6 * r['default']:.1f}"
        cells = (row["m"], f"{row['k']} x {row['n']}", row["weight"], f"{1e6 * r['best']:.1f}", tiles, default)
        lines.append("| " + " | ".join(map(str, (*cells, len(r["seconds"])))) + " |")
    import gpu_check_attention
    import gpu_check_fp8
    import gpu_check_fused

    parts = (gpu_check_fused, gpu_check_fp8, gpu_check_attention)
    others = itertools.chain(*(part.page(functools.partial(results, record)) for part in parts))
    return "\n".join([*lines, *_integers(record), *others, *_models(record)]) + "\n"


def _integers(record: dict[str, Any]) -> list[str]:
    """The page's part on products of integers."""
    checks, lines = results(record, "integers"), []
    if checks:
        lines += ["", "## Integers", "", "Elements with other bits than NumPy's, on random codes."]
        lines += ["", "| product | zero points | wrong | of | same bits again |", "|---|---|--:|--:|---|"]
    for entry in checks:
        r, case = entry["result"], IntegerCheck(**entry["options"])
        name = f"{case.kernel}, w{case.bits}a8 {f'g{case.group}' if case.group else 'channel'}, {case.dtype}, "
        name += f"{case.m} x {case.k} x {case.n}{f', {case.stack} experts' if case.stack else ''}"
        name += ", layer of a stack" if case.layer is not None else ""
        wrong = "0" if r["right"] else f"**{r['wrong']}**"
        again = "yes" if r["same_again"] else "**no**"
        lines.append(f"| {name} | {', '.join(case.zeros) or 'none'} | {wrong} | {r['elements']} | {again} |")
    times = sorted(results(record, "time_integers"), key=lambda e: (e["result"]["m"], e["result"]["n"]))
    if times:
        lines += [
            "",
            "Microseconds of a product of codes, and times as fast as `jnp.dot` of bfloat16; of the rounding of",
        ]
        lines += ["an input of bfloat16, which comes before.", ""]
        lines += ["| rows | K x N | bfloat16 | rounding |" + "".join(f" {name} | speed |" for name in INTEGERS)]
        lines.append("|" + "---|" * (4 + 2 * len(INTEGERS)))
    for r in (entry["result"] for entry in times):
        base = r["seconds"]["bfloat16"]
        cells = [str(r["m"]), f"{r['k']} x {r['n']}", f"{1e6 * base:.1f}", f"{1e6 * r['seconds']['rounding']:.1f}"]
        for name in INTEGERS:
            s = r["seconds"].get(name)
            cells += ["failed", ""] if s is None else [f"{1e6 * s:.1f}", f"{base / s:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _models(record: dict[str, Any]) -> list[str]:
    """The page's part on whole models."""
    entries, lines = [entry["result"] for entry in results(record, "model")], []
    if entries:
        lines += [
            "",
            "## A decoder of the shape of Llama 3 8B",
            "",
            f"Random weights; {entries[0]['prompt']} tokens are read, and come before those that are written. The "
            f"cache is int8, with bfloat16 weights bfloat16. XLA_FLAGS: {entries[0]['flags'] or 'none'}. Tokens a "
            "second, by sequences at a time. Memory in GB: weights; what the device has in use with them and the cache "
            "of one sequence, and at most. TB/s: bytes of weights times tokens a second, of one sequence. All models "
            "scan over stacked layers, out of which XLA may copy float ones: bfloat16 is no lower bound.",
            "",
            "| weights | read 1 | write 1 | TB/s | write 16 | GB of weights | in use | most |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for r in entries:
        read, one, many = (r["tokens_per_second"].get(name) for name in ("prefill 1", "decode 1", "decode 16"))
        sizes = [r["weight_bytes"], r["memory"]["made"]["in_use"], r["memory"]["end"]["peak"]]
        cells = [r["recipe"], *("-" if rate is None else f"{rate:,.0f}" for rate in (read, one))]
        cells += ["-" if one is None else f"{one * r['weight_bytes'] / 1e12:.2f}"]
        cells += ["-" if many is None else f"{many:,.0f}"]
        cells += ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        lines.append("| " + " | ".join(cells) + " |")
    for r in (entry["result"] for entry in results(record, "exported")):
        same = "the same tokens" if r["same_tokens"] else "**other tokens**"
        same += ", and the same bits of all logits" if r["same_bits"] else ""
        lines += ["", f"Exported by `qjax.export` and loaded again, int4 with {r['layers']} layers says {same}."]
    return lines


MARKS = "<!-- scripts/gpu_check --readme writes from here -->", "<!-- to here -->"


def summarized(record: dict[str, Any], text: str) -> str:
    """The README with a short table between `MARKS`: every shape, and every number of rows that was timed.

    Raises:
        ValueError: there are no times of a GPU, or not both marks.
    """
    infos, timed = results(record, "info"), results(record, "time")
    if record["dry"] or not infos or not timed:
        raise ValueError("gpu_check: the results have no times of a GPU (a dry run has none).")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"gpu_check: the README must have {MARKS[0]!r} and {MARKS[1]!r}, once each.")
    about, rows = infos[0]["result"], sorted({entry["result"]["m"] for entry in timed})
    kinds = ("check", "program", "attention", "experts", "fp8", "fused")
    checks = [entry for kind in kinds for entry in results(record, kind)]
    wrong = [entry for entry in checks if not entry["result"]["right"]]
    lines = [
        f"On {about['device']} (jax {about['jax']}, {record['date']}), times as fast as `jnp.dot` of bfloat16 with so "
        f"many rows of x; more in [benchmarks/gpu.md](benchmarks/gpu.md). Checks that were wrong: {len(wrong)}.",
        "",
        "| K x N | weights |" + "".join(f" {m} |" for m in rows),
        "|---|---|" + "--:|" * len(rows),
    ]
    shapes: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for r in (entry["result"] for entry in timed):
        shapes.setdefault((r["k"], r["n"]), {})[r["m"]] = r["seconds"]
    for (k, n), times in sorted(shapes.items()):
        for name in WEIGHTS:
            pairs = [(times.get(m, {}).get("bfloat16"), times.get(m, {}).get(name)) for m in rows]
            cells = [f"{base / own:.2f}" if base and own else "" for base, own in pairs]
            lines.append(f"| {k} x {n} | {name} | " + " | ".join(cells) + " |")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where results go")
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop")
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, with small shapes")
    parser.add_argument("--readme", action="store_true", help="only put a table of benchmarks/gpu.json into the README")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker.read_text()), options.dry)
        return
    if options.readme:
        readme = ROOT / "README.md"
        text = summarized(json.loads((options.out / "gpu.json").read_text()), readme.read_text())
        temporary = readme.with_name(".README.md.new")
        temporary.write_text(text)
        os.replace(temporary, readme)
        return
    record = run_all(options.out, 60 * options.minutes, options.dry)
    print((options.out / "gpu.md").read_text())
    wrong = [e for e in record["results"] if "error" in e["result"] or not e["result"].get("right", True)]
    sys.exit(1 if wrong or not record["results"] else 0)


if __name__ == "__main__":
    main()
