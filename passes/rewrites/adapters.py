"""Low-rank adapters attached to products of packed weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jaxtyping import Array

from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.analysis.sites import Sites
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.jaxpr.values import AtRule, Ref, Scope
from qjax.passes.jaxpr.views import View
from qjax.passes.plan.adapters import adapter_shapes, matrix_shape, refusal, shape_text
from qjax.passes.plan.decisions import Plan
from qjax.passes.rewrites import lower

# --- Carrying out ------------------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The two factors of one parameter's adapter: `delta == layout.from_matrix(a @ b) * scale`.

    It takes the place of a `QTensor` as the base of a `Ref`, so that it is seen through the same views.

    Attributes:
        a: `(*stack, K, r)`.
        b: `(*stack, r, N)`.
        layout: of the parameter.
        scale: `alpha / rank`.
    """

    a: Any
    b: Any
    layout: Layout
    scale: float

    def tree_flatten(self):
        """The factors as leaves, the rest static."""
        return (self.a, self.b), (self.layout, self.scale)

    @classmethod
    def tree_unflatten(cls, aux, children) -> Adapter:
        """Rebuilds from `tree_flatten`."""
        return cls(*children, *aux)

    def matrix(self) -> Array:
        """`a @ b * scale` in float32, shape `(*stack, K, N)`."""
        a, b = (jnp.asarray(x, jnp.float32) for x in (self.a, self.b))
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST) * self.scale

    def product(self, rows: Array, precision: Any) -> Array:
        """`rows @ a @ b * scale` in the dtype of `rows`, for `rows` of shape `(*stack, M, K)`."""
        low = jnp.matmul(rows, jnp.asarray(self.a, rows.dtype), precision=precision)  # (*stack, M, r)
        return jnp.matmul(low * self.scale, jnp.asarray(self.b, rows.dtype), precision=precision)


def adapter(name: str, pair: Any, shape: Sequence[int], layout: Layout, scale: float) -> Adapter:
    """The adapter of parameter `name` from the arrays `a` and `b` that stand at its path.

    Raises:
        ValueError: they are not those of a parameter of this shape.
    """
    matrix = matrix_shape(shape, layout)
    found = {part: getattr(value, "shape", None) for part, value in pair.items()}
    a = found.get("a") or (0,)
    if found.keys() != {"a", "b"} or (found["a"], found["b"]) != adapter_shapes(matrix, a[-1]):
        raise ValueError(
            f"qjax: the adapter of {name!r} has {', '.join(f'{k}{list(v or ())}' for k, v in found.items())}; for its "
            f"matrix {shape_text(matrix)} it must be a{shape_text((*matrix[:-1], 'rank'))} and "
            f"b{shape_text((*matrix[:-2], 'rank', matrix[-1]))}."
        )
    return Adapter(pair["a"], pair["b"], layout, scale)


def _base_product(eqn: Any, values: list[Any], operand: int) -> Array:
    """The product that runs where there is no adapter."""
    ref = values[operand]
    if ref.shadow is None:
        rest = [v.materialize() if isinstance(v, Ref) and i != operand else v for i, v in enumerate(values)]
        results = lower.RULES[eqn.primitive](eqn, rest, operand)
        if results is not None:
            return results[0]
    return control_flow.bind(eqn, [v.materialize() if isinstance(v, Ref) else v for v in values])[0]


def _adapted(whole: Adapter, operand: int, base: AtRule | None) -> AtRule:
    """The rule for one `dot_general`: `base`, or the product that runs without it, plus the adapter's."""

    def rule(eqn: Any, values: list[Any], scope: Scope) -> list[Any]:
        ref, x = values[operand], values[1 - operand]
        assert eqn.primitive is prims.dot_general_p
        assert isinstance(ref, Ref)
        out = base(eqn, values, scope)[0] if base else _base_product(eqn, values, operand)
        form = lower.dot_form(eqn, Ref(whole, ref.view, ref.indices), operand)
        assert form is not None, "the plan takes no parameter that is read in another way than it is packed"
        own = form.weight
        if form.layer is not None:
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, form.layer, 0, keepdims=False), own)
        x = x.materialize() if isinstance(x, Ref) else x
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else out.dtype
        with jax.named_scope("lora"):
            added = form.result(own.product(form.rows(x).astype(dtype), eqn.params["precision"]))
            return [out + added.astype(out.dtype)]

    return rule


def attach(
    program: Program,
    sites: Sites,
    plan: Plan,
    values: Sequence[Any],
    at: Mapping[Address, AtRule],
    pairs: Mapping[str, Any],
    scale: float,
) -> tuple[list[Any], dict[Address, AtRule]]:
    """The inputs and rules with which `replay` runs the adapted program.

    Args:
        program, sites, plan: of this call.
        values, at: the inputs and the rules by address with which it runs without adapters.
        pairs: path of a parameter -> its arrays `a` and `b`. One that this call does not use is left out.
        scale: `alpha / rank`.

    Raises:
        ValueError: an adapter for a parameter that the call does not have, or uses as no adapter can follow.
    """
    values, rules = list(values), dict(at)
    where = {path: i for i, path in enumerate(program.paths) if path is not None}
    for name, pair in pairs.items():
        if name not in where:
            raise ValueError(f"qjax: 'lora' has an adapter for {name!r}, which is no parameter of the model.")
        own = [site for site in sites.sites if site.source == name]
        if not own and not sites.uses[name]:
            continue
        value = values[where[name]]
        packed = value.base if isinstance(value, Ref) else value
        layout = packed.layout if isinstance(packed, QTensor) else plan[name].layout
        reason = "it stays float" if layout is None else refusal(program, sites, name, plan[name].shape, layout)
        if layout is None or reason:
            raise ValueError(f"qjax: 'lora' has an adapter for {name!r}, but in this call it can have none: {reason}.")
        whole = adapter(name, pair, plan[name].shape, layout, scale)
        if not isinstance(value, Ref | QTensor):  # in training: the float value, and the view that the adapter needs
            values[where[name]] = Ref(value, View.identity(value.shape), shadow=value)
        for site in own:
            rules[site.address] = _adapted(whole, site.operand, rules.get(site.address))
    return values, rules
