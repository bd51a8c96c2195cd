"""Every kernel for NVIDIA GPUs compiles, with the compiler that JAX has for them and no GPU; none of them runs.

Whether the numbers are right `test_matmul_gpu` says.
"""

from __future__ import annotations

import math
import re
from typing import Any

import gpu_compile
import jax
import jax.numpy as jnp
import pytest
from gpu_compile import VARIANTS, Variant

from pallas_kernels import matmul_gpu, matmul_mosaic_gpu, matmul_triton
from pallas_kernels.blocks_gpu import target_chip
from pallas_kernels.qtensor import QTensor

if not gpu_compile.available():
    pytest.skip("JAX's CUDA plugin is not installed, or no ptxas (scripts/gpu_compile.py)", allow_module_level=True)

MOSAIC, TRITON = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_mosaic_gpu_compiles_without_spills(variant: Variant):
    with target_chip("h100"):
        compiled, (kernel,) = gpu_compile.compile_counted(
            gpu_compile.product(matmul_mosaic_gpu), variant.x(), variant.weight("nk"), chip="h100"
        )
    assert f'custom_call_target="{MOSAIC}"' in compiled.as_text()
    assert kernel.spilled == 0
    assert not kernel.serialized  # each `wgmma` waiting for the one before
    assert kernel.registers in (96, 168)  # what a multiprocessor has for five warpgroups, and for two or three


def test_spills_are_found():
    """A warpgroup that holds the scales and zero points of sixteen groups has no registers left for weights."""
    blocks = matmul_mosaic_gpu.Blocks(m=8, n=128, k=1024, ways=2, stages=2, splits=1)
    variant = Variant("int4", 32, True, "bfloat16", 8, 4096, 4096)
    product = gpu_compile.product(matmul_mosaic_gpu, blocks=blocks)
    _, (kernel,) = gpu_compile.compile_counted(product, variant.x(), variant.weight("nk"), chip="h100")
    assert kernel.spilled > 0


@pytest.mark.parametrize("order", ["kn", "nk"])
@pytest.mark.parametrize("chip", gpu_compile.CHIPS)
@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (1, 4, 12, 19)], ids=str)
def test_triton_compiles(variant: Variant, chip: str, order: str):
    compiled = gpu_compile.compile(gpu_compile.product(matmul_triton), variant.x(), variant.weight(order), chip=chip)
    assert f'custom_call_target="{TRITON}"' in compiled.as_text()


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


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="h100, a100"):
        gpu_compile.compile(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32), chip="h300")
