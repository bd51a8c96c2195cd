"""Products of 8-bit floats on CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.numbers.formats import AbsMax, PerTensor, QuantSpec
from qjax.pallas_kernels.numbers.stored_scales import Scales
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer

# How kernels of weight-only products multiply codes.
WEIGHT_ONLY: dict[str, Any] = {
    "casts": (),
    "precision": None,
    "preferred_element_type": jnp.float32,
    "transpose": False,
}


def formulation(x: Any, w: QTensor) -> str:
    """What a product runs as, from the operands or their types."""
    float32 = jnp.dtype(jnp.float32)
    return matmul_cpu.formulation(x, _codes(w, None), (), float32, transpose=False).name


def _codes(w: QTensor, ones: Scales | None) -> QTensor:
    """The codes as a weight of their own."""
    spec = QuantSpec(w.spec.format, PerTensor(), scale_rule=AbsMax())
    return dataclasses.replace(w, scales=ones, spec=spec, dtype=jnp.dtype(jnp.float32))


def cpu_matmul(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    """XLA's product on the weight without its scales, which are applied to the result."""
    codes = _codes(w, Scales(jnp.ones((*w.words.shape[:-2], 1, 1), jnp.float32)))
    acc = matmul_cpu.matmul(x.astype(jnp.float32), codes, layer=layer, **WEIGHT_ONLY)
    return acc * stored_scales.resolve_scales(pick_layer(w, layer).matrix_arrays()[1])
