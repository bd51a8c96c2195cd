"""`fused_matmul`: packed products of one x and what the program does with them, as one JAX primitive.

The primitive carries the program that it stands for: `quantized_matmul` or `integer_matmul` and the operations after
it, as they were traced. That is what it means, what is differentiated (custom rules included) and batched, and what
runs on every platform but TPU and NVIDIA GPUs. There one kernel reads x once for both weights and applies the epilogue
to its sums (`pallas_kernels.backends.epilogue`); on meshes with Explicit axes each device does so with its part. The
program runs there where a mesh splits K, for Auto axes (see `pallas_kernels.ops.partition`), and where no kernel takes
the operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.ops import partition, primitive
from qjax.pallas_kernels.ops.integer_matmul import gpu as integer_matmul_gpu
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.primitive import Choice, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


class _Program:
    """A traced program. Those of equal result types are equal: the other parameters of the primitive say the rest."""

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr
        self.out = tuple(jaxpr.out_avals)

    def __call__(self, *operands: Any) -> list[Array]:
        return jaxpr_as_fun(self.jaxpr)(*operands)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.out == other.out

    def __hash__(self) -> int:
        return hash(self.out)

    def __repr__(self) -> str:
        return str(self.jaxpr)


def fused_matmul(
    x: Float[Array, "*stack M K"] | Activation,
    weights: Sequence[QTensor],
    others: Sequence[Array],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    epilogue: Epilogue,
    shapes: Sequence[tuple[Any, ...]],
    program: Callable[..., Sequence[Array]],
    beside: Any = None,
) -> list[Array]:
    """`program(x, weights, layers, others, beside)`, on TPU and NVIDIA GPUs in one kernel.

    Args:
        x: as for `quantized_matmul`, or codes `(*stack, M, K)` with scales and zero points `(*stack, M, 1)`, as for
            `integer_matmul`.
        casts, precision, preferred_element_type: as for `quantized_matmul`, for all of the products; codes have none.
        weights: one packed weight, or two that are packed alike.
        others: what else the epilogue reads.
        layers: for each weight, as for `quantized_matmul`.
        epilogue: what `program` does with the products, as a kernel runs it on a tile; it makes codes only of products
            of codes.
        shapes: of `others` as the epilogue takes them: `(stack or 1, M or 1, N or 1)`, the stack merged.
        program: from the operands to a result of as many values as a product; where the epilogue makes codes, to the
            codes and the values that they stand for.
        beside: a pytree of what only the program reads.

    Returns:
        What `program` returns.
    """
    operands = (x, list(weights), list(layers), list(others), beside)
    leaves, tree = jax.tree.flatten(operands)
    return _FUSED_MATMUL(
        *operands,
        program=_Program(jax.make_jaxpr(lambda *leaves: program(*jax.tree.unflatten(tree, leaves)))(*leaves)),
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
        epilogue=epilogue,
        shapes=tuple(shapes),
    )


def runs_as(
    platform: str,
    x: Any,
    weights: Sequence[QTensor],
    *,
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    epilogue: Epilogue,
    shapes: Sequence[tuple[Any, ...]],
) -> Runs:
    """What `fused_matmul` runs as on "cpu", "tpu" or "cuda", and why not as one kernel where there are such.

    Args:
        platform: where one device has the operands.
        x, weights: the operands or their types.
        casts, precision, preferred_element_type, epilogue, shapes: as for `fused_matmul`.
    """
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    return _FUSED_MATMUL.runs_as(platform, x, weights, [], [], None, epilogue=epilogue, shapes=shapes, **how)


def _meaning(*operands: Any, program: _Program, **_: Any) -> list[Array]:
    return program(*jax.tree.leaves(operands))


def _type(*operands: Any, program: _Program, **_: Any) -> list[Any]:
    return list(program.out)


Kernel = Callable[..., Array]
"""`kernel(x, weights, others, layers=layers)`: the epilogue of their products."""


def _cuda(
    x: Any, weights: Sequence[QTensor], *_: Any, casts: Any, epilogue: Epilogue, precision: Any, **options: Any
) -> Choice | str:
    if isinstance(x, Activation):
        module, runs = integer_matmul_gpu.fused_kernel(x.codes, weights, epilogue)
        return Choice(runs, functools.partial(_in_one, module.fused_matmul, ())) if module else runs.reason
    module, runs = matmul_gpu.fused_kernel(x, weights, casts, epilogue, precision=precision)
    return Choice(runs, functools.partial(_in_one, matmul_gpu.fused_matmul, _OF_FLOATS)) if module else runs.reason


def _tpu(
    x: Any, weights: Sequence[QTensor], *_: Any, casts: Any, epilogue: Epilogue, shapes: Any, **options: Any
) -> Choice | str:
    from qjax.pallas_kernels.backends.tpu_operands import Beside
    from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
    from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu

    runs, beside = Runs(primitive.TPU_KERNEL), Beside.of(len(weights), shapes)
    if isinstance(x, Activation):
        reasons = (integer_matmul_tpu.unsupported(x.codes.shape, w, beside) for w in weights)
        choice = Choice(runs, functools.partial(_in_one, integer_matmul_tpu.fused_matmul, ()))
    else:
        reasons = (matmul_tpu.unsupported(x, w, casts, epilogue.dtype, beside) for w in weights)
        choice = Choice(runs, functools.partial(_in_one, matmul_tpu.fused_matmul, _OF_FLOATS))
    return next(filter(None, reasons), choice)


_OF_FLOATS = ("casts", "precision", "preferred_element_type")
"""Options that products of float x have and those of codes have not."""


def _in_one(
    kernel: Kernel,
    names: Sequence[str],
    x: Array | Activation,
    weights: Sequence[QTensor],
    layers: Sequence[Any],
    others: Sequence[Array],
    beside: Any,
    *,
    program: _Program,
    epilogue: Epilogue,
    shapes: Sequence[tuple[Any, ...]],
    **options: Any,
) -> list[Array]:
    """The program in one kernel, which takes the options of these names, for each device."""
    kernel = functools.partial(kernel, epilogue=epilogue, **{name: options[name] for name in names})
    rows = x.codes if isinstance(x, Activation) else x
    x_type, types = jax.typeof(rows), [jax.tree.map(jax.typeof, w) for w in weights]
    split, *more = (partition.Split.of(x_type, w, indexed=i is not None) for w, i in zip(types, layers, strict=True))
    result, *_ = program.out
    if split is None:
        reshaped = [a.reshape(shape) for a, shape in zip(others, shapes, strict=True)]
        out = kernel(x, weights, reshaped, layers=layers).reshape(result.shape)
    elif split.k or any(other != split for other in more):  # sums that are added up over devices first
        return _meaning(x, weights, layers, others, beside, program=program)
    else:
        stack = rows.shape[:-2]
        shapes = [(*(stack if shape[0] > 1 else (1,) * len(stack)), *shape[1:]) for shape in shapes]
        out = on_each_device(kernel, split, x, weights, list(zip(others, shapes, strict=True)), layers)
        out = lax.reshape(out, result.shape, out_sharding=result.sharding)
    if epilogue.codes is None:
        return [out]
    scale, zero = others[-2:] if epilogue.codes.zero_point else (others[-1], None)
    return [out, Activation(out, scale, zero).dequantize(epilogue.codes.format, program.out[1].dtype)]


def on_each_device(
    kernel: Kernel,
    split: partition.Split,
    x: Array | Activation,
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

    def local(x: Any, weights: list[QTensor], others: list[Array], layers: list[Any]) -> Array:
        own = [split.local(w, layer) for w, layer in zip(weights, layers, strict=True)]
        others = [a.reshape(-1, *a.shape[-2:]) for a in others]
        return kernel(x, [w for w, _ in own], others, layers=[layer for _, layer in own])

    whole = [None if layer is None else P() for layer in layers]
    operands = (x, list(weights), arrays, list(layers))
    rows = jax.tree.map(lambda _: split.rows(), x)
    return split.run(local, operands, (rows, [split.weight(w) for w in weights], specs, whole), split.rows(split.n))


_FUSED_MATMUL = primitive.define(
    "fused_matmul",
    meaning=_meaning,
    platforms={"cuda": _cuda, "tpu": _tpu},
    otherwise=primitive.SEPARATE,
    type_of_result=_type,
    on_mesh=lambda implementation: implementation,  # each splits its work itself
    multiple_results=True,
)

fused_matmul_p = _FUSED_MATMUL.primitive
