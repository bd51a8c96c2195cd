"""Every kernel for NVIDIA GPUs compiles, with the compiler that JAX has for them and no GPU; none of them runs.

Whether the numbers are right `test_matmul_gpu` says.
"""

from __future__ import annotations

import math
import re
from typing import Any

import bench_decode
import gpu_compile
import jax
import jax.numpy as jnp
import pytest
from gpu_compile import ATTENTION, INTEGER, INTEGER_FUSED, RAGGED, VARIANTS, Attention, Variant
from jax.extend.core import primitives as prims

import qjax
from qjax.pallas_kernels.backends.epilogue import OPERATIONS, Constant, Epilogue, Step
from qjax.pallas_kernels.chips.gpu import target_chip
from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic
from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.ops.take.api import quantized_take
from qjax.pallas_kernels.packed.qtensor import QTensor

if not gpu_compile.available():
    pytest.fail("JAX's CUDA plugin is not installed, or no ptxas: scripts/test_kernels installs them", pytrace=False)

MOSAIC, TRITON = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"


@pytest.mark.parametrize("variant", VARIANTS + gpu_compile.CODES, ids=str)
def test_mosaic_gpu_compiles_without_spills(variant: Variant):
    with target_chip("h100"):
        compiled, (kernel,) = gpu_compile.compile_counted(
            gpu_compile.product(matmul_mosaic), variant.x(), variant.weight("nk"), chip="h100"
        )
    assert f'custom_call_target="{MOSAIC}"' in compiled.as_text()
    assert kernel.spilled == 0
    assert not kernel.serialized  # each `wgmma` waiting for the one before
    assert kernel.registers in (96, 168)  # what a multiprocessor has for five warpgroups, and for two or three


def test_spills_are_found():
    """A warpgroup that holds the scales and zero points of sixteen groups has no registers left for weights."""
    blocks = matmul_mosaic.Blocks(m=8, n=128, k=1024, ways=2, stages=2, splits=1)
    variant = Variant("int4", 32, True, "bfloat16", 8, 4096, 4096)
    product = gpu_compile.product(matmul_mosaic, blocks=blocks)
    _, (kernel,) = gpu_compile.compile_counted(product, variant.x(), variant.weight("nk"), chip="h100")
    assert kernel.spilled > 0


@pytest.mark.parametrize("order", ["kn", "nk"])
@pytest.mark.parametrize("chip", gpu_compile.CHIPS)
@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (1, 4, 12, 19)], ids=str)
def test_triton_compiles(variant: Variant, chip: str, order: str):
    compiled = gpu_compile.compile(gpu_compile.product(matmul_triton), variant.x(), variant.weight(order), chip=chip)
    assert f'custom_call_target="{TRITON}"' in compiled.as_text()


@pytest.mark.parametrize(("name", "variant"), gpu_compile.FUSED, ids=str)
def test_epilogues_compile_without_spills(name: str, variant: Variant):
    with target_chip("h100"):
        function, operands = gpu_compile.fused(matmul_mosaic, name, variant, "nk")
        _, (kernel,) = gpu_compile.compile_counted(function, *operands, chip="h100")
    assert kernel.spilled == 0
    assert not kernel.serialized


@pytest.mark.parametrize(("variant", "widths"), gpu_compile.JOINT, ids=str)
def test_joint_products_compile_without_spills(variant: Variant, widths: tuple[int, ...]):
    with target_chip("h100"):
        function, operands = gpu_compile.joint(variant, widths)
        _, (kernel,) = gpu_compile.compile_counted(function, *operands, chip="h100")
    assert kernel.spilled == 0
    assert not kernel.serialized


def triton_programs() -> list[Any]:
    rows = [
        (str(v), lambda v=v: (gpu_compile.product(matmul_triton), (v.x(), v.weight("nk")))) for v in gpu_compile.CODES
    ]
    rows += [
        (f"{v}-{o}", lambda v=v, o=o: gpu_compile.transposed(v, o))
        for v, o in zip(gpu_compile.TRANSPOSED, ("kn", "nk"), strict=True)
    ]
    fused = (gpu_compile.FUSED[i] for i in (0, 3, 6))
    rows += [(f"{name}-{v}", lambda n=name, v=v: gpu_compile.fused(matmul_triton, n, v, "kn")) for name, v in fused]
    return [pytest.param(make, id=name) for name, make in rows]


@pytest.mark.parametrize("make", triton_programs())
def test_triton_compiles_what_else_it_takes(make: Any):
    with target_chip("h100"):
        function, operands = make()
        compiled = gpu_compile.compile(function, *operands, chip="h100")
    assert f'custom_call_target="{TRITON}"' in compiled.as_text()


def every_operation(missing: set[Any]) -> Epilogue:
    """Each operation of an epilogue that a kernel has, one after the other."""
    f32, steps = jnp.dtype(jnp.float32), []

    def add(primitive: Any, *operands: Any, dtype: Any = f32, **params: Any) -> int:
        steps.append(Step(primitive, operands, tuple(params.items()), dtype))
        return len(steps)

    value, zero, half = 0, Constant(0.0, f32), Constant(0.5, f32)
    for primitive in [one for one in OPERATIONS if one not in missing]:
        name = primitive.name
        if name in ("eq", "ne", "lt", "le", "gt", "ge"):
            truth = add(primitive, value, zero, dtype=jnp.dtype(bool))
            value = add(prims.select_n_p, truth, half, value)
            value = add(prims.add_p, value, add(prims.convert_element_type_p, truth))
        elif name in ("add", "sub", "mul", "div", "max", "min"):
            value = add(primitive, half, add(primitive, value, half))
        elif name == "clamp":
            value = add(primitive, zero, value, half)
        elif name == "integer_pow":
            value = add(primitive, add(primitive, value, y=-1), y=3)
        elif name != "select_n":
            inexact = name in ("exp", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt", "expm1")
            value = add(primitive, value, **({"accuracy": None} if inexact else {}))
    return Epilogue(f32, 1, 0, tuple(steps), value)


@pytest.mark.parametrize("kernel", [matmul_mosaic, matmul_triton], ids=lambda kernel: kernel.__name__)
def test_every_operation_of_an_epilogue_compiles(kernel: Any, monkeypatch: pytest.MonkeyPatch):
    epilogue = every_operation(kernel._MISSING)
    assert kernel.unsupported_epilogue(epilogue) is None
    assert kernel.unsupported_epilogue(every_operation(set())) is not None
    monkeypatch.setitem(gpu_compile.EPILOGUES, "all", epilogue)
    variant = Variant("int4", 128, False, "bfloat16", 8, 256, 64)  # few registers, each of which goes through all of it
    with target_chip("h100"):
        function, operands = gpu_compile.fused(kernel, "all", variant, "nk")
        compiled = gpu_compile.compile(function, *operands, chip="h100")
    assert any(f'custom_call_target="{name}"' in compiled.as_text() for name in (MOSAIC, TRITON))


# --- Scanned layers -------------------------------------------------------------------------------------------------

LAYERS = 8
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", re.MULTILINE)
_MOVES_NOTHING = {"parameter", "get-tuple-element", "bitcast"}


def moved(text: str, w: QTensor) -> list[str]:
    """Instructions that write as much as the words or the scales of one layer have, of their type."""
    least = {"s32": w.words.size // LAYERS, "s4": 8 * w.words.size // LAYERS, "bf16": w.scales.values.size // LAYERS}
    found = []
    for dtype, shape, name in _INSTRUCTION.findall(text):
        size = math.prod(int(d) for d in shape.split(",") if d)
        if dtype in least and size >= least[dtype] and name not in _MOVES_NOTHING:
            found.append(f"{name} {dtype}[{shape}]")
    return found


@pytest.mark.parametrize(("chip", "order", "call"), [("h100", "nk", MOSAIC), ("a100", "kn", TRITON)])
def test_scanned_layers_read_the_packed_stack_in_place(chip: str, order: str, call: str):
    variant = Variant("int4", 128, False, "bfloat16", 1, 4096, 4096)

    def layers(x: Any, w: QTensor, product: Any) -> Any:
        return jax.lax.scan(lambda x, i: (x + product(x, w, i), None), x, jnp.arange(LAYERS))[0]

    def kernel(x: Any, w: QTensor, i: Any) -> Any:
        return matmul_gpu.matmul(x, w, layer=i, **gpu_compile.OPTIONS)

    def sliced(x: Any, w: QTensor, i: Any) -> Any:
        one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False), w)
        return matmul_gpu.matmul(x, one, layer=None, **gpu_compile.OPTIONS)

    w = variant.weight(order, (LAYERS,))
    with target_chip(chip):
        texts = [
            gpu_compile.compile(lambda x, w, p=p: layers(x, w, p), variant.x(), w, chip=chip).as_text()
            for p in (kernel, sliced)
        ]
    assert all(text.count(f'custom_call_target="{call}"') == 1 for text in texts)
    assert moved(texts[0], w) == []
    assert moved(texts[1], w)  # what is looked for is there when layers are sliced out


# --- Integers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [INTEGER[i] for i in (0, 3, 5, 6, 8, 9, 10)], ids=str)
def test_integer_mosaic_gpu_compiles_without_spills(variant: Variant):
    with target_chip("h100"):
        _, (kernel,) = gpu_compile.compile_counted(
            gpu_compile.integer_product(integer_matmul_mosaic, variant.dtype),
            *variant.codes(),
            variant.weight("nk"),
            chip="h100",
        )
    assert kernel.spilled == 0
    assert not kernel.serialized


@pytest.mark.parametrize("activations", [None, qjax.dynamic(), qjax.dynamic(zero_point=True)], ids=str)
def test_one_scale_for_a_whole_matrix_compiles(activations: Any):
    shape = jax.ShapeDtypeStruct
    weights = qjax.int8(per_tensor=True, zero_point=True)
    q, x = qjax.quantize(lambda p, x: x @ p["w"], qjax.Rule("**", weights, activations)), shape((16, 256), jnp.bfloat16)
    with target_chip("h100"):
        packed = jax.eval_shape(lambda p, x: qjax.arrange(q.convert(p, x), "h100"), {"w": shape((256, 64), x.dtype)}, x)
        assert MOSAIC in gpu_compile.compile(q.apply, packed, x, chip="h100").as_text()


@pytest.mark.parametrize("m", [24, 40, 72])
def test_wgmma_multiplies_integers_with_so_many_rows(m: int):
    """It takes fewer sizes than for floats; here with eight rows of ones."""
    variant = Variant("int4", None, False, "bfloat16", m, 128, 64)
    blocks = integer_matmul_mosaic.Blocks(m=m, n=64, k=128, ways=1, stages=2, splits=1)
    product = gpu_compile.integer_product(integer_matmul_mosaic, variant.dtype, blocks=blocks)
    gpu_compile.compile(product, *variant.codes(), variant.weight("nk"), chip="h100")


@pytest.mark.parametrize(("chip", "order"), [("a100", "nk"), ("h100", "kn")])
@pytest.mark.parametrize("variant", [INTEGER[i] for i in (3, 10)], ids=str)
def test_integer_triton_compiles(variant: Variant, chip: str, order: str):
    product = gpu_compile.integer_product(integer_matmul_triton, variant.dtype)
    compiled = gpu_compile.compile(product, *variant.codes(), variant.weight(order), chip=chip)
    assert f'custom_call_target="{TRITON}"' in compiled.as_text()


@pytest.mark.parametrize(("name", "variant"), [INTEGER_FUSED[i] for i in (0, 3, 5, 6)], ids=str)
def test_integer_mosaic_gpu_with_an_epilogue_compiles_without_spills(name: str, variant: Variant):
    function, operands = gpu_compile.fused_integers(integer_matmul_mosaic, name, variant, "nk")
    with target_chip("h100"):
        _, (kernel,) = gpu_compile.compile_counted(function, *operands, chip="h100")
    assert kernel.spilled == 0
    assert not kernel.serialized


@pytest.mark.parametrize(("name", "variant"), [INTEGER_FUSED[i] for i in (3, 4, 6)], ids=str)
def test_integer_triton_with_an_epilogue_compiles(name: str, variant: Variant):
    function, operands = gpu_compile.fused_integers(integer_matmul_triton, name, variant, "kn")
    with target_chip("a100"):
        text = gpu_compile.compile(function, *operands, chip="a100").as_text()
    assert text.count(f'custom_call_target="{TRITON}"') == 1


@pytest.mark.parametrize(("chip", "kernels"), [("h100", 2), ("a100", 2)])
def test_codes_go_from_product_to_product(chip: str, kernels: int):
    """Of what lies between two products a GPU stores codes, before Hopper nothing else."""
    m, k, n = 64, 512, 1024

    def mlp(p: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    q = qjax.quantize(mlp, [qjax.Rule("**", qjax.int8(), qjax.static())])
    x, number = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
    shapes = {"gate": (k, n), "up": (k, n), "down": (n, k)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    ranges = {name: {"low": number, "high": number} for name in ("gate", "down")}
    packed = jax.eval_shape(q.convert, {"params": params, "quant_stats": ranges}, x)
    with target_chip(chip):
        text = gpu_compile.compile(q.apply, packed, x, chip=chip).as_text()
    assert text.count("custom_call_target=") == kernels
    stored = set(
        re.findall(rf"^  (?:ROOT )?%\S+ = (\w+)\[(?:1,)*{m},{n}\]\S* (?:fusion|custom-call)", text, re.MULTILINE)
    )
    assert stored == ({"bf16", "s8"} if chip == "h100" else {"s8"})


@pytest.mark.parametrize(("chip", "order", "call"), [("h100", "nk", MOSAIC), ("a100", "kn", TRITON)])
def test_scanned_layers_multiply_integers_with_the_packed_stack_in_place(chip: str, order: str, call: str):
    variant = Variant("int4", 128, False, "bfloat16", 1, 4096, 4096)

    def layers(x: Any, scale: Any, zero: Any, w: QTensor) -> Any:
        def layer(scale: Any, i: Any) -> Any:
            out = integer_matmul(x, scale, zero, w, layer=i)
            return jnp.max(jnp.abs(out), axis=-1, keepdims=True), None

        return jax.lax.scan(layer, scale, jnp.arange(LAYERS))[0]

    w = variant.weight(order, (LAYERS,))
    with target_chip(chip):
        text = gpu_compile.compile(layers, *variant.codes(), w, chip=chip).as_text()
    assert text.count(f'custom_call_target="{call}"') == 1
    assert moved(text, w) == []


# --- A whole model --------------------------------------------------------------------------------------------------


def test_a_step_of_a_decoder_is_a_kernel_for_each_product():
    """q, k and v; out; gate and up; down; the head. Nothing is as large as a layer beside the arguments."""
    config = bench_decode.config_of(dry=False)  # Llama 3 8B
    model = bench_decode.model_of("int4 g128", config)
    shapes = bench_decode.shapes_of(model, config, 1)
    params = jax.eval_shape(lambda params: qjax.arrange(params, "h100"), shapes["params"])
    inputs = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with target_chip("h100"):
        step = bench_decode.step_of(model)
        compiled = gpu_compile.compile(step, {"params": params}, {"cache": shapes["cache"]}, *inputs, chip="h100")
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{MOSAIC}"') == 5
    joint = re.findall(rf'= \((\S+), (\S+), (\S+)\) custom-call\(.*custom_call_target="{MOSAIC}"', text)
    assert [[re.sub(r"\{.*", "", out) for out in outs] for outs in joint] == [
        ["bf16[1,1,1,4096]", "bf16[1,1,1,1024]", "bf16[1,1,1,1024]"]
    ]
    assert compiled.memory_analysis().temp_size_in_bytes < 10e6


# --- Packed caches --------------------------------------------------------------------------------------------------


def counted(program: tuple[Any, Any], chip: str, name: str) -> tuple[str, gpu_compile.Kernel | None]:
    """The program's text, and what its one Triton kernel was compiled to; nothing of that without `ptxas`."""
    with target_chip(chip):
        compiled, kernels = gpu_compile.compile_triton_counted(program[0], *program[1], chip=chip)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{TRITON}"') == 1
    return text, next((kernel for kernel in kernels if kernel.name == name), None)


def written(text: str, least: int) -> list[str]:
    """Instructions outside of fusions that write arrays of so many elements."""
    found = []
    for dtype, shape, name in _INSTRUCTION.findall(text[text.index("\nENTRY") :]):
        if math.prod(int(d) for d in shape.split(",") if d) >= least and name not in _MOVES_NOTHING:
            found.append(f"{name} {dtype}[{shape}]")
    return found


@pytest.mark.parametrize("chip", gpu_compile.CHIPS)
@pytest.mark.parametrize("row", [ATTENTION[i] for i in (0, 3, 4, 5)], ids=str)
def test_attention_on_packed_caches_compiles_without_spills(row: Attention, chip: str):
    """The caches are read as they are stored: nothing of their size is written."""
    program = row.program()
    text, kernel = counted(program, chip, "cache_attention")
    assert kernel is None or kernel.spilled == 0
    if row.queries < 100:
        assert written(text, program[1][1].codes.size // max(1, row.layers) // 8) == []


def attend(q: Any, keys: Any, values: Any, i: Any) -> Any:
    """Grouped queries (B, K, G, D) on caches (B, T, K, D) up to position i."""
    scores = jnp.einsum("bkgd,btkd->bkgt", q, keys) / q.shape[-1] ** 0.5
    p = jax.nn.softmax(jnp.where(jnp.arange(keys.shape[1]) <= i, scores, -1e9).astype(jnp.float32))
    return jnp.einsum("bkgt,btkd->bkgd", p.astype(q.dtype), values)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_scanned_layers_update_and_read_packed_caches_in_place(format: str):
    """A decode step copies no cache: not out of the stack of layers, not back into it."""
    layers, b, t, heads, d = 3, 4, 4096, 8, 128
    shape = jax.ShapeDtypeStruct
    floats = {name: shape((layers, b, t, heads, d), jnp.bfloat16) for name in ("keys", "values")}
    x, i = shape((b, 1, heads, d), jnp.bfloat16), shape((), jnp.int32)

    def decode(params: Any, caches: Any, x: Any, i: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            own = {name: jax.lax.dynamic_update_slice_in_dim(own[name], x, i, axis=1) for name in own}
            q = (x[:, 0] @ params["queries"]).reshape(b, heads, 4, d)
            return x + attend(q, own["keys"], own["values"], i).sum(2)[:, None], own

        return jax.lax.scan(layer, x, caches)

    params = {"queries": shape((d, 4 * d), jnp.bfloat16)}
    q = qjax.quantize(decode, [qjax.Rule("**")], kv_cache={"0/**": format})
    entries = q.plan(params, floats, x, i).caches
    packed = jax.eval_shape(lambda: {name: entries[f"0/{name}"].pack(floats[name]) for name in floats})
    with target_chip("h100"):
        compiled = gpu_compile.compile(jax.jit(q.apply, donate_argnums=1), params, packed, x, i, chip="h100")
    memory, stored = compiled.memory_analysis(), sum(cache.nbytes for cache in packed.values())
    assert compiled.as_text().count(f'custom_call_target="{TRITON}"') == 1
    assert memory.alias_size_in_bytes >= stored
    assert memory.temp_size_in_bytes < stored / layers / 5


# --- Products of 8-bit floats --------------------------------------------------------------------------------------

CUBLASLT = {"xla_gpu_enable_triton_gemm": False}  # of the two that XLA would time on a GPU, without it Triton


@pytest.mark.parametrize("options", [{}, CUBLASLT], ids=["triton", "cublaslt"])
@pytest.mark.parametrize("rows", [1, 16, 2048])
def test_products_of_8_bit_floats_read_the_words_as_they_lie(rows: int, options: dict[str, bool]):
    """XLA multiplies float8 numbers, and writes the weight in no other type and no other order."""
    shape = jax.ShapeDtypeStruct
    q, x = qjax.quantize(lambda p, x: x @ p["w"], "w8a8_fp8"), shape((rows, 4096), jnp.bfloat16)
    packed = jax.eval_shape(q.convert, {"w": shape((4096, 4096), jnp.bfloat16)}, x)
    text = gpu_compile.compile(jax.jit(q.apply, compiler_options=options), packed, x, chip="h100").as_text()
    if options:
        assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 1
    else:
        dtypes = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", text))
        ((x_codes, w_codes),) = re.findall(r" dot\((%[\w.\-]+), (%[\w.\-]+)\)", text)
        assert (dtypes[x_codes], dtypes[w_codes]) == ("f8e4m3fn", "f8e4m3fn")
    assert written(text, 4096 * 4096) == []


@pytest.mark.parametrize("per_tensor", [False, True])
def test_few_rows_read_8_bit_floats_in_the_stack_of_layers(per_tensor: bool):
    """XLA would copy each layer out of it."""
    shape = jax.ShapeDtypeStruct
    params, x = {"w": shape((8, 4096, 4096), jnp.bfloat16)}, shape((16, 4096), jnp.bfloat16)
    rule = qjax.Rule("**", qjax.fp8_e4m3(per_tensor=per_tensor), qjax.dynamic("fp8_e4m3"))
    q = qjax.quantize(lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], rule)
    packed = jax.eval_shape(q.convert, params, x)
    with target_chip("h100"):
        compiled = gpu_compile.compile(q.apply, packed, x, chip="h100")
    assert compiled.as_text().count(f'custom_call_target="{MOSAIC}"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 / 8


# --- Experts and lookups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "chip"), [("kn", "h100"), ("nk", "a100")])
@pytest.mark.parametrize("variant", [RAGGED[i] for i in (0, 3)], ids=str)
def test_experts_compile_without_spills(variant: Variant, order: str, chip: str):
    """The layer and the experts are read in the packed stack."""
    program = gpu_compile.ragged(variant, order)
    text, kernel = counted(program, chip, "quantized_ragged_matmul")
    assert kernel is None or kernel.spilled == 0
    _, w, *_ = program[1]
    assert written(text, w.words.size // 32) == []


def test_experts_of_a_batched_product_are_read_in_the_packed_stack():
    """Each with as many rows: `quantized_matmul` of a stack."""
    variant = Variant("int4", 128, False, "bfloat16", 16, 4096, 4096)
    _, (_, w, *_) = gpu_compile.ragged(variant, "kn")
    x = jax.ShapeDtypeStruct((8, 16, 4096), jnp.bfloat16)

    def product(x: Any, w: QTensor, i: Any) -> Any:
        return matmul_gpu.matmul(x, w, layer=i, **gpu_compile.OPTIONS)

    with target_chip("a100"):
        text = gpu_compile.compile(product, x, w, jax.ShapeDtypeStruct((), jnp.int32), chip="a100").as_text()
    assert text.count(f'custom_call_target="{TRITON}"') == 1
    assert written(text, w.words.size // 32) == []


@pytest.mark.parametrize("format", ["int4", "nf4", "int8"])
def test_lookups_read_the_rows_they_need(format: str):
    """Of words and scales, nothing but a gather reads anything, and it is part of what dequantizes the rows."""
    w = Variant(format, 64, False, "bfloat16", 16, 1024, 100_000).weight("nk")
    indices = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = gpu_compile.compile(quantized_take, w, indices, chip="h100").as_text()
    fused, entry = text.split("\nENTRY")
    tables = re.findall(r"%([\w.\-]+) = \w+\[100000,\d+\]\S* parameter\(", fused)
    readers = [re.findall(rf" ([\w\-]+)\([^)]*%{re.escape(table)}[,)]", fused) for table in tables]
    assert readers == [["gather"]] * 2
    assert set(re.findall(r" (\w+)\(%[\w.\-]+[,)]", entry)) == {"fusion"}


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="h100, a100"):
        gpu_compile.compile(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32), chip="h300")
