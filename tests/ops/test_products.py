"""Every product of the table on every implementation that takes it, against float64: see `cases`.

Kernels run interpreted; that they compile is the matter of `tests/compile`. Where Pallas runs a kernel with XLA
operations, what lies beyond the edge of an array, or was never written, is NaN or the lowest integer: what leaks into a
result shows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import F32, FORMATS, PRODUCTS, Product, Rounding, half_ulp
from jax import lax

from qjax.pallas_kernels.backends import gpu_operands, tpu_operands
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.ops.fp8_matmul import reference as fp8_reference
from qjax.pallas_kernels.ops.fp8_matmul.api import fp8_matmul
from qjax.pallas_kernels.ops.integer_matmul import cpu as integer_cpu
from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_mosaic
from qjax.pallas_kernels.ops.integer_matmul import reference as integer_reference
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_tpu
from qjax.pallas_kernels.ops.integer_matmul import triton as integer_triton
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import reference as matmul_reference
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.matmul.tpu_tiles import Blocks
from qjax.pallas_kernels.ops.ragged_matmul import reference as ragged_reference
from qjax.pallas_kernels.ops.ragged_matmul import tpu as ragged_tpu
from qjax.pallas_kernels.ops.ragged_matmul import triton as ragged_triton
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul
from qjax.pallas_kernels.packed.qtensor import QTensor

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).resolve().parents[2]
# Each program runs a few times. Excess precision would drop the rounding that an interpreted kernel asks for.
QUICK = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


# --- What is called -------------------------------------------------------------------------------------------------


def _float_options(product: Product) -> dict[str, Any]:
    return {
        "casts": tuple(map(jnp.dtype, product.casts)),
        "precision": product.precision,
        "preferred_element_type": None if product.preferred is None else jnp.dtype(product.preferred),
        "transpose": product.transpose,
    }


def call(product: Product, functions: dict[str, Callable[..., Any]], **more: Any) -> Callable[..., Any]:
    """The product of `(x, scale, zero, weight, layer, sizes)` on the function for its kind, as that one takes them."""
    function, how = functools.partial(functions[product.kind], **more), _float_options(product)

    def run(x: Any, scale: Any, zero: Any, w: QTensor, layer: Any, sizes: Any) -> Any:
        if product.kind == "matmul":
            return function(x, w, layer=layer, **how)
        if product.kind == "ragged":
            return function(x, w, sizes, layer=layer, **how)
        if product.kind == "integer":
            return function(x, scale, zero, w, layer=layer, out_dtype=jnp.dtype(product.out_dtype))
        return function(x, scale, w, layer=layer)

    return run


def _fp8_reference(x: Any, scale: Any, w: QTensor, *, layer: Any) -> Any:
    """What platforms with a matrix unit for 8-bit floats run; XLA CPU converts it."""
    return fp8_reference.matmul(x, w, layer=layer, precision=lax.Precision.DEFAULT) * scale


# --- What it may round ----------------------------------------------------------------------------------------------


def _stored(product: Product) -> float:
    """Of a weight: the scale, itself a sum if it is quantized, its product with the code, and the program's casts."""
    casts = () if product.kind == "fp8" else (product.weight_dtype, *product.casts)
    return 4 * half_ulp(F32) + sum(half_ulp(dtype) for dtype in casts)


def in_float32(product: Product) -> Rounding:
    """Of plain XLA on a CPU: operands as the program has them. Casts of a weight may be left out, or done."""
    return Rounding(product.contracted, _stored(product) + (2 * half_ulp(F32) if product.kind == "fp8" else 0))


def on_tpu(product: Product) -> Rounding:
    """x and the weight go to the dtype of the matrix unit; a codebook's values and then their products with a scale."""
    dtype = tpu_operands.operand_dtype(
        jnp.dtype(product.x), jnp.dtype((product.weight_dtype, *product.casts)[-1]), product.precision
    )
    codebook = FORMATS[product.format].kind == "codebook"
    return Rounding(2 * product.contracted, _stored(product) + (3 if codebook else 2) * half_ulp(dtype))


def on_gpu(product: Product) -> Rounding:
    """float32 is two numbers of 16 bits; codes are exact, codebooks are not, and x is scaled where N is contracted."""
    chain = tuple(map(jnp.dtype, (product.weight_dtype, *product.casts)))
    step = half_ulp(gpu_operands.operand_dtype(jnp.dtype(product.x), chain))
    once = FORMATS[product.format].kind == "codebook" or product.transpose
    return Rounding(2 * product.contracted, _stored(product) + step**2 + (step if once else 0))


def on_hopper(product: Product) -> Rounding:
    """As on other GPUs; scales of groups are rounded, and go into weights, which are rounded once more."""
    rounding, chain = on_gpu(product), tuple(map(jnp.dtype, (product.weight_dtype, *product.casts)))
    step = half_ulp(gpu_operands.operand_dtype(jnp.dtype(product.x), chain))
    grouped = product.spec.group_size(product.k) < product.k
    return dataclasses.replace(rounding, operands=rounding.operands + (2 * step if grouped else 0))


# --- Implementations ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute products.

    Attributes:
        functions: by kind of product.
        rounding: how far a float product may be off.
        options: of the functions, for a product.
        unsupported: why it would be left to the reference, of a product, x and the weight.
        kernel: as rows of the table name it; None of what takes every row.
        compiled: options of the compiler.
    """

    functions: dict[str, Callable[..., Any]]
    rounding: Callable[[Product], Rounding]
    options: Callable[[Product], dict[str, Any]] = lambda product: {}
    unsupported: Callable[[Product, Any, QTensor], str | None] = lambda product, x, w: None
    kernel: str | None = None
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict)

    def takes(self, product: Product) -> bool:
        """Whether a row is for it."""
        return product.kind in self.functions and (self.kernel is None or self.kernel in product.on)

    def check(self, product: Product) -> None:
        """One compiled program, on both sets of operands; asserts that each result is right."""
        run = jax.jit(call(product, self.functions, **self.options(product)), compiler_options=self.compiled)
        for exact in (False,) if product.kind == "integer" else (True, False):
            rows, weight = product.rows(exact=exact), product.weight(exact=exact)
            assert self.unsupported(product, rows.x, weight.packed) is None
            for pick in product.picks:
                layer = None if pick.layer is None else jnp.int32(pick.layer)
                sizes = None if pick.sizes is None else jnp.asarray(pick.sizes, jnp.int32)
                got = run(rows.x, rows.scale, rows.zero, weight.packed, layer, sizes)
                rounding = None if exact or product.kind == "integer" else self.rounding(product)
                product.assert_is(got, rows, weight, pick, rounding)


def _one_row_apart(function: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """The first row alone, for which the CPU has formulations of its own, and the others together."""

    def run(*args: Any, **how: Any) -> Any:
        if args[0].shape[-2] < 2:
            return function(*args, **how)
        parts = [
            function(*(a if a is None else a[..., rows, :] for a in args[:operands]), *args[operands:], **how)
            for rows in (slice(1), slice(1, None))
        ]
        return jnp.concatenate(parts, axis=-2)

    return run


CPU = {
    "matmul": _one_row_apart(quantized_matmul, 1),
    "integer": _one_row_apart(integer_matmul, 3),
    "fp8": fp8_matmul,
    "ragged": quantized_ragged_matmul,
}
TPU = {"matmul": matmul_tpu.matmul, "integer": integer_tpu.matmul, "ragged": ragged_tpu.matmul}


def _tpu_tiles(position: Any) -> Callable[[Product], dict[str, Any]]:
    """Several tiles along each axis of what is cut in `cases.TILED`, scales before or after the product."""

    def options(product: Product) -> dict[str, Any]:
        if product.kind == "integer":
            tiles = integer_tpu.Blocks(min(128, -(-product.m // 32) * 32), 128, 256)
            return {"interpret": True, "blocks": tiles if product.k >= 512 else None}
        return {"interpret": True, "blocks": Blocks(16, 128, 256, position)}

    return options


def _not_on_tpu(product: Product, x: Any, w: QTensor) -> str | None:
    casts, out_dtype = tuple(map(jnp.dtype, product.casts)), jnp.dtype(product.out_dtype)
    if product.kind == "integer":
        return integer_tpu.unsupported(x.shape, w)
    if product.kind == "ragged":
        return ragged_tpu.unsupported(x, w, casts, out_dtype)
    return matmul_tpu.unsupported(x, w, casts, out_dtype)


def _not_on_gpu(matmul: Any, integer: Any) -> Callable[[Product, Any, QTensor], str | None]:
    def unsupported(product: Product, x: Any, w: QTensor) -> str | None:
        casts, out_dtype = tuple(map(jnp.dtype, product.casts)), jnp.dtype(product.out_dtype)
        if product.kind == "integer":
            return integer.unsupported(x, w, out_dtype)
        return matmul.unsupported(x, w, casts, out_dtype, precision=product.precision, transpose=product.transpose)

    return unsupported


def _interpreted(product: Product) -> dict[str, Any]:
    return {"interpret": True}


IMPLEMENTATIONS = {
    "reference": Implementation(
        {
            "matmul": matmul_reference.matmul,
            "integer": integer_reference.matmul,
            "fp8": _fp8_reference,
            "ragged": ragged_reference.matmul,
        },
        in_float32,
    ),
    "cpu": Implementation(CPU, in_float32),
    "tpu": Implementation(TPU, on_tpu, _tpu_tiles("after"), _not_on_tpu, "tpu", QUICK),
    "tpu_scales_first": Implementation(
        {kind: TPU[kind] for kind in ("matmul", "ragged")}, on_tpu, _tpu_tiles("before"), _not_on_tpu, "tpu", QUICK
    ),
    "triton": Implementation(
        {"matmul": matmul_triton.matmul, "integer": integer_triton.matmul, "ragged": ragged_triton.matmul},
        on_gpu,
        _interpreted,
        _not_on_gpu(matmul_triton, integer_triton),
        "triton",
        QUICK,
    ),
}
MOSAIC = Implementation(
    {"matmul": matmul_mosaic.matmul, "integer": integer_mosaic.matmul},
    on_hopper,
    _interpreted,
    _not_on_gpu(matmul_mosaic, integer_mosaic),
    "mosaic",
    QUICK,
)
MOSAIC_PRODUCTS = [product for product in PRODUCTS if MOSAIC.takes(product)]
PAIRS = [
    pytest.param(name, product, id=f"{name}-{product}")
    for name, implementation in IMPLEMENTATIONS.items()
    for product in PRODUCTS
    if implementation.takes(product)
]


@pytest.mark.parametrize(("name", "product"), PAIRS)
def test_the_product_is_that_of_float64(name: str, product: Product, monkeypatch: pytest.MonkeyPatch):
    if name == "cpu":  # blocks of about 32 of K, or of a few columns: several, and a short last one
        monkeypatch.setattr(matmul_cpu, "BLOCK_VALUES", 32 * product.n)
        monkeypatch.setattr(integer_cpu, "BLOCK_VALUES", 32 * product.n)
    IMPLEMENTATIONS[name].check(product)


# --- Mosaic GPU -----------------------------------------------------------------------------------------------------
# jax 0.11 and newer interpret it, by as many threads as the blocks that are simulated have warpgroups. They wait for
# each other inside the CPU's thread pool, and after an error the state of the interpreter is unknown: so all products
# run in one process of their own, with a larger pool.


def run_mosaic() -> None:
    """Writes what is wrong with each product, or nothing, in a process that the fixture below starts."""
    gpu_chips.CHIPS["h100"] = dataclasses.replace(gpu_chips.CHIPS["h100"], processors=2)  # threads are few
    for product in MOSAIC_PRODUCTS:
        wrong = ""
        try:
            MOSAIC.check(product)
        except AssertionError as error:
            wrong = str(error) or "another dtype, or a product that the kernel does not take"
        print(json.dumps(wrong), flush=True)


@pytest.fixture(scope="module")
def mosaic_wrong() -> list[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ops")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "NPROC": "32"}
    command = [sys.executable, "-c", "import test_products; test_products.run_mosaic()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 does not interpret the kernel")
@pytest.mark.parametrize("product", range(len(MOSAIC_PRODUCTS)), ids=lambda i: str(MOSAIC_PRODUCTS[i]))
def test_mosaic_gpu(product: int, mosaic_wrong: list[str]):
    assert not mosaic_wrong[product]
