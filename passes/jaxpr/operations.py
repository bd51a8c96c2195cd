"""`packed_operations`: the packed operations of a program, and the parameters and caches that each of them reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.jaxpr import control_flow

# What may be done to packed arrays on their way to an operation: picking a layer, a step of a scan, another shape.
_MOVES = {
    prims.broadcast_in_dim_p,
    prims.convert_element_type_p,
    prims.dynamic_slice_p,
    prims.gather_p,
    prims.reshape_p,
    prims.slice_p,
    prims.squeeze_p,
    prims.stop_gradient_p,
    prims.transpose_p,
}


@dataclasses.dataclass(frozen=True)
class PackedOperation:
    """An equation of a program that computes with packed arrays.

    Attributes:
        eqn: the equation; the parameter `tree` says how its operands are flattened.
        operands: for each operand, the packed parameter, fold or cache of which it is an array, or None.
    """

    eqn: Any
    operands: tuple[str | None, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What it reads of packed parameters, folds and caches; x may be made of others, which do not count."""
        tree = self.eqn.params["tree"]
        nodes = jax.tree.leaves(
            jax.tree.unflatten(tree, [name or "" for name in self.operands[: tree.num_leaves]]),
            is_leaf=lambda node: isinstance(node, QTensor | QCache),
        )
        found = [jax.tree.leaves(node)[0] for node in nodes if isinstance(node, QTensor | QCache)]
        return tuple(dict.fromkeys(name for name in found if name))


def packed_operations(jaxpr: Any, names: Sequence[str | None]) -> Iterator[PackedOperation]:
    """The packed operations of a closed jaxpr, in program order, those inside of its control flow among them.

    Args:
        jaxpr: of the program.
        names: per input, the name of the packed parameter, fold or cache of which it is an array, or None.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[Any, str | None] = dict(zip(inner.invars, names, strict=True))

    def read(atom: Any) -> str | None:
        return None if isinstance(atom, Literal) else env.get(atom)

    for eqn in inner.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if "tree" in eqn.params:
            yield PackedOperation(eqn, tuple(operands))
        elif eqn.primitive in _MOVES:
            env[eqn.outvars[0]] = operands[0]
        for body in control_flow.bodies(eqn):
            yield from packed_operations(body.jaxpr, [operands[feed.operand] for feed in body.feeds])
