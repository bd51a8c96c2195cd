"""Carries out joints: products of one input with several packed weights, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from qjax.pallas_kernels.ops.horizontal_matmul.api import joint_matmul
from qjax.passes.jaxpr.values import Fused, Scope, as_float
from qjax.passes.plan.decisions import Joint
from qjax.passes.rewrites.epilogues import packed_forms


def joined(joint: Joint) -> Fused:
    """What `passes.jaxpr.replay` does in place of the dots of a joint."""

    def rule(eqns: Sequence[Any], read: Any, scope: Scope) -> list[Array] | None:
        dots = [eqns[i] for i in joint.dots]
        forms = packed_forms(dots, joint.operands, read)
        if forms is None:
            return None
        x = as_float(read(dots[0].invars[1 - joint.operands[0]]))
        products = joint_matmul(
            forms[0][1].rows(x),
            [form.weight for _, form in forms],
            layers=[form.layer for _, form in forms],
            casts=forms[0][0].view.casts,
            precision=dots[0].params["precision"],
            preferred_element_type=dots[0].params["preferred_element_type"],
        )
        return [form.result(product) for (_, form), product in zip(forms, products, strict=True)]

    return Fused(joint.body, joint.dots, rule, place=joint.dots[0], before=joint.before)
