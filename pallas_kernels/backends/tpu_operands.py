"""What TPU kernels take beside their weight, and the dtypes that they compute in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from qjax.pallas_kernels.backends.epilogue import Epilogue


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a kernel holds in VMEM for more than one product.

    Attributes:
        weights: how many are multiplied.
        others: of each other operand of the epilogue, whether it has rows, and whether it has columns.
    """

    weights: int = 1
    others: tuple[tuple[bool, bool], ...] = ()

    @staticmethod
    def of(weights: int, shapes: Sequence[tuple[int, ...]]) -> Beside:
        """For other operands of these shapes, `(*stack, M or 1, N or 1)`."""
        return Beside(weights, tuple((shape[-2] > 1, shape[-1] > 1) for shape in shapes))


def no_float16(a: Array) -> Array:
    """float32 in place of float16, which no TPU computes with."""
    return a.astype(jnp.float32) if a.dtype == jnp.float16 else a


def operand_dtype(x: Any, weight: Any, precision: Any) -> jnp.dtype:
    """The dtype in which values of these dtypes are multiplied, with a precision as `lax.dot_general` takes it."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    each = precision if isinstance(precision, tuple) else (precision,)
    names = {str(getattr(p, "name", p)).upper() for p in each}
    one_pass = x != jnp.float16 and names <= {"NONE", "DEFAULT", "FASTEST", "BFLOAT16", "BF16_BF16_F32"}
    return jnp.dtype(jnp.bfloat16 if one_pass or jnp.promote_types(x, weight) == jnp.bfloat16 else jnp.float32)


STRIP = 16  # rows of a tile that go through an epilogue at a time: a multiple of the rows of a register


def finish_strips(epilogue: Epilogue, sums: Sequence[tuple[Any, Any]], others: Sequence[Any], out_ref: Any) -> None:
    """Writes what is made of the sums, each with a scale or None; `STRIP` rows at a time, or those of a register."""

    height = min(max(STRIP, 32 // out_ref.dtype.itemsize), out_ref.shape[0])

    def strip(i: Any) -> None:
        rows = pl.ds(pl.multiple_of(i * height, height), height)
        products = [ref[rows, :] if scale is None else ref[rows, :] * scale[...] for ref, scale in sums]
        out_ref[rows, :] = epilogue(products, [ref[rows, :] if ref.shape[0] > 1 else ref[...] for ref in others])

    count = out_ref.shape[0] // height
    if count == 1:
        strip(0)
    else:
        lax.fori_loop(0, count, lambda i, _: strip(i), None)
