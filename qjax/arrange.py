"""`arrange`: packed matrices in the storage order that the kernels of a chip read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import blocks_gpu, chips, matmul_gpu
from pallas_kernels.qtensor import QTensor, reorder
from qjax.model import QuantizedNNX, nnx_state, with_nnx_values


def arrange(variables: Any, chip: str) -> Any:
    """Converted variables, with matrices stored as the kernels of a chip read them: the same values, bit for bit.

    NVIDIA Hopper reads the packed words of a column from one place: matrices that its kernel takes get order "nk". To
    be done once, after `convert` or `restore` and before the model serves; save what was converted, not this. All
    other chips read what `convert` and `restore` give, which is returned as it is.

    Args:
        variables: packed variables, or the `QuantizedNNX` of `convert`.
        chip: as for `target_chip`.

    Returns:
        The same structure. Arrays that did not change are shared with `variables`.

    Raises:
        ValueError: no such chip is known.
    """
    with chips.target_chip(chip):
        gpu = blocks_gpu.asked_for()
    if gpu is None or gpu.capability != matmul_gpu.HOPPER:
        return variables
    if isinstance(variables, QuantizedNNX):
        values = {path: variable.get_value() for path, _, variable in nnx_state(variables.model)}
        out = QuantizedNNX(with_nnx_values(variables.model, arrange(values, chip)), variables.recipe)
        out.ranges.set(variables.ranges.values())
        return out

    def arranged(leaf: Any) -> Any:
        if not isinstance(leaf, QTensor):
            return leaf
        other = jax.eval_shape(lambda q: reorder(q, "nk"), leaf)
        x = jax.ShapeDtypeStruct((1, leaf.layout.k), leaf.dtype)
        with chips.target_chip(chip):
            taken = matmul_gpu.unsupported(x, other, (), jnp.dtype(leaf.dtype)) is None
        return reorder(leaf, "nk") if taken else leaf

    return jax.tree.map(arranged, variables, is_leaf=lambda leaf: isinstance(leaf, QTensor))
