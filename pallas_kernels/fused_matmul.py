"""`fused_matmul`: packed products of one x and what the program does with them, as one JAX primitive.

The primitive carries the program that it stands for: `quantized_matmul` and the operations after it, as they were
traced. That is what it means, what is differentiated (custom rules included) and batched, and what runs on every
platform but TPU and NVIDIA GPUs. There one kernel reads x once for both weights and applies the epilogue to its sums
(`pallas_kernels.epilogue`); on meshes with Explicit axes each device does so with its part. The program runs there
where a mesh splits K, for Auto axes (see `pallas_kernels.partition`), and for what `matmul_tpu.unsupported` and
`matmul_gpu.unsupported_fused` name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels import matmul_gpu, matmul_tpu, partition
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.matmul import quantized_matmul
from pallas_kernels.qtensor import QTensor

fused_matmul_p = Primitive("fused_matmul")


class _Program:
    """A traced program. All those of one result type are equal: the other parameters of the primitive say the rest."""

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr
        (self.out,) = jaxpr.out_avals

    def __call__(self, *operands: Any) -> Array:
        (out,) = jaxpr_as_fun(self.jaxpr)(*operands)
        return out

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.out == other.out

    def __hash__(self) -> int:
        return hash(self.out)

    def __repr__(self) -> str:
        return str(self.jaxpr)


def fused_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    others: Sequence[Array],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    epilogue: Epilogue,
    shapes: Sequence[tuple[Any, ...]],
    program: Callable[[Sequence[Array], Sequence[Array]], Array],
) -> Array:
    """`program([quantized_matmul(x, w) for w in weights], others)`, on TPU and NVIDIA GPUs in one kernel.

    Args:
        x, casts, precision, preferred_element_type: as for `quantized_matmul`, for all of the products.
        weights: one packed weight, or two that are packed alike.
        others: what else goes into the program.
        layers: for each weight, as for `quantized_matmul`.
        epilogue: what `program` does, as a kernel runs it on a tile.
        shapes: of `others` as the epilogue takes them: `(stack or 1, M or 1, N or 1)`, the stack merged.
        program: from the products, `(*stack, M, N)` each, and `others` to a result of as many values.

    Returns:
        What `program` returns.
    """
    operands, tree = jax.tree.flatten((x, list(weights), list(others), list(layers)))

    def composition(*operands: Array) -> Array:
        x, weights, others, layers = jax.tree.unflatten(tree, operands)
        how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
        products = [quantized_matmul(x, w, layer=i, **how) for w, i in zip(weights, layers, strict=True)]
        return program(products, others)

    return fused_matmul_p.bind(
        *operands,
        program=_Program(jax.make_jaxpr(composition)(*operands)),
        tree=tree,
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
        epilogue=epilogue,
        shapes=tuple(shapes),
    )


@fused_matmul_p.def_impl
def _impl(*operands: Any, program: _Program, **params: Any) -> Array:
    return program(*operands)  # compiled as a whole, it would be compiled again in each call


@fused_matmul_p.def_abstract_eval
def _abstract_eval(*operands: Any, program: _Program, **params: Any) -> Any:
    return program.out


def _jvp(primals: Any, tangents: Any, *, program: _Program, **params: Any) -> tuple[Array, Any]:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of(*moved: Any) -> Array:
        values = list(primals)
        for i, value in zip(moving, moved, strict=True):
            values[i] = value
        return program(*values)

    return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(operands: Any, dims: Any, *, program: _Program, **params: Any) -> tuple[Array, int]:
    return jax.vmap(program, in_axes=dims)(*operands), 0


def _composition(*operands: Array, program: _Program, **params: Any) -> Array:
    return program(*operands)


def _takes_tpu(x: Any, weights: Sequence[QTensor], shapes: Any, params: dict[str, Any]) -> bool:
    beside = matmul_tpu.Beside.of(len(weights), shapes)
    return all(matmul_tpu.unsupported(x, w, params["casts"], params["epilogue"].dtype, beside) is None for w in weights)


def _takes_cuda(x: Any, weights: Sequence[QTensor], shapes: Any, params: dict[str, Any]) -> bool:
    how = params["casts"], params["epilogue"]
    return matmul_gpu.unsupported_fused(x, weights, *how, precision=params["precision"]) is None


def _in_one(
    takes: Callable[..., bool],
    kernel: Callable[..., Array],
    *operands: Array,
    program: _Program,
    tree: Any,
    shapes: Any,
    **params: Any,
) -> Array:
    """The program in one kernel for each device, if that takes it."""
    x, weights, others, layers = jax.tree.unflatten(tree, operands)
    x_type, types = jax.typeof(x), [jax.tree.map(jax.typeof, w) for w in weights]
    if not takes(x, weights, shapes, params):
        return program(*operands)
    split, *more = (partition.Split.of(x_type, w, indexed=i is not None) for w, i in zip(types, layers, strict=True))
    if split is None:
        others = [a.reshape(shape) for a, shape in zip(others, shapes, strict=True)]
        return kernel(x, weights, others, layers=layers, **params).reshape(program.out.shape)
    if split.k or any(other != split for other in more):  # sums that are added up over devices first
        return program(*operands)
    stack = x.shape[:-2]
    shapes = [(*(stack if shape[0] > 1 else (1,) * len(stack)), *shape[1:]) for shape in shapes]
    kernel = functools.partial(kernel, **params)
    out = on_each_device(kernel, split, x, weights, list(zip(others, shapes, strict=True)), layers)
    return lax.reshape(out, program.out.shape, out_sharding=program.out.sharding)


def on_each_device(
    kernel: Callable[..., Array],
    split: partition.Split,
    x: Array,
    weights: Sequence[QTensor],
    others: Sequence[tuple[Array, tuple[int, ...]]],
    layers: Sequence[Any],
) -> Array:
    """`fused_matmul` of a platform's kernel, or what computes the same, on the shards of each device; no sum is split.

    Args:
        kernel: what a device runs.
        split: of each product.
        x, weights, layers: as for `fused_matmul`.
        others: each with its shape `(*stack or 1s, M or 1, N or 1)`.
    """
    names = (*split.stack, split.m, split.n)
    specs = [P(*(own if size > 1 else () for own, size in zip(names, shape, strict=True))) for _, shape in others]
    arrays = [
        lax.reshape(a, shape, out_sharding=NamedSharding(split.mesh, spec))
        for (a, shape), spec in zip(others, specs, strict=True)
    ]

    def local(x: Array, weights: list[QTensor], others: list[Array], layers: list[Any]) -> Array:
        own = [split.local(w, layer) for w, layer in zip(weights, layers, strict=True)]
        others = [a.reshape(-1, *a.shape[-2:]) for a in others]
        return kernel(x, [w for w, _ in own], others, layers=[layer for _, layer in own])

    whole = [None if layer is None else P() for layer in layers]
    operands = (x, list(weights), arrays, list(layers))
    return split.run(
        local, operands, (split.rows(), [split.weight(w) for w in weights], specs, whole), split.rows(split.n)
    )


ad.primitive_jvps[fused_matmul_p] = _jvp
batching.primitive_batchers[fused_matmul_p] = _batch
mlir.register_lowering(fused_matmul_p, mlir.lower_fun(_composition, multiple_results=False))
_KERNELS = {
    "cuda": functools.partial(_in_one, _takes_cuda, matmul_gpu.fused_matmul),
    "tpu": functools.partial(_in_one, _takes_tpu, matmul_tpu.fused_matmul),
}
for _platform, _kernel in _KERNELS.items():
    _rule = partition.lowering(_kernel, plain=_composition)
    mlir.register_lowering(fused_matmul_p, _rule, platform=_platform)
