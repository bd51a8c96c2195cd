"""What every packed operation is made of: one JAX primitive, what it means, and a row for each platform.

An operation is a primitive, so that each platform has a lowering of its own and one exported program can carry several
(`lax.platform_dependent` cannot be exported for more than one platform). Its file `api.py` says what it means, in plain
operations of JAX, and has a table of what runs in its place; `define` makes the rest of that: types, derivatives,
`vmap`, lowerings.

**One decision.** A row of the table is a function that looks at the operands and says what computes them, or why no
kernel does. A lowering runs what it says, and `Operation.runs_as` tells it to whoever asks before there is a program,
on shapes alone: the two cannot disagree. A row imports its backend when it is called, so that a program for one
platform imports no kernel of another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.ops import partition

# --- What an operation runs as ----------------------------------------------------------------------------------

# The names that `Runs` has.
TPU_KERNEL = "TPU kernel"
HOPPER_KERNEL = "Hopper kernel"
TRITON_KERNEL = "Triton kernel"
XLA = "XLA"
"""XLA makes the float values and multiplies them."""
XLA_CODES = "XLA, codes"
"""XLA multiplies the codes as they are; scales are applied to the sums."""
XLA_BLOCKS = "XLA, blocks"
"""A loop over blocks of the weight, each of which is unpacked and multiplied."""
XLA_NO_DOT = "XLA, no dot"
"""A loop that multiplies and adds up one code of each column after the other, for one row of x."""
SEPARATE = "separate operations"
"""The operations that a larger one stands for, each by itself."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """What computes an operation on a platform.

    Attributes:
        name: one of the names above.
        reason: why it is not the best kernel that there is for the platform; empty where it is, or there is none.
    """

    name: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes the operands at hand.

    Attributes:
        runs: what that is called.
        implementation: takes the operands and options of the operation.
    """

    runs: Runs
    implementation: Callable[..., Any]


Chooser = Callable[..., Choice | str]
"""A row: from operands (arrays or types) and options to a choice, or to the reason why what it means runs instead."""


def _no_triton() -> str | None:
    from qjax.pallas_kernels.backends import triton

    return triton.unavailable()


def _no_hopper() -> str | None:
    chip = gpu_chips.asked_for()
    if chip is None:
        return _no_triton()  # which says that no kernel for GPUs is used
    return None if chip.capability == gpu_chips.HOPPER else "the kernel is for GPUs of compute capability 9.0"


_UNAVAILABLE = {HOPPER_KERNEL: _no_hopper, TRITON_KERNEL: _no_triton}


def gpu_kernel(
    kernels: Mapping[str, Callable[[], Any]], unsupported: Callable[[Any], str | None], otherwise: str
) -> tuple[Any, Runs]:
    """The module of the first kernel that can run on the chip and takes a product; None if there is none.

    Args:
        kernels: by name, fastest first, what imports the module of each.
        unsupported: why the kernel of a module does not take the product, or None.
        otherwise: what no kernel runs as.

    Returns:
        The module, and what it runs as; the reason is what speaks against a faster one that the chip has.
    """
    against, why = "", None
    for name, load in kernels.items():
        if why := _UNAVAILABLE[name]():
            continue
        module = load()
        why = unsupported(module)
        if why is None:
            return module, Runs(name, against)
        against = why
    return None, Runs(otherwise, why or "")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A packed operation.

    Its operands are any pytrees of arrays, packed ones among them. An option `layer` is an array too, and may be None.

    Attributes:
        primitive: takes the leaves of the operands, then the layer. Its parameters are the options, with `indexed`,
            whether there is a layer, in place of that, and `tree`, the structure of the operands.
        meaning: what is computed, in plain operations, from operands and options.
        platforms: a row for each platform that has something better.
        otherwise: what `meaning` runs as.
    """

    primitive: Primitive
    meaning: Callable[..., Any]
    platforms: Mapping[str, Chooser]
    otherwise: str

    def __call__(self, *operands: Any, **options: Any) -> Any:
        """Binds the primitive."""
        leaves, tree = jax.tree.flatten(operands)
        if "layer" in options:
            layer = options.pop("layer")
            leaves += [] if layer is None else [jnp.asarray(layer, jnp.int32)]
            options["indexed"] = layer is not None
        return self.primitive.bind(*leaves, tree=tree, **options)

    def choose(self, platform: str | None, *operands: Any, **options: Any) -> Choice:
        """What computes the operands, arrays or types, where one device has them."""
        choose = self.platforms.get(platform or "")
        found = choose(*operands, **options) if choose else ""
        return Choice(Runs(self.otherwise, found), self.meaning) if isinstance(found, str) else found

    def runs_as(self, platform: str, *operands: Any, **options: Any) -> Runs:
        """What it runs as on "cpu", "tpu" or "cuda"; of operands, only their types matter."""
        return self.choose(platform, *operands, **options).runs

    def on(self, platform: str | None) -> Callable[..., Any]:
        """The operation as one device of a platform computes it."""

        def implementation(*operands: Any, **options: Any) -> Any:
            return self.choose(platform, *operands, **options).implementation(*operands, **options)

        return implementation


OPERATIONS: dict[Primitive, Operation] = {}
"""Every operation that was defined, by its primitive."""


# --- Operands ---------------------------------------------------------------------------------------------------


def unflatten(leaves: Sequence[Any], *, tree: Any, **params: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operands and options that a primitive was called with, or what stands for them leaf by leaf."""
    leaves = list(leaves)
    if "indexed" in params:
        params["layer"] = leaves.pop() if params.pop("indexed") else None
    return jax.tree.unflatten(tree, leaves), params


def on_leaves(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation as a function of the leaves and parameters that its primitive has."""

    def flat(*leaves: Any, **params: Any) -> Any:
        operands, options = unflatten(leaves, **params)
        return implementation(*operands, **options)

    return flat


# --- Types ------------------------------------------------------------------------------------------------------


def _type_of_meaning(operation: Operation, leaves: Sequence[Any], params: dict[str, Any]) -> Any:
    """The types that the results of plain operations have, with their places on a mesh of explicit axes."""
    placed = any(map(partition.is_explicit, leaves))
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if placed else None) for a in leaves]
    out = jax.eval_shape(functools.partial(on_leaves(operation.meaning), **params), *given)
    return jax.tree.map(lambda a: ShapedArray(a.shape, a.dtype, **({"sharding": a.sharding} if placed else {})), out)


# --- Derivatives ------------------------------------------------------------------------------------------------


def derivative_of_meaning(operation: Operation) -> None:
    """Differentiates what the primitive means."""

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

        def of(*floats: Array) -> Any:
            leaves = list(primals)
            for i, value in zip(moving, floats, strict=True):
                leaves[i] = value
            return on_leaves(operation.meaning)(*leaves, **params)

        return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])

    ad.primitive_jvps[operation.primitive] = jvp


def linear_in_x(operation: Operation) -> None:
    """The derivative of a product that is linear in x, its first operand, and has an option `transpose`."""
    primitive = operation.primitive

    def jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
        for primal, tangent in zip(primals[1:], tangents[1:], strict=True):
            if type(tangent) is not ad.Zero and jnp.issubdtype(primal.dtype, jnp.inexact):
                raise TypeError(
                    f"qjax: {primitive.name} has no gradient in its packed weight: the codes are integers. "
                    "Differentiate with respect to other variables, or train the float variables (fake-quant) "
                    "and convert afterwards."
                )
        out = primitive.bind(*primals, **params)
        if type(tangents[0]) is ad.Zero:
            return out, ad.Zero(tangents[0].aval.update(shape=out.shape, dtype=out.dtype))
        return out, primitive.bind(tangents[0], *primals[1:], **params)

    def transpose(cotangent: Any, x: Any, *others: Any, **params: Any) -> list[Any]:
        if type(cotangent) is ad.Zero:
            return [ad.Zero(x.aval)] + [None] * len(others)
        params = {**params, "transpose": not params["transpose"], "preferred_element_type": None}
        out = primitive.bind(cotangent, *others, **params)
        return [partition.like(lax.convert_element_type(out, x.aval.dtype), x.aval)] + [None] * len(others)

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


def no_derivative(message: str) -> Callable[[Operation], None]:
    """For a primitive whose differentiation is an error."""

    def register(operation: Operation) -> None:
        def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
            raise TypeError(message)

        ad.primitive_jvps[operation.primitive] = jvp

    return register


# --- `vmap` -----------------------------------------------------------------------------------------------------


def size_of_batch(leaves: Sequence[Any], dims: Sequence[int | None]) -> int:
    """How many elements are mapped over."""
    return next(a.shape[d] for a, d in zip(leaves, dims, strict=True) if d is not None)


def lead(a: Any, dim: int | None, size: int) -> Array:
    """With the mapped axis in front, which what is the same for all elements gets too."""
    return jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)


def own_layers(leaves: Sequence[Any], index: Any) -> list[Array]:
    """Where each element has a layer of its own: that layer of its stacks."""
    return [jax.vmap(lambda a, i: lax.dynamic_index_in_dim(a, i, 0, False))(a, index) for a in leaves]


def _batched_meaning(operation: Operation, leaves: Sequence[Any], dims: Sequence[Any], params: dict[str, Any]) -> Any:
    """`vmap` of what the primitive means."""
    flat = functools.partial(on_leaves(operation.meaning), **params)
    out = jax.vmap(flat, in_axes=tuple(dims))(*leaves)
    return (out, [0] * len(out)) if operation.primitive.multiple_results else (out, 0)


def batched_product(
    operation: Operation, leaves: Sequence[Any], dims: Sequence[Any], params: dict[str, Any]
) -> tuple[Array, int]:
    """`vmap` of a product whose last operand is a packed weight; the others have the rows of x, `(*stack, M, _)`."""
    size, primitive = size_of_batch(leaves, dims), operation.primitive
    operands, options = unflatten(leaves, **params)
    count = len(jax.tree.leaves(operands[:-1]))
    packed, packed_dims = leaves[count:], dims[count:]
    if all(dim is None for dim in packed_dims):  # one weight, more rows: (B, *stack, M, _) -> (*stack, B * M, _)
        folded = []
        for a, dim in zip(leaves[:count], dims[:count], strict=True):
            a = jnp.moveaxis(lead(a, dim, size), 0, -3)  # (*stack, B, M, _)
            folded.append(a.reshape(*a.shape[:-3], -1, a.shape[-1]))
        out = primitive.bind(*folded, *packed, **params)
        *stack, _, n = out.shape
        return out.reshape(*stack, size, -1, n), len(stack)
    moved = [lead(a, dim, size) for a, dim in zip(leaves, dims, strict=True)]  # the batch joins the stack
    if options.get("layer") is not None:  # each element has its own layer: pick it before the product
        *moved, index = moved
        moved = [*moved[:count], *own_layers(moved[count:], index)]
        params = {**params, "indexed": False}
    return primitive.bind(*moved, **params), 0


# --- The primitive ----------------------------------------------------------------------------------------------


def define(
    name: str,
    *,
    meaning: Callable[..., Any],
    platforms: Mapping[str, Chooser],
    otherwise: str,
    type_of_result: Callable[..., Any] | None = None,
    derivative: Callable[[Operation], None] = derivative_of_meaning,
    batch: Callable[[Operation, Sequence[Any], Sequence[Any], dict[str, Any]], Any] = _batched_meaning,
    plain: Mapping[str | None, Callable[..., Any]] | None = None,
    on_mesh: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    multiple_results: bool = False,
) -> Operation:
    """A primitive with all its rules.

    Args:
        name: of the primitive.
        meaning, platforms, otherwise: of the operation.
        type_of_result: from the types of the operands and the options; those of `meaning` if it is not given.
        derivative: registers it.
        batch: the rule for `vmap`, from the operation, leaves, their mapped axes and the parameters.
        plain: what XLA can partition over several devices, by platform and, under None, for all others, if it is not
            `meaning`.
        on_mesh: from what one device computes to the operation on arrays that explicit mesh axes split; `meaning` if it
            is not given.
        multiple_results: whether the result is a list. Such an operation is made of others, and outside `jax.jit` it is
            those, one by one.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    operation = OPERATIONS[primitive] = Operation(primitive, meaning, platforms, otherwise)

    @functools.cache
    def jitted(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **params))

    def impl(*leaves: Any, **params: Any) -> Any:
        return on_leaves(meaning)(*leaves, **params) if multiple_results else jitted(**params)(*leaves)

    def abstract_eval(*leaves: Any, **params: Any) -> Any:
        if type_of_result is None:
            return _type_of_meaning(operation, leaves, params)
        return on_leaves(type_of_result)(*leaves, **params)

    primitive.def_impl(impl)
    primitive.def_abstract_eval(abstract_eval)
    derivative(operation)
    batching.primitive_batchers[primitive] = lambda leaves, dims, **params: batch(operation, leaves, dims, params)
    on_mesh, plain = on_mesh or partition.whole(meaning), plain or {}
    for platform in (None, *platforms):
        rule = partition.lowering(
            on_leaves(on_mesh(operation.on(platform))),
            plain=on_leaves(plain.get(platform, plain.get(None, meaning))),
            multiple_results=multiple_results,
        )
        mlir.register_lowering(primitive, rule, platform=platform)
    return operation
