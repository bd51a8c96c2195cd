"""`runs_as` against the programs that are made: a kernel is called where it says so, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims

import qjax
from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.backends.epilogue import Epilogue, Step
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.cache_attention import api as cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.pallas_kernels.ops.cache_dot import api as cache_dot
from qjax.pallas_kernels.ops.epilogue_matmul import api as epilogue_matmul
from qjax.pallas_kernels.ops.fp8_matmul import api as fp8_matmul
from qjax.pallas_kernels.ops.horizontal_matmul import api as horizontal_matmul
from qjax.pallas_kernels.ops.integer_matmul import api as integer_matmul
from qjax.pallas_kernels.ops.matmul import api as matmul
from qjax.pallas_kernels.ops.primitive import (
    HOPPER_KERNEL,
    SEPARATE,
    TPU_KERNEL,
    TRITON_KERNEL,
    XLA,
    XLA_BLOCKS,
    XLA_CODES,
    XLA_NO_DOT,
    Runs,
)
from qjax.pallas_kernels.ops.ragged_matmul import api as ragged_matmul
from qjax.pallas_kernels.ops.take import api as take
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qcache import CacheSpec, QCache
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
CALLS = {TPU_KERNEL: "tpu_custom_call", HOPPER_KERNEL: "mosaic_gpu", TRITON_KERNEL: "xla.gpu.triton"}
"""What the call of a kernel has in its line of a program."""


def of(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(
    format: str, group: int | None, k: int, n: int, *lead: int, order: Literal["kn", "nk"] = "kn", dtype: Any = BF16
) -> QTensor:
    """The types of a packed weight, with axes of layers or experts in front."""
    spec = QuantSpec(FORMATS[format], PerGroup(group) if group else PerChannel(), scale_rule=AbsMax())
    layout = Layout((((k, "k"),), ((n, "n"),)))
    pack = functools.partial(quantize, spec=spec, layout=layout, order=order)
    for _ in lead:
        pack = jax.vmap(pack)
    return jax.eval_shape(pack, of(*lead, k, n, dtype=dtype))


def cache(format: str, *shape: int) -> QCache:
    return jax.eval_shape(lambda x: qcache.quantize(x, CacheSpec(FORMATS[format]), -1), of(*shape))


# --- The operations, each as its function and as what `runs_as` says of the same call -----------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    program: Callable[..., Any]
    operands: tuple[Any, ...]
    asked: Callable[..., Runs]


def floats(x: Any, w: QTensor, **options: Any) -> Call:
    asked = functools.partial(matmul.runs_as, x=x, w=w, **options)
    return Call(functools.partial(matmul.quantized_matmul, **options), (x, w), asked)


def integers(m: int, w: QTensor, layer: Any = None) -> Call:
    x, scale = of(m, w.layout.k, dtype=jnp.int8), of(m, 1, dtype=F32)

    def program(x: Any, scale: Any, w: QTensor) -> jax.Array:
        return integer_matmul.integer_matmul(x, scale, None, w, layer=layer)

    asked = functools.partial(integer_matmul.runs_as, x=x, scale=scale, zero=None, w=w, layer=layer)
    return Call(program, (x, scale, w), asked)


def float8(m: int, w: QTensor, layer: Any = None) -> Call:
    x, scale = of(m, w.layout.k, dtype=jnp.float8_e4m3fn), of(m, 1, dtype=F32)
    program = functools.partial(fp8_matmul.fp8_matmul, layer=layer)
    return Call(program, (x, scale, w), functools.partial(fp8_matmul.runs_as, x=x, scale=scale, w=w, layer=layer))


def ragged(m: int, w: QTensor) -> Call:
    operands = of(m, w.layout.k), w, of(w.words.shape[0], dtype=jnp.int32)
    asked = functools.partial(ragged_matmul.runs_as, x=operands[0], w=w, group_sizes=operands[2])
    return Call(ragged_matmul.quantized_ragged_matmul, operands, asked)


def joint(x: Any, *weights: QTensor) -> Call:
    def program(x: Any, weights: Any) -> Any:
        return horizontal_matmul.joint_matmul(x, weights, layers=[None] * len(weights))

    asked = functools.partial(horizontal_matmul.runs_as, x=x, weights=weights)
    return Call(program, (x, list(weights)), asked)


def gated(x: Any, w: QTensor) -> Call:
    """The larger of two products, of floats or of codes."""
    dtype = F32 if isinstance(x, Activation) else BF16
    epilogue = Epilogue(dtype, 2, 0, (Step(prims.max_p, (0, 1), (), dtype),), 2)

    def after(x: Any, weights: Any, layers: Any, others: Any, beside: Any) -> list[jax.Array]:
        if isinstance(x, Activation):
            a, b = (integer_matmul.integer_matmul(x.codes, x.scale, None, w) for w in weights)
        else:
            a, b = (matmul.quantized_matmul(x, w) for w in weights)
        return [jnp.maximum(a, b)]

    def program(x: Any, weights: Any) -> Any:
        how: dict[str, Any] = {"epilogue": epilogue, "shapes": (), "program": after}
        return epilogue_matmul.fused_matmul(x, weights, [], layers=[None, None], **how)

    asked = functools.partial(epilogue_matmul.runs_as, x=x, weights=[w, w], epilogue=epilogue, shapes=())
    return Call(program, (x, [w, w]), asked)


def codes(m: int, k: int) -> Activation:
    return Activation(of(m, k, dtype=jnp.int8), of(m, 1, dtype=F32), None)


def scores(format: str, t: int, d: int) -> Call:
    numbers = (((3,), (3,)), ((0, 1), (0, 2)))
    x, keys = of(2, 4, 1, d), cache(format, 2, t, 4, d)
    how: dict[str, Any] = {"operand": 1, "out_dtype": F32}
    program = functools.partial(cache_dot.cache_dot_general, dimension_numbers=numbers, **how)
    asked = functools.partial(cache_dot.runs_as, x=x, cache=keys, dimension_numbers=numbers, **how)
    return Call(program, (x, keys), asked)


def attention(format: str, t: int, d: int, layers: int | None = None) -> Call:
    heads = ((0, 1), (0, 2))
    of_keys, of_values = (CacheDot((((3,), (axis,)), heads), 1, None, F32) for axis in (3, 1))
    spec = AttentionSpec(of_keys, (0, 1, 2, 3), (("multiply", 0.1),), F32, of_values)
    q, keys = of(2, 4, 1, d), cache(format, *(() if layers is None else (layers,)), 2, t, 4, d)
    index = None if layers is None else (of(dtype=jnp.int32), of(dtype=jnp.int32))

    def program(q: Any, keys: Any, values: Any, index: Any) -> jax.Array:
        return cache_attention.cache_attention(q, keys, values, None, spec, index)

    how: dict[str, Any] = {"q": q, "keys": keys, "values": keys, "mask": None, "spec": spec, "layers": index}
    return Call(program, (q, keys, keys, index), functools.partial(cache_attention.runs_as, **how))


def rows(w: QTensor) -> Call:
    operands = w, of(3, dtype=jnp.int32)
    return Call(take.quantized_take, operands, functools.partial(take.runs_as, w=w, indices=operands[1]))


# --- The table ---------------------------------------------------------------------------------------------------

# By chip, or "cpu", or "cuda" without one: the name, and a part of the reason.
Expected = dict[str, tuple[str, str]]
ONLY = "target_chip"
X = of(8, 512)
G128, NK = weight("int4", 128, 512, 256), weight("int4", 128, 512, 256, order="nk")
I8 = weight("int8", None, 512, 256)

ROWS: dict[str, tuple[Call, Expected]] = {
    "int4/g128": (
        floats(X, G128),
        {"v5e": (TPU_KERNEL, ""), "h100": (TRITON_KERNEL, "reorder"), "a100": (TRITON_KERNEL, ""), "cuda": (XLA, ONLY)},
    ),
    "int4/g128 nk": (
        floats(X, NK),
        {"v5e": (TPU_KERNEL, ""), "h100": (HOPPER_KERNEL, ""), "a100": (TRITON_KERNEL, ""), "cpu": (XLA, "")},
    ),
    "int4/g100": (
        floats(X, weight("int4", 100, 512, 256)),
        {"v5e": (XLA, "no tile holds whole groups"), "h100": (XLA, "multiple of 32"), "cpu": (XLA, "")},
    ),
    "int4/g128, transposed": (
        floats(of(8, 256), NK, transpose=True),
        {"v5e": (TPU_KERNEL, ""), "h100": (TRITON_KERNEL, "contracts K")},
    ),
    "int3": (
        floats(X, weight("int3", 128, 512, 256)),
        {"v5e": (TPU_KERNEL, ""), "a100": (XLA, "widens int3"), "cuda": (XLA, ONLY)},
    ),
    "float32, highest": (
        floats(of(8, 512, dtype=F32), weight("int4", 128, 512, 256, dtype=F32), precision=jax.lax.Precision.HIGHEST),
        {"v5e": (TPU_KERNEL, ""), "h100": (XLA, "higher precision")},
    ),
    "large, rows": (floats(of(8, 2048), weight("int4", 128, 2048, 1024)), {"cpu": (XLA_BLOCKS, "")}),
    "large, a row": (
        floats(of(1, 2048, dtype=F32), weight("int4", 128, 2048, 1024, dtype=F32)),
        {"cpu": (XLA_NO_DOT, "")},
    ),
    "integers": (
        integers(8, I8),
        {
            "v5e": (TPU_KERNEL, ""),
            "h100": (TRITON_KERNEL, "reorder"),
            "a100": (TRITON_KERNEL, ""),
            "cuda": (XLA_CODES, ONLY),
            "cpu": (XLA_CODES, ""),
        },
    ),
    "integers nk": (integers(8, weight("int8", None, 512, 256, order="nk")), {"h100": (HOPPER_KERNEL, "")}),
    "integers/g100": (
        integers(8, weight("int4", 100, 500, 256)),
        {"v5e": (XLA_CODES, "neither divide a register"), "a100": (XLA_CODES, "multiple of 32")},
    ),
    "integers, a row": (integers(1, weight("int4", 128, 1024, 1024)), {"cpu": (XLA_NO_DOT, "")}),
    "integers of a large layer": (integers(8, weight("int4", 128, 2048, 2048, 2), 1), {"cpu": (XLA_BLOCKS, "")}),
    "float8": (
        float8(8, weight("fp8_e4m3", None, 512, 256)),
        {"v5e": (XLA_CODES, ""), "h100": (XLA_CODES, ""), "cuda": (XLA_CODES, ""), "cpu": (XLA, "")},
    ),
    "float8 of a layer": (
        float8(8, weight("fp8_e4m3", None, 512, 256, 2, order="nk"), 1),
        {"h100": (HOPPER_KERNEL, ""), "cuda": (XLA_CODES, ONLY)},
    ),
    "float8 of a layer, kn": (
        float8(8, weight("fp8_e4m3", None, 512, 256, 2), 1),
        {"h100": (XLA_CODES, "reorder")},
    ),
    "experts": (
        ragged(16, weight("int4", 128, 512, 256, 4)),
        {
            "v5e": (TPU_KERNEL, ""),
            "h100": (TRITON_KERNEL, ""),
            "a100": (TRITON_KERNEL, ""),
            "cuda": (XLA, ONLY),
            "cpu": (XLA, ""),
        },
    ),
    "experts/g100": (
        ragged(16, weight("int4", 100, 512, 256, 4)),
        {"v5e": (XLA, "no tile holds whole groups"), "a100": (XLA, "multiple of 32")},
    ),
    "experts nk": (ragged(16, weight("int4", 128, 512, 256, 4, order="nk")), {"v5e": (XLA, "lookup table")}),
    "joint nk": (
        joint(X, NK, weight("int4", 128, 512, 64, order="nk")),
        {"h100": (HOPPER_KERNEL, ""), "a100": (SEPARATE, "9.0"), "cuda": (SEPARATE, ONLY), "v5e": (SEPARATE, "")},
    ),
    "joint": (joint(X, G128, G128), {"h100": (SEPARATE, "reorder"), "cpu": (SEPARATE, "")}),
    "gated": (
        gated(X, G128),
        {
            "v5e": (TPU_KERNEL, ""),
            "h100": (TRITON_KERNEL, "reorder"),
            "a100": (TRITON_KERNEL, ""),
            "cuda": (SEPARATE, ONLY),
            "cpu": (SEPARATE, ""),
        },
    ),
    "gated nk": (gated(X, NK), {"h100": (HOPPER_KERNEL, "")}),
    "gated/g100": (gated(X, weight("int4", 100, 512, 256)), {"v5e": (SEPARATE, "no tile holds whole groups")}),
    "gated, of codes": (gated(codes(8, 512), I8), {"v5e": (TPU_KERNEL, ""), "a100": (TRITON_KERNEL, "")}),
    "gated, of codes/g100": (
        gated(codes(8, 500), weight("int4", 100, 500, 256)),
        {"v5e": (SEPARATE, "neither divide a register"), "a100": (SEPARATE, "multiple of 32")},
    ),
    "scores": (
        scores("int8", 256, 128),
        {"v5e": (TPU_KERNEL, ""), "cuda": (XLA_CODES, ""), "cpu": (XLA_CODES, "")},
    ),
    "scores, 8-bit floats": (scores("fp8_e4m3", 256, 128), {"v5e": (XLA_CODES, "integers of 2, 4 and 8 bits")}),
    "attention": (
        attention("int8", 256, 128),
        {
            "v5e": (TPU_KERNEL, ""),
            "h100": (TRITON_KERNEL, ""),
            "cuda": (SEPARATE, ONLY),
            "cpu": (SEPARATE, ""),
        },
    ),
    "attention of layers": (attention("int8", 256, 128, 3), {"v5e": (TPU_KERNEL, ""), "a100": (TRITON_KERNEL, "")}),
    "attention, 8-bit floats": (
        attention("fp8_e4m3", 256, 128),
        {"v5e": (SEPARATE, "integers of 2, 4 and 8 bits"), "h100": (SEPARATE, "integers of 2, 4 and 8 bits")},
    ),
    "rows of a table": (rows(NK), {"v5e": (XLA, ""), "h100": (XLA, ""), "cpu": (XLA, "")}),
}
CASES = [(name, chip) for name, (_, expected) in ROWS.items() for chip in expected]


@pytest.mark.parametrize(("name", "chip"), CASES, ids=lambda part: part.replace(" ", "_"))
def test_a_program_calls_the_kernel_that_it_is_said_to_run_as(name: str, chip: str):
    call, expected = ROWS[name]
    kernel, reason = expected[chip]
    platform = {"v5e": "tpu", "cpu": "cpu"}.get(chip, "cuda")
    if platform == "cuda" and not triton.finds_device():
        pytest.skip("from jax 0.11 on Triton's lowering asks for a device")
    with contextlib.nullcontext() if chip in ("cpu", "cuda") else qjax.target_chip(chip):
        runs = call.asked(platform)
        text = jax.jit(call.program).trace(*call.operands).lower(lowering_platforms=(platform,)).as_text()
    assert runs.name == kernel
    assert reason in runs.reason
    assert bool(reason) == bool(runs.reason)
    lines = [line for line in text.splitlines() if "custom_call @" in line]
    called = {own: sum(mark in line for line in lines) for own, mark in CALLS.items()}
    if kernel == SEPARATE:  # of two products, which may be kernels each
        assert sum(called.values()) in (0, 2)
    else:
        assert {own: count for own, count in called.items() if count} == ({kernel: 1} if kernel in CALLS else {})


def test_it_traces_nothing(monkeypatch: pytest.MonkeyPatch):
    """So that a plan can ask it for each product."""
    asked = [
        functools.partial(call.asked, platform) for call, _ in ROWS.values() for platform in ("cpu", "tpu", "cuda")
    ]
    for chip in ("v5e", "h100"):
        with qjax.target_chip(chip), monkeypatch.context() as patch:
            before = [ask() for ask in asked]  # imports the kernels, and reads tables
            patch.setattr(Primitive, "bind", None)
            assert [ask() for ask in asked] == before


def test_a_program_for_cpu_imports_no_kernel():
    program = """
import sys
import jax, jax.numpy as jnp
before = set(sys.modules)
import qjax
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import quantize
w = quantize(jnp.ones((64, 32)), qjax.int4(group=32), Layout((((64, "k"),), ((32, "n"),))))
print(quantized_matmul(jnp.ones((3, 64)), w).shape)
new = [name for name in sys.modules if name not in before]
kernels = [name for name in new if name.startswith("jax.experimental.pallas.")]
own = [name for name in new if name.startswith("qjax.") and name.split(".")[-1] in ("tpu", "mosaic", "triton")]
assert not kernels, kernels
assert not [name for name in own if ".ops." in name or ".backends." in name], own
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(3,", "32)"]
