"""Every kernel compiles for every TPU, with the compiler that TPUs use and no TPU; none of this runs a kernel.

Shapes are few but awkward: the numbers are right or wrong in `test_matmul_tpu` and `test_integer_matmul_tpu`.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_compile

import qjax
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.ops.cache_attention.api import cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.pallas_kernels.ops.cache_dot import reference as cache_dot_reference
from qjax.pallas_kernels.ops.cache_dot.api import cache_dot_general
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "tpu_custom_call"
CHIPS = tuple(tpu_compile.CHIPS)
Shape = jax.ShapeDtypeStruct


def weight(spec: QuantSpec, k: int, n: int, lead: tuple[int, ...] = (), order: Any = "kn") -> QTensor:
    """The shapes of a packed `(*lead, k, n)`."""
    layout = Layout((*(((size, "stack"),) for size in lead[1:]), ((k, "k"),), ((n, "n"),)))
    return jax.eval_shape(lambda w: quantize(w, spec, layout, order), Shape((*lead, k, n), jnp.float32))


def spec(format: str, granularity: Any, scale: str = "float32", **options: Any) -> QuantSpec:
    return QuantSpec(FORMATS[format], granularity, scale_dtype=scale, scale_rule=AbsMax(), **options)


def compiled(function: Any, *args: Any, chip: str) -> str:
    return tpu_compile.compile(function, *args, chip=chip).as_text()


# --- Integer products ------------------------------------------------------------------------------------------

# Format, granularity, dtype of its scales; order; zero points of x and of the weight; rows, K, N.
INTEGER: list[tuple[str, Any, str, Any, str, int, int, int]] = [
    ("int8", PerChannel(), "float32", "nk", "", 16, 4096, 1024),
    ("int8", PerChannel(), "float32", "nk", "xw", 600, 2048, 1000),
    ("int8", PerChannel(), "bfloat16", "kn", "x", 512, 1000, 512),
    ("int8", PerTensor(), "float32", "kn", "w", 1, 100, 10),
    ("int8", PerGroup(128), "float16", "kn", "", 32, 1024, 512),
    ("int4", PerChannel(), "float32", "kn", "", 128, 11008, 512),
    ("int4", PerGroup(128), "bfloat16", "kn", "", 16, 4096, 1024),
    ("int4", PerGroup(128), "bfloat16", "kn", "xw", 129, 4000, 300),
    ("int4", PerGroup(32), "bfloat16", "kn", "x", 1, 1000, 1000),
    ("int4", PerGroup(64), "bfloat16", "kn", "", 512, 1024, 512),
    ("int4", PerGroup(512), "bfloat16", "kn", "w", 600, 8192, 256),
    ("int3", PerGroup(64), "bfloat16", "kn", "", 16, 4096, 512),
    ("int3", PerGroup(32), "bfloat16", "kn", "x", 3, 1000, 130),
    ("int2", PerGroup(16), "bfloat16", "kn", "", 17, 512, 129),
    ("int5", PerChannel(), "float32", "kn", "", 16, 1024, 256),
    ("int6", PerGroup(128), "bfloat16", "kn", "", 16, 1000, 256),
    ("int7", PerChannel(), "float32", "kn", "", 16, 1000, 256),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", INTEGER, ids=lambda row: "-".join(map(str, row)))
def test_integer_products_compile(row: Any, chip: str):
    format, granularity, scale, order, zeros, m, k, n = row
    w = weight(spec(format, granularity, scale, zero_point="w" in zeros), k, n, order=order)
    column = Shape((m, 1), jnp.float32)
    operands = (Shape((m, k), jnp.int8), column, column if "x" in zeros else None, w)
    assert KERNEL in compiled(lambda *o: integer_matmul(*o, out_dtype=jnp.bfloat16), *operands, chip=chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_experts_in_layers_compile(chip: str):
    w = weight(spec("int4", PerGroup(128), "bfloat16"), 1024, 512, lead=(4, 3))
    operands = (Shape((3, 8, 1024), jnp.int8), Shape((3, 8, 1), jnp.float32), w, Shape((), jnp.int32))
    product = compiled(lambda x, s, w, i: integer_matmul(x, s, None, w, layer=i), *operands, chip=chip)
    assert KERNEL in product


# --- Products of 8-bit floats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", CHIPS)
def test_products_of_8_bit_floats_are_left_to_xla(chip: str):
    """The matrix unit's operands are both float8, no other type of the weight is in the program, and nothing moves it.

    That holds for chips that have no arithmetic for such numbers too: the conversion is part of their product.
    """
    q = qjax.quantize(stacked, "w8a8_fp8")
    packed = jax.eval_shape(q.convert, PARAMS, X)
    compiled = tpu_compile.compile(q.apply, packed, X, chip=chip)
    text = compiled.as_text()
    dtypes = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
    products = re.findall(r" (?:convolution|dot)\((%[\w.\-]+), (%[\w.\-]+)\)", text)
    assert [[dtypes[name] for name in operands] for operands in products] == 2 * [["f8e4m3fn", "f8e4m3fn"]]
    assert KERNEL not in text
    assert compiled.memory_analysis().temp_size_in_bytes < WIDTH * HIDDEN / 8


# --- Weight-only products --------------------------------------------------------------------------------------

# Format, granularity, dtype of its scales; dtype of x; rows, K, N.
WEIGHT_ONLY: list[tuple[str, Any, str, Any, int, int, int]] = [
    *((format, PerGroup(64), "bfloat16", "bfloat16", 16, 4096, 512) for format in FORMATS),
    *((format, PerChannel(), "float32", "bfloat16", 3, 1000, 130) for format in ("int3", "int4", "int8", "nf4")),
    ("int4", PerGroup(128), "bfloat16", "bfloat16", 512, 4096, 1024),
    ("int4", PerGroup(128), "float32", "bfloat16", 129, 1000, 1000),
    ("int4", PerGroup(32), "float16", "float32", 16, 1024, 512),
    ("int4", PerTensor(), "float32", "float32", 1, 104, 10),
    ("nf4", PerGroup(64), "bfloat16", "bfloat16", 512, 2048, 512),
    ("int8", PerGroup(256), "bfloat16", "float32", 256, 1024, 512),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", WEIGHT_ONLY, ids=lambda row: "-".join(map(str, row)))
def test_weight_only_products_compile(row: Any, chip: str):
    format, granularity, scale, dtype, m, k, n = row
    zero_point = FORMATS[format].kind == "int" and k < 4096
    w = weight(spec(format, granularity, scale, zero_point=zero_point), k, n)
    assert KERNEL in compiled(quantized_matmul, Shape((m, k), jnp.dtype(dtype)), w, chip=chip)


# Format, granularity, dtype of its scales; rows, K, N.
LOGITS: list[tuple[str, Any, str, int, int, int]] = [
    ("int4", PerGroup(64), "bfloat16", 1, 4096, 128256),
    ("int4", PerGroup(128), "bfloat16", 16, 4096, 32000),
    ("int4", PerGroup(64), "float16", 512, 4096, 32000),
    ("int8", PerChannel(), "float32", 16, 4096, 128256),
    ("int8", PerGroup(64), "bfloat16", 512, 4096, 32000),
    ("nf4", PerGroup(64), "bfloat16", 1, 2304, 256000),
    ("int3", PerGroup(64), "bfloat16", 16, 4096, 32000),
    ("fp8_e4m3", PerChannel(), "float32", 16, 1000, 128256),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", LOGITS, ids=lambda row: "-".join(map(str, row)))
def test_products_with_lookup_tables_compile(row: Any, chip: str):
    """Tied embeddings: the kernel reads the words as lookups do, and nothing else moves them."""
    format, granularity, scale, m, k, n = row
    w = weight(spec(format, granularity, scale), k, n, order="nk")
    text = compiled(quantized_matmul, Shape((m, k), jnp.bfloat16), w, chip=chip)
    assert KERNEL in text
    assert moved(text, w, layers=1) == []


@pytest.mark.parametrize("chip", CHIPS)
def test_their_transpose_and_experts_in_layers_compile(chip: str):
    """The derivative with respect to x multiplies by the transposed matrix."""
    w = weight(spec("int4", PerGroup(128), "bfloat16"), 1024, 512, lead=(4, 3))
    operands = (Shape((3, 8, 1024), jnp.bfloat16), w, Shape((), jnp.int32))

    def loss(x: Any, w: QTensor, layer: Any) -> Any:
        return jnp.sum(quantized_matmul(x, w, layer=layer) ** 2)

    assert compiled(jax.grad(loss), *operands, chip=chip).count(f'custom_call_target="{KERNEL}"') == 2


# --- Rows sorted by expert --------------------------------------------------------------------------------------

# Format, granularity, dtype of its scales; dtype of x; rows, experts, K, N.
RAGGED: list[tuple[str, Any, str, Any, int, int, int, int]] = [
    ("int4", PerGroup(128), "bfloat16", "bfloat16", 16, 64, 2048, 1408),
    ("int4", PerGroup(32), "float16", "float32", 1, 5, 1000, 130),
    ("int8", PerChannel(), "float32", "bfloat16", 4096, 8, 4096, 1024),
    ("nf4", PerGroup(64), "bfloat16", "bfloat16", 100, 8, 1024, 512),
    ("int3", PerGroup(64), "bfloat16", "bfloat16", 3000, 64, 1000, 300),
    ("fp8_e4m3", PerChannel(), "float32", "bfloat16", 64, 8, 4096, 512),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", RAGGED, ids=lambda row: "-".join(map(str, row)))
def test_ragged_products_compile(row: Any, chip: str):
    format, granularity, scale, dtype, m, experts, k, n = row
    zero_point = FORMATS[format].kind == "int" and k < 4096
    w = weight(spec(format, granularity, scale, zero_point=zero_point), k, n, lead=(experts,))
    operands = (Shape((m, k), jnp.dtype(dtype)), w, Shape((experts,), jnp.int32))
    assert KERNEL in compiled(quantized_ragged_matmul, *operands, chip=chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_their_derivative_compiles(chip: str):
    w = weight(spec("int4", PerGroup(128), "bfloat16"), 1024, 512, lead=(4, 3))
    operands = (Shape((40, 1024), jnp.bfloat16), w, Shape((3,), jnp.int32), Shape((), jnp.int32))

    def loss(x: Any, w: QTensor, sizes: Any, layer: Any) -> Any:
        return jnp.sum(quantized_ragged_matmul(x, w, sizes, layer=layer) ** 2)

    assert compiled(jax.grad(loss), *operands, chip=chip).count(f'custom_call_target="{KERNEL}"') == 2


# --- Products and what follows them ----------------------------------------------------------------------------

EPILOGUES = {
    "bias": lambda p, x: x @ p["w"] + p["b"],
    "gelu": lambda p, x: jax.nn.gelu(x @ p["w"] + p["b"], approximate=False),
    "elu, softplus": lambda p, x: jax.nn.elu(jax.nn.softplus(jax.nn.leaky_relu(x @ p["w"])) - 1),
    "gate": lambda p, x: jax.nn.silu(x @ p["w"]) * (x @ p["v"] + p["b"]),
    "residual": lambda p, x: p["r"] + x[:, :1] * (x @ p["w"]) / 3,
}

# Epilogue; format, granularity; dtype of x; rows, K.
FUSED: list[tuple[str, str, Any, str, int, int]] = [
    *((name, "int4", PerGroup(128), "bfloat16", 16, 1024) for name in EPILOGUES),
    ("gelu", "int8", PerChannel(), "float32", 512, 1000),
    ("gate", "nf4", PerGroup(64), "float32", 600, 1024),
    ("gate", "int4", PerGroup(128), "bfloat16", 512, 4096),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", FUSED, ids=lambda row: "-".join(map(str, row)))
def test_what_follows_a_product_is_in_its_kernel(row: Any, chip: str):
    """One kernel, and no other operation computes as many values as the result has."""
    name, format, granularity, dtype, m, k = row
    n = k + 130
    of = {"w": (k, n), "v": (k, n), "b": (n,), "r": (m, n)}
    names = {"bias": "wb", "gelu": "wb", "gate": "wvb", "residual": "wr"}.get(name, "w")
    q = qjax.quantize(EPILOGUES[name], [qjax.Rule("*", spec(format, granularity))])
    x = Shape((m, k), jnp.dtype(dtype))
    packed = jax.eval_shape(q.convert, {name: Shape(of[name], x.dtype) for name in names}, x)
    text = compiled(q.apply, packed, x, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 1
    assert not re.search(rf"= \w+\[(1,)?{m},{n}\]\S* (fusion|add|multiply|convert)\(", text)


# Format, granularity and order of the weight; rows, K.
FUSED_INTEGERS: list[tuple[str, str, Any, int, int]] = [
    ("gelu", "int8", PerChannel(), 16, 1024),
    ("gate", "int8", PerChannel(), 100, 1000),
    ("gate", "int4", PerGroup(128), 512, 4096),
    ("residual", "int4", PerGroup(32), 3, 1000),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", FUSED_INTEGERS, ids=lambda row: "-".join(map(str, row)))
def test_what_follows_a_product_of_integers_is_in_its_kernel(row: Any, chip: str):
    name, format, granularity, m, k = row
    n = k + 130
    of = {"w": (k, n), "v": (k, n), "b": (n,), "r": (m, n)}
    names = {"bias": "wb", "gelu": "wb", "gate": "wvb", "residual": "wr"}.get(name, "w")
    q = qjax.quantize(EPILOGUES[name], [qjax.Rule("*", spec(format, granularity), qjax.dynamic())])
    x = Shape((m, k), jnp.bfloat16)
    packed = jax.eval_shape(q.convert, {name: Shape(of[name], x.dtype) for name in names}, x)
    text = compiled(q.apply, packed, x, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 1
    assert not re.search(rf"= \w+\[(1,)?{m},{n}\]\S* (fusion|add|multiply|convert)\(", text)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("rows", "zero_point", "format"), [(3, True, "int8"), (300, False, "int8"), (48, True, "int4")]
)
def test_codes_go_from_product_to_product(rows: int, zero_point: bool, format: str, chip: str):
    """Two kernels; what lies between them is written once, as codes of a byte."""
    k, n = 512, 1200

    def mlp(p: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    rule = qjax.Rule("**", spec(format, PerChannel()), qjax.static(zero_point=zero_point))
    q, x = qjax.quantize(mlp, [rule]), Shape((rows, k), jnp.bfloat16)
    params = {name: Shape(shape, x.dtype) for name, shape in (("gate", (k, n)), ("up", (k, n)), ("down", (n, k)))}
    ranges = {name: {"low": Shape((), jnp.float32), "high": Shape((), jnp.float32)} for name in ("gate", "down")}
    packed = jax.eval_shape(q.convert, {"params": params, "quant_stats": ranges}, x)
    text = compiled(q.apply, packed, x, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 2
    assert set(re.findall(rf"= (\w+)\[(?:1,)?{rows},{n}\]", text)) == {"s8"}


# --- Scanned layers --------------------------------------------------------------------------------------------

LAYERS, WIDTH, HIDDEN = 32, 4096, 11008
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", re.MULTILINE)
_MOVES_NOTHING = {"parameter", "get-tuple-element", "bitcast"}


def block(x: Any, up: Any, down: Any) -> Any:
    return x + jax.nn.relu(x @ up) @ down


def stacked(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, p: (block(x, p["up"], p["down"]), None), x, params)[0]


PARAMS = {
    "up": Shape((LAYERS, WIDTH, HIDDEN), jnp.bfloat16),
    "down": Shape((LAYERS, HIDDEN, WIDTH), jnp.bfloat16),
}
X = Shape((16, WIDTH), jnp.bfloat16)


def moved(text: str, packed: Any, layers: int = LAYERS) -> list[str]:
    """Instructions that write as many integers as one of so many layers of packed words has, of their type."""
    words = jax.tree.leaves(packed, is_leaf=lambda a: isinstance(a, QTensor))
    least = {f"s{8 * w.words.dtype.itemsize}": min(w.words.size // layers for w in words) for w in words}
    found = []
    for dtype, shape, name in _INSTRUCTION.findall(text):
        size = math.prod(int(d) for d in shape.split(",") if d)
        if dtype in least and size >= least[dtype] and name not in _MOVES_NOTHING:
            found.append(f"{name} {dtype}[{shape}]")
    return found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "int4"])
def test_scanned_layers_read_the_packed_stack_in_place(recipe: str, chip: str):
    """The kernel picks its layer out of the whole stack: nothing else touches the words."""
    q = qjax.quantize(stacked, recipe)
    packed = jax.eval_shape(q.convert, PARAMS, X)
    text = compiled(q.apply, packed, X, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 2
    assert moved(text, packed) == []


EXPERTS, EXPERT_WIDTH = 16, 1024


def mixture(params: Any, x: Any) -> Any:
    """Layers of experts, each row to the best one."""

    def layer(x: Any, p: Any) -> Any:
        expert = jnp.argmax(x @ p["router"], axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=EXPERTS)
        h = jax.nn.silu(jax.lax.ragged_dot(x[order], p["up"], sizes))
        return x + jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)], None

    return jax.lax.scan(layer, x, params)[0]


@pytest.mark.parametrize("chip", CHIPS)
def test_scanned_experts_read_the_packed_stack_in_place(chip: str):
    params = {
        "router": Shape((LAYERS, WIDTH, EXPERTS), jnp.bfloat16),
        "up": Shape((LAYERS, EXPERTS, WIDTH, EXPERT_WIDTH), jnp.bfloat16),
        "down": Shape((LAYERS, EXPERTS, EXPERT_WIDTH, WIDTH), jnp.bfloat16),
    }
    q = qjax.quantize(mixture, [qjax.Rule("router"), qjax.Rule("**", qjax.int4(group=128))])
    packed = jax.eval_shape(q.convert, params, X)
    text = compiled(q.apply, packed, X, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 2
    experts = {name: packed[name] for name in ("up", "down")}
    assert moved(text, experts, layers=LAYERS * EXPERTS) == []


def test_a_stack_that_is_sliced_is_found():
    """What the test above looks for is there when the words of each layer are sliced out of the stack."""
    w = weight(spec("int4", PerGroup(128)), WIDTH, WIDTH, lead=(LAYERS,))

    def sliced(x: Any, scale: Any, w: QTensor) -> Any:
        return jax.lax.scan(lambda total, w: (total + integer_matmul(x, scale, None, w), None), 0.0 * x, w)[0]

    text = compiled(sliced, Shape((16, WIDTH), jnp.int8), Shape((16, 1), jnp.float32), w, chip="v6e")
    assert moved(text, w)


# --- Packed key-value caches ------------------------------------------------------------------------------------

# Format, zero point, dtype of scales; how the cache is stored, positions, heads of the cache, dim; rows of x.
CACHES: list[tuple[str, bool, str, str, int, int, int, int]] = [
    ("int8", False, "float32", "bthd", 4096, 8, 128, 4),
    ("int8", True, "bfloat16", "bthd", 4096, 16, 128, 1),
    ("int8", False, "float32", "bthd", 1000, 8, 256, 2),
    ("int8", True, "float16", "bthd", 1000, 2, 128, 8),
    ("int8", False, "float32", "bthd", 4096, 16, 64, 3),
    ("int8", False, "float32", "bhdt", 4096, 8, 128, 4),
    ("int4", True, "bfloat16", "bthd", 4096, 8, 128, 4),
    ("int4", False, "float32", "bhtd", 4096, 8, 64, 200),
    ("int2", True, "float32", "bthd", 1000, 4, 128, 1),
]


def cache_of(format: str, zero_point: bool, scale: Any, shape: tuple[int, ...], axis: int) -> qcache.QCache:
    """The shapes of a packed cache."""
    spec = qcache.CacheSpec(FORMATS[format], zero_point, scale)
    return jax.eval_shape(lambda: qcache.zeros(shape, jnp.bfloat16, spec, axis))


_WRITES = re.compile(r"^\s*(?:ROOT )?%[\w.\-]+ = \(?(\w+)\[([\d,]*)\](\S*) ([\w\-]+)\(", re.MULTILINE)


def written(text: str, least: int) -> list[str]:
    """Instructions that write arrays of so many elements to HBM; `S(1)` in a layout is VMEM, for what is prefetched."""
    found = []
    for dtype, shape, layout, name in _WRITES.findall(text[text.index("\nENTRY") :]):
        size = math.prod(int(d) for d in shape.split(",") if d)
        if size >= least and name not in _MOVES_NOTHING and "S(1)" not in layout and not name.endswith("start"):
            found.append(f"{name} {dtype}[{shape}]")
    return found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", CACHES, ids=lambda row: "-".join(map(str, row)))
def test_caches_are_read_as_they_are_stored(row: Any, chip: str):
    """The order in which the kernel wants the axes is the one that XLA gives such an array: nothing is copied."""
    format, zero_point, scale, stored, t, h, d, m = row
    sizes = {"b": 2, "t": t, "h": h, "d": d}
    cache = cache_of(format, zero_point, scale, tuple(sizes[a] for a in stored), stored.index("d"))
    heads = ((0, 1), (stored.index("b"), stored.index("h")))

    def both(q: Any, p: Any, keys: Any, values: Any) -> Any:
        scores = (((3,), (stored.index("d"),)), heads)
        products = (((3,), (stored.index("t"),)), heads)
        return (
            cache_dot_general(q, keys, scores, operand=1, out_dtype=jnp.float32),
            cache_dot_general(p, values, products, operand=1, out_dtype=q.dtype),
        )

    x = (Shape((2, h, m, d), jnp.bfloat16), Shape((2, h, m, t), jnp.bfloat16))
    text = compiled(both, *x, cache, cache, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 2
    results = 2 * h * m * max(d, t)
    assert written(text, max(cache.codes.size, results + 1)) == []


# Formats of keys and values, zero points; positions, heads, dim; rows of queries; the sizes of the mask but the last.
ATTENTION: list[tuple[str, str, bool, int, int, int, int, Any]] = [
    ("int8", "int8", False, 4096, 16, 128, 1, (2, 1, 1)),
    ("int8", "int4", True, 1000, 8, 128, 256, (1, 1, 256)),
    ("int4", "int4", False, 1000, 16, 64, 3, (2, 16, 1)),
    ("int8", "int2", True, 1000, 8, 256, 2, None),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("row", ATTENTION, ids=lambda row: "-".join(map(str, row)))
def test_attention_compiles(row: Any, chip: str):
    *formats, zero_point, t, h, d, m, mask = row
    keys, values = (cache_of(format, zero_point, "bfloat16", (2, t, h, d), -1) for format in formats)
    heads, dtype = ((0, 1), (0, 2)), jnp.dtype(jnp.bfloat16)
    scores, result = (CacheDot((((3,), (axis,)), heads), 1, None, dtype) for axis in (3, 1))
    spec = AttentionSpec(scores, (0, 1, 2, 3), (("mask", -1e9),) if mask else (), dtype, result)
    seen = Shape((*mask, t), jnp.bool_) if mask else None
    q = Shape((2, h, m, d), dtype)
    text = compiled(lambda q, k, v, m: cache_attention(q, k, v, m, spec), q, keys, values, seen, chip=chip)
    assert text.count(f'custom_call_target="{KERNEL}"') == 1


def attend(q: Any, keys: Any, values: Any, i: Any) -> Any:
    """Grouped queries (B, K, G, D) on caches (B, T, K, D) up to position i."""
    scores = jnp.einsum("bkgd,btkd->bkgt", q, keys) / q.shape[-1] ** 0.5
    p = jax.nn.softmax(jnp.where(jnp.arange(keys.shape[1]) <= i, scores, -1e9).astype(jnp.float32))
    return jnp.einsum("bkgt,btkd->bkgd", p.astype(q.dtype), values)


def decode(params: Any, cache: Any, x: Any, i: Any) -> Any:
    """A step of attention: x (B, 1, K, D)."""
    cache = {
        name: jax.lax.dynamic_update_slice_in_dim(cache[name], x @ params[name], i, axis=1)
        for name in ("keys", "values")
    }
    q = (x @ params["queries"]).reshape(*x.shape[:1], x.shape[2], 4, x.shape[3])
    return attend(q, cache["keys"], cache["values"], i), cache


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_decode_step_reads_nothing_but_packed_caches(format: str, chip: str):
    """It writes them in place, and nothing of their size, neither floats nor codes, anywhere else."""
    b, t, heads, d = 4, 8192, 8, 128
    params = {name: Shape((d, n), jnp.bfloat16) for name, n in (("keys", d), ("values", d), ("queries", 4 * d))}
    floats = {name: Shape((b, t, heads, d), jnp.bfloat16) for name in ("keys", "values")}
    x, i = Shape((b, 1, heads, d), jnp.bfloat16), Shape((), jnp.int32)
    q = qjax.quantize(decode, [qjax.Rule("**")], kv_cache={"0/**": format})
    packed = {name: q.plan(params, floats, x, i).caches[f"0/{name}"].pack(floats[name]) for name in floats}
    packed = jax.eval_shape(lambda: packed)
    compiled = tpu_compile.compile(jax.jit(q.apply, donate_argnums=1), params, packed, x, i, chip=chip)
    text, memory, stored = (
        compiled.as_text(),
        compiled.memory_analysis(),
        sum(cache.nbytes for cache in packed.values()),
    )
    assert text.count(f'custom_call_target="{KERNEL}"') == 1
    assert memory.alias_size_in_bytes >= stored
    assert memory.temp_size_in_bytes < stored / 20
    assert [w for w in written(text, packed["keys"].codes.size) if f" s{32 if format == 'int4' else 8}[" not in w] == []


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_scanned_layers_update_and_read_stacked_caches_in_place(format: str):
    """No cache is copied out of its stack or back into it."""
    layers, b, t, heads, d = 3, 4, 8192, 8, 128
    params = {name: Shape((layers, d, n), jnp.bfloat16) for name, n in (("keys", d), ("values", d), ("queries", 4 * d))}
    floats = {name: Shape((layers, b, t, heads, d), jnp.bfloat16) for name in ("keys", "values")}
    x, i = Shape((b, 1, heads, d), jnp.bfloat16), Shape((), jnp.int32)

    def scanned(params: Any, cache: Any, x: Any, i: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            out, cache = decode(*own, x, i)
            return x + out.sum(2)[:, None], cache

        return jax.lax.scan(layer, x, (params, cache))

    q = qjax.quantize(scanned, [qjax.Rule("**")], kv_cache={"0/**": format})
    packed = {name: q.plan(params, floats, x, i).caches[f"0/{name}"] for name in floats}
    packed = jax.eval_shape(lambda: {name: entry.pack(floats[name]) for name, entry in packed.items()})
    step = jax.jit(q.apply, donate_argnums=1)
    memory = tpu_compile.compile(step, params, packed, x, i, chip="v6e").memory_analysis()
    of_a_layer = packed["keys"].nbytes / layers
    assert memory.alias_size_in_bytes >= sum(cache.nbytes for cache in packed.values())
    assert memory.temp_size_in_bytes < of_a_layer / 5


def test_a_cache_that_is_written_as_floats_is_found():
    """What the tests above look for is there in plain operations on an int8 cache."""
    cache = cache_of("int8", False, "float32", (8, 8192, 8, 128), -1)
    options: dict[str, Any] = {"operand": 1, "precision": None, "out_dtype": jnp.dtype(jnp.bfloat16)}
    numbers = (((3,), (3,)), ((0, 1), (0, 2)))
    scores = functools.partial(cache_dot_reference.dot, numbers=numbers, **options)
    text = compiled(scores, Shape((8, 8, 4, 128), jnp.bfloat16), cache, chip="v5e")
    assert any(" bf16[8,8192,8,128]" in w for w in written(text, cache.codes.size))


# --- The schedules that benchmarks read ------------------------------------------------------------------------

_LOOP = """
import sys
import jax, jax.numpy as jnp, tpu_compile
from jax.experimental import pallas as pl

def kernel(trips, x, out):
    def body(i, total):
        return total + jnp.dot(x[i], x[i], preferred_element_type=jnp.float32)
    out[...] = jax.lax.fori_loop(0, trips, body, jnp.zeros((128, 128), jnp.float32))

for trips in (64, 128):
    call = pl.pallas_call(
        lambda *refs: kernel(trips, *refs),
        grid=(4,),
        in_specs=[pl.BlockSpec((128, 128, 128), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((512, 128), jnp.float32),
        name="looped",
    )
    x = jax.ShapeDtypeStruct((512, 128, 128), jnp.bfloat16)
    (looped,) = (s for name, s in tpu_compile.compile_scheduled(call, x, chip="v6e")[1].items() if "looped" in name)
    print(looped.text.mxu, looped.step.mxu, looped.text.bundles, looped.step.bundles, looped.text.spills)
"""


def test_a_schedule_counts_a_loop_as_often_as_it_runs():
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "tpu")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", _LOOP], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    once, twice = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert once[0] == twice[0] > 0  # the text is the same
    assert once[1] % 64 == 0 and twice[1] == 2 * once[1] > twice[0]
    assert once[3] < twice[3] < 2 * once[3] and twice[3] > 64 * 8
    assert once[4] == 0


def test_schedules_are_written_from_the_start_or_not_at_all():
    tpu_compile.compile(jnp.sin, Shape((8, 128), jnp.float32), chip="v6e")
    with pytest.raises(RuntimeError, match="Call this first"):
        tpu_compile.compile_scheduled(jnp.sin, Shape((8, 128), jnp.float32), chip="v6e")


def test_an_unknown_chip_is_an_error():
    with pytest.raises(ValueError, match="v5e, v5p, v6e, 7x"):
        tpu_compile.compile(jnp.sin, Shape((8, 128), jnp.float32), chip="v7x")
