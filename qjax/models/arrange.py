"""`arrange`: packed matrices as the kernels of a chip read them."""

from __future__ import annotations

from typing import Any

import jax

from qjax.models.frameworks import binding_of
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.chips import target
from qjax.pallas_kernels.ops.matmul import arranged as matmul_arranged
from qjax.pallas_kernels.packed.qtensor import QTensor


def arrange(variables: Any, chip: str) -> Any:
    """Converted variables, with matrices stored as the kernels of a chip read them: the same values, bit for bit.

    To be done once, after `convert` or `restore` and before the model serves; save what was converted, not this.

    NVIDIA Hopper reads the packed words of a column from one place: matrices that its kernel takes get order "nk". On
    every NVIDIA GPU, codes are unpacked from 4 or 8 bits: int2 and int3 become int4, int5 to int7 become int8, and
    scales that are quantized themselves float32, which takes more memory (`QTensor.nbytes`). What no kernel takes stays
    as it is, and so does all for TPU.

    Args:
        variables: packed variables, or the `QuantizedNNX` of `convert`.
        chip: as for `target_chip`.

    Returns:
        The same structure. Arrays that did not change are shared with `variables`.

    Raises:
        ValueError: no such chip is known.
    """
    with target.target_chip(chip):
        gpu = gpu_chips.asked_for()
    if gpu is None:
        return variables
    if (binding := binding_of(variables)) and binding.holds_variables:
        return binding.with_tree(variables, arrange(binding.tree(variables, None), chip))

    def arranged(leaf: Any) -> Any:
        return matmul_arranged.arranged(leaf) if isinstance(leaf, QTensor) else leaf

    with target.target_chip(chip):
        return jax.tree.map(arranged, variables, is_leaf=lambda leaf: isinstance(leaf, QTensor))
