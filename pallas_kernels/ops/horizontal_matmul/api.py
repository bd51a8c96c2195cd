"""`joint_matmul`: packed products of one x with several weights, such as q, k and v, as one JAX primitive.

It means `quantized_matmul` once for each weight, which is what is differentiated and batched, and what runs on every
platform but NVIDIA Hopper. There, one kernel does it all where it takes each of the products: one launch, and tiles of
all weights share the multiprocessors, where a small matrix alone would leave most of them idle. That is so in
`target_chip` only: no GPU has run the kernels yet (`matmul/gpu.py`). On meshes each product is split over the devices
by itself.

On TPU and CPU the program is the one without it: a TPU core runs the kernels one after the other anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.ops import primitive
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.matmul.reference import result_dtype
from qjax.pallas_kernels.ops.primitive import Choice, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


def joint_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
) -> list[Array]:
    """`[quantized_matmul(x, w, layer=layer) for each]`.

    Args:
        x, casts, precision, preferred_element_type: as for `quantized_matmul`, for all of the products.
        weights: packed matrices `(*stack, K, N)`, or `(L, *stack, K, N)` with a layer; of any N, and alike otherwise:
            format, groups, storage order.
        layers: for each weight, as for `quantized_matmul`.

    Returns:
        The products, `(*stack, M, N)`, in the order of the weights.

    Raises:
        TypeError: the shapes do not fit.
    """
    layers = [None if layer is None else jnp.asarray(layer, jnp.int32) for layer in layers]
    return _JOINT_MATMUL(
        x,
        list(weights),
        layers,
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def runs_as(
    platform: str,
    x: Any,
    weights: Sequence[QTensor],
    *,
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Runs:
    """What `joint_matmul` runs as on "cpu", "tpu" or "cuda", and why not as one kernel where there is such a one.

    Args:
        platform: where one device has the operands.
        x, weights: the operands or their types.
        casts, precision, preferred_element_type: as for `joint_matmul`.
    """
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    return _JOINT_MATMUL.runs_as(platform, x, weights, [None] * len(weights), **how)


def _products(x: Any, weights: Sequence[QTensor], layers: Sequence[Any], **how: Any) -> list[Array]:
    """What it means."""
    return [quantized_matmul(x, w, layer=layer, **how) for w, layer in zip(weights, layers, strict=True)]


def _cuda(
    x: Any, weights: Sequence[QTensor], layers: Any, *, casts: Any, precision: Any, preferred_element_type: Any
) -> Choice | str:
    out_dtypes = [result_dtype(x, w, casts, preferred_element_type) for w in weights]
    module, runs = matmul_gpu.joint_kernel(x, weights, casts, out_dtypes, precision=precision)
    return Choice(runs, functools.partial(_in_one, module)) if module else runs.reason


def _in_one(module: Any, x: Any, weights: Sequence[QTensor], layers: Sequence[Any], **how: Any) -> list[Array]:
    return module.joint_matmul(x, weights, layers=layers, **how)


_JOINT_MATMUL = primitive.define(
    "joint_matmul",
    meaning=_products,
    platforms={"cuda": _cuda},
    otherwise=primitive.SEPARATE,
    multiple_results=True,
)

joint_matmul_p = _JOINT_MATMUL.primitive
