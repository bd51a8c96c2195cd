"""The value of a matrix that is derived from parameters only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.passes.analysis.sites import Constant, Expr, Fold, Param, Viewed
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Address


def evaluate_fold(fold: Fold, params: Callable[[str], Array]) -> Array:
    """The derived matrix of a fold, shape `fold.shape`, from the float parameters `params(path)`.

    Differentiable in the parameters; equations run unchanged, so custom gradient rules inside are kept.
    """
    memo: dict[int, list[Any]] = {}

    def value(operand: Viewed | Constant, loops: dict[Address, Any]) -> Any:
        if isinstance(operand, Constant):
            return operand.value
        source = operand.source
        base = params(source.path) if isinstance(source, Param) else expression(source, loops)
        picked = [loops[key[1]] if key[0] == "loop" else key[1] for key in (i.key for i in operand.view.indexed)]
        return base if operand.view.is_identity else operand.view.apply(base, picked)

    def expression(expr: Expr, loops: dict[Address, Any]) -> Any:
        key = id(expr.eqn)
        if key not in memo:
            memo[key] = control_flow.bind(expr.eqn, [value(o, loops) for o in expr.operands])
        return memo[key][expr.out]

    def over(remaining: tuple[Address, ...], loops: dict[Address, Any]) -> Any:
        if not remaining:
            memo.clear()
            return expression(fold.expr, loops)
        length = fold.shape[len(fold.loops) - len(remaining)]
        return jax.vmap(lambda i: over(remaining[1:], {**loops, remaining[0]: i}))(jnp.arange(length))

    out = over(fold.loops, {})
    memo.clear()
    return out
