"""`RULES`: operations on a packed parameter, said with the packed kernels.

The handler of serving. A dot goes to `quantized_matmul`, a ragged dot to `quantized_ragged_matmul`, a lookup to
`quantized_take`; a convolution runs on the weight dequantized in place, by the equation that the program has. A rule
returns None where the operation reads the parameter along other axes than it was packed for (the second use of a shared
parameter), or has a form that the kernels do not: the replay then dequantizes it there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jaxtyping import Array

from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul
from qjax.pallas_kernels.ops.take.api import quantized_take
from qjax.pallas_kernels.packed.qtensor import pick_layer
from qjax.passes.analysis.site_axes import SITES, take_axis
from qjax.passes.jaxpr.control_flow import ragged_dot_general_p
from qjax.passes.jaxpr.values import EquationRule, Ref
from qjax.passes.jaxpr.views import Atom


def _in_order(atoms: list[Atom]) -> list[int]:
    """The permutation that puts factors into the parameter's axis order."""
    return sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].inner))


def _sizes(atoms: list[Atom]) -> tuple[int, ...]:
    return tuple(atom.size for atom in atoms)


def pick(ref: Ref, batch: list[Atom]) -> tuple[Any, Array | int | None] | None:
    """The packed arrays whose stack is `batch` in the parameter's order, and the layer to pick from them.

    None where the stack axes of the packed arrays are not the factors that the program indexes.
    """
    stack = [index.atom for index in ref.view.indexed] + batch
    order = _in_order(stack)
    if _sizes([stack[i] for i in order]) != jax.tree.leaves(ref.base)[0].shape[:-2]:
        return None
    picks = {order.index(i): value for i, value in enumerate(ref.indices)}  # packed axis -> index
    if set(picks) == {0}:
        return ref.base, picks[0]
    q = ref.base
    for axis in sorted(picks, reverse=True):
        q = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, picks[axis], axis, keepdims=False), q)  # noqa: B023
    return q, None


@dataclasses.dataclass(frozen=True)
class DotForm:
    """A `dot_general` with a packed operand as a product of matrices.

    Attributes:
        weight, layer: the packed matrix `(*stack, K, N)`, as `quantized_matmul` takes it, or whatever else is the
            base of the Ref (`passes.plan.adapters`).
        rows: brings the other operand into the form `(*stack, M, K)`; one of size 1 along the contracted axes (a scale
            for each row) becomes `(*stack, M, 1)`.
        result: brings `(*stack, M, N)` into the form of the result.
    """

    weight: Any
    layer: Array | int | None
    rows: Callable[[Array], Array]
    result: Callable[[Array], Array]


def placed(out: Array, eqn: Any) -> Array:
    """The result of a `dot_general` on the devices where the program wants it, if it says so."""
    sharding = eqn.params.get("out_sharding")
    return out if sharding is None else jax.sharding.reshard(out, sharding)


def dot_form(eqn: Any, ref: Ref, operand: int) -> DotForm | None:
    """How operand `operand`, a packed parameter, is multiplied; None where it was packed for another reading."""
    params = eqn.params
    view, q = ref.view, ref.base
    roles = SITES[prims.dot_general_p][2](eqn, operand)
    if view.layout(roles) != q.layout:
        return None
    contract, batch = params["dimension_numbers"]
    w_contract, x_contract = contract[operand], contract[1 - operand]
    w_batch, x_batch = batch[operand], batch[1 - operand]
    x_shape = eqn.invars[1 - operand].aval.shape
    x_free = [i for i in range(len(x_shape)) if i not in (*x_contract, *x_batch)]
    w_free = [i for i in range(len(view.axes)) if i not in (*w_contract, *w_batch)]

    batch_atoms = [atom for i in w_batch for atom in view.axes[i]]
    picked = pick(ref, batch_atoms)
    if picked is None:
        return None
    k_atoms = [atom for i in w_contract for atom in view.axes[i]]
    b_order, k_order = _in_order(batch_atoms), _in_order(k_atoms)
    free = [x_shape[i] for i in x_free]
    nb, nf = len(batch_atoms), len(free)
    b_sizes = _sizes([batch_atoms[i] for i in b_order])

    def rows(x: Array) -> Array:
        """(batch factors, free, contracted factors), each in the order of the packed matrix, then merged."""
        whole = all(x.shape[i] == x_shape[i] for i in x_contract)
        x = x.transpose(*x_batch, *x_free, *x_contract)
        x = x.reshape(*_sizes(batch_atoms), *free, *(_sizes(k_atoms) if whole else (1,)))
        x = x.transpose(*b_order, *range(nb, nb + nf), *(nb + nf + i for i in (k_order if whole else (0,))))
        return x.reshape(*b_sizes, math.prod(free), q.layout.k if whole else 1)

    n_atoms = [atom for i in w_free for atom in view.axes[i]]
    n_order = _in_order(n_atoms)

    def result(out: Array) -> Array:
        """Batch axes, then the free axes of both operands in the order in which dot_general has them."""
        out = out.reshape(*b_sizes, *free, *_sizes([n_atoms[i] for i in n_order]))
        b_back = [b_order.index(i) for i in range(nb)]
        n_back = [nb + nf + n_order.index(i) for i in range(len(n_atoms))]
        x_part = list(range(nb, nb + nf))
        out = out.transpose(*b_back, *(n_back + x_part if operand == 0 else x_part + n_back))
        return placed(out.reshape(eqn.outvars[0].aval.shape), eqn)

    return DotForm(*picked, rows, result)


def lower_dot(eqn: Any, values: list[Any], operand: int) -> list[Any] | None:
    """`dot_general` with a packed operand on either side, any contracted, batch and free axes."""
    ref, x = values[operand], values[1 - operand]
    form = dot_form(eqn, ref, operand)
    if form is None:
        return None
    out = quantized_matmul(
        form.rows(x),
        form.weight,
        layer=form.layer,
        casts=ref.view.casts,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return [form.result(out)]


def lower_ragged_dot(eqn: Any, values: list[Any], operand: int) -> list[Any] | None:
    """`ragged_dot`, and any `ragged_dot_general` that sorts the rows of one matrix by expert."""
    ref, x, params = values[operand], values[0], eqn.params
    view, q, numbers = ref.view, ref.base, eqn.params["ragged_dot_dimension_numbers"]
    roles = SITES[ragged_dot_general_p][2](eqn, operand)
    if roles is None or view.layout(roles) != q.layout:
        return None
    (x_contract, w_contract), batch = numbers.dot_dimension_numbers
    if any(batch) or len(x_contract) != 1 or len(eqn.invars[0].aval.shape) != 2:
        return None
    if params["out_sharding"] is not None or params["group_offset"] is not None:
        return None
    (group,) = numbers.rhs_group_dimensions
    picked = pick(ref, list(view.axes[group]))
    if picked is None or len(picked[0].words.shape) - 2 - (picked[1] is not None) != 1:
        return None
    k_atoms = view.axes[w_contract[0]]
    n_atoms = [atom for i, role in enumerate(roles) if role == "n" for atom in view.axes[i]]
    k_order, n_order = _in_order(list(k_atoms)), _in_order(n_atoms)
    x = x if x_contract == (1,) else x.T
    rows = x.reshape(-1, *_sizes(list(k_atoms))).transpose(0, *(1 + i for i in k_order)).reshape(x.shape)
    out = quantized_ragged_matmul(
        rows,
        picked[0],
        jnp.asarray(values[2]),
        layer=picked[1],
        casts=view.casts,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    out = out.reshape(-1, *_sizes([n_atoms[i] for i in n_order]))
    out = out.transpose(0, *(1 + n_order.index(i) for i in range(len(n_order))))
    return [out.reshape(eqn.outvars[0].aval.shape)]


def lower_take(eqn: Any, values: list[Any], operand: int) -> list[Any] | None:
    """A `gather` of whole rows of a packed table, with its rule for indices out of range."""
    ref, indices = values[0], values[1]
    view, q, axis = ref.view, ref.base, take_axis(eqn)
    roles = SITES[prims.gather_p][2](eqn, operand)
    if operand != 0 or axis is None or roles is None or view.layout(roles) != q.layout:
        return None
    k_atoms = [atom for i, a in enumerate(view.axes) if i != axis for atom in a]
    if q.layout.sizes("stack") or _in_order(k_atoms) != list(range(len(k_atoms))):
        return None
    if len(q.words.shape) - 2 != len(ref.indices):
        return None
    for index in ref.indices:
        q = pick_layer(q, index)
    fill = None
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = math.nan if fill is None else float(fill)
    rows = quantized_take(q, indices[..., 0], fill_value=fill)  # (*B, K)
    for dtype in view.casts:
        rows = rows.astype(dtype)
    numbers = eqn.params["dimension_numbers"]
    kept = [n for i, n in enumerate(view.shape) if i != axis]
    rows = rows.reshape(*indices.shape[:-1], *kept)
    # offset_dims says where the axes of a row stand in the result
    batch_dims = [i for i in range(rows.ndim) if i not in numbers.offset_dims]
    where = [*batch_dims, *numbers.offset_dims]
    return [jnp.transpose(rows, sorted(range(rows.ndim), key=where.__getitem__))]


# primitive -> rule; a primitive that is not listed runs on the dequantized parameter
RULES: dict[Any, EquationRule] = {
    prims.dot_general_p: lower_dot,
    prims.gather_p: lower_take,
    ragged_dot_general_p: lower_ragged_dot,
}
