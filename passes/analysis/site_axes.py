"""`SITES`: the operations that consume a weight, and what each does with the axes of its weight and of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jax.extend.core import Primitive
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.packed.layout import Role
from qjax.passes.jaxpr import control_flow

Op = Literal["dot", "conv", "take", "ragged"]


def _dot_roles(eqn: Any, operand: int) -> tuple[Role, ...]:
    contract, batch = (dims[operand] for dims in eqn.params["dimension_numbers"])
    ndim = len(eqn.invars[operand].aval.shape)
    return tuple("stack" if i in batch else "k" if i in contract else "n" for i in range(ndim))


def _conv_roles(eqn: Any, operand: int) -> tuple[Role, ...] | None:
    if operand != 1:
        return None
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return tuple("n" if i == out_axis else "k" for i in range(len(eqn.invars[1].aval.shape)))


def take_axis(eqn: Any) -> int | None:
    """The axis along which a gather picks whole rows, or None for any other gather."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    axis = numbers.start_index_map[0]
    rows = all(size == (1 if i == axis else n) for i, (size, n) in enumerate(zip(sizes, shape, strict=True)))
    return axis if rows and tuple(numbers.collapsed_slice_dims) == (axis,) else None


def _take_roles(eqn: Any, operand: int) -> tuple[Role, ...] | None:
    axis = take_axis(eqn)
    if operand != 0 or axis is None or len(eqn.invars[0].aval.shape) < 2:
        return None
    return tuple("n" if i == axis else "k" for i in range(len(eqn.invars[0].aval.shape)))


def _ragged_roles(eqn: Any, operand: int) -> tuple[Role, ...] | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if operand != 1 or not numbers.rhs_group_dimensions:
        return None
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    stack = {*batch, *numbers.rhs_group_dimensions}
    return tuple("stack" if i in stack else "k" if i in contract else "n" for i in range(len(eqn.invars[1].aval.shape)))


# What each does with the axes of its input: those that it contracts, or why the input cannot be quantized.


def _dot_contracts(eqn: Any, operand: int) -> tuple[int, ...] | str:
    return tuple(eqn.params["dimension_numbers"][0][operand])


def _conv_contracts(eqn: Any, operand: int) -> tuple[int, ...] | str:
    if eqn.params["batch_group_count"] != 1:
        return "a convolution over groups of its batch"
    batch = eqn.params["dimension_numbers"].lhs_spec[0]
    return tuple(i for i in range(len(eqn.invars[0].aval.shape)) if i != batch)


def _take_contracts(eqn: Any, operand: int) -> tuple[int, ...] | str:
    return ""  # indices are no input to quantize


def _ragged_contracts(eqn: Any, operand: int) -> tuple[int, ...] | str:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), batch = numbers.dot_dimension_numbers
    if tuple(numbers.lhs_ragged_dimensions) != (0,) or any(batch) or tuple(contract) != (1,):
        return "a ragged dot that is not rows times groups of matrices"
    return (1,)


# primitive -> (name of the operation, its operands that may be the weight, roles(eqn, operand of the weight),
#               contracts(eqn, operand of the input))
SITES: dict[Primitive, tuple[Op, tuple[int, ...], Callable[..., tuple[Role, ...] | None], Callable[..., Any]]] = {
    prims.dot_general_p: ("dot", (0, 1), _dot_roles, _dot_contracts),
    prims.conv_general_dilated_p: ("conv", (1,), _conv_roles, _conv_contracts),
    prims.gather_p: ("take", (0,), _take_roles, _take_contracts),
    control_flow.ragged_dot_general_p: ("ragged", (1,), _ragged_roles, _ragged_contracts),
}
