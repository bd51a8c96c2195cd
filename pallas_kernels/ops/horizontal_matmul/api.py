"""`joint_matmul`: packed products of one x with several weights, such as q, k and v, as one JAX primitive.

It means `quantized_matmul` once for each weight, which is what is differentiated and batched, and what runs on every
platform but NVIDIA Hopper. There, one kernel does it all where it takes each of the products: one launch, and tiles of
all weights share the multiprocessors, where a small matrix alone would leave most of them idle. That is so in
`target_chip` only: no GPU has run the kernels yet (`matmul_gpu`). On meshes each product is split over the devices by
itself.

On TPU and CPU the program is the one without it: a TPU core runs the kernels one after the other anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.matmul.reference import result_dtype
from qjax.pallas_kernels.packed.qtensor import QTensor

joint_matmul_p = Primitive("joint_matmul")

joint_matmul_p.multiple_results = True


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
    operands, tree = jax.tree.flatten((x, list(weights), layers))
    return joint_matmul_p.bind(
        *operands,
        tree=tree,
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


@joint_matmul_p.def_impl
def _products(*operands: Any, tree: Any, **how: Any) -> list[Array]:
    """What it means."""
    x, weights, layers = jax.tree.unflatten(tree, operands)
    return [quantized_matmul(x, w, layer=layer, **how) for w, layer in zip(weights, layers, strict=True)]


@joint_matmul_p.def_abstract_eval
def _abstract_eval(*operands: Any, **params: Any) -> Any:
    return jax.make_jaxpr(lambda *operands: _products(*operands, **params))(*operands).out_avals


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[list[Array], list[Any]]:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of(*moved: Any) -> list[Array]:
        values = list(primals)
        for i, value in zip(moving, moved, strict=True):
            values[i] = value
        return _products(*values, **params)

    return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[list[Array], list[int]]:
    out = jax.vmap(lambda *operands: _products(*operands, **params), in_axes=dims)(*operands)
    return out, [0] * len(out)


def _cuda(*operands: Array, tree: Any, **how: Any) -> list[Array]:
    x, weights, layers = jax.tree.unflatten(tree, operands)
    chip = gpu_chips.asked_for()
    on_mesh = any(partition.is_explicit(jax.typeof(operand)) for operand in operands)
    if chip is None or chip.capability != gpu_chips.HOPPER or on_mesh:
        return _products(*operands, tree=tree, **how)
    from qjax.pallas_kernels.ops.matmul import (
        mosaic as matmul_mosaic,  # a backend that every other platform can do without
    )

    casts, precision = how["casts"], how["precision"]
    for w in weights:
        out_dtype = result_dtype(x, w, casts, how["preferred_element_type"])
        if matmul_mosaic.unsupported(x, w, casts, out_dtype, precision=precision):
            return _products(*operands, tree=tree, **how)
    return matmul_mosaic.joint_matmul(x, weights, layers=layers, **how)


ad.primitive_jvps[joint_matmul_p] = _jvp

batching.primitive_batchers[joint_matmul_p] = _batch

mlir.register_lowering(joint_matmul_p, mlir.lower_fun(_products, multiple_results=True))

_rule = partition.lowering(_cuda, plain=_products, multiple_results=True)

mlir.register_lowering(joint_matmul_p, _rule, platform="cuda")
