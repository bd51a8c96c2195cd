"""`Epilogue`: what a program does with the result of a product, value by value, as a kernel runs it on a tile.

A kernel is a wall for XLA: a bias, an activation function or a residual connection after it would read and write the
whole result once more. Given to the kernel as an `Epilogue` they are applied to the finished sums instead. It is plain
data that compares and hashes, so that layers which do the same share one kernel.

**Rounding** is the program's: each operation has the dtype that it has there. bfloat16 is computed in float32 and
rounded after each operation, as not every chip has bfloat16 arithmetic.

**Codes.** Where the program only goes on to quantize the result, with a range that is known before the call, codes of a
byte are written instead of floats. They are those of `activations.quantize`, but where its quotient lies within a
rounding error (of the chip's division, and of the operations before) of the middle between two codes: there, the
neighbour. A range that depends on the values, such as one for each token, takes the whole row, which no tile has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims
from jaxtyping import Array, Float, Int8

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.exact import divide
from qjax.pallas_kernels.numbers.formats import Format


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value known to the program."""

    value: float | int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        primitive: a key of `OPERATIONS`.
        operands: numbers of values, or constants.
        params: of the primitive.
        dtype: of the result.
    """

    primitive: Primitive
    operands: tuple[int | Constant, ...]
    params: tuple[tuple[str, Any], ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """A program from products and other operands to one result of the same shape.

    Values are numbered: the products, the other operands, and then the results of the steps.

    Attributes:
        dtype: of the products, to which their sums are rounded first.
        products: how many there are.
        others: how many other operands.
        steps: in the order in which they run.
        result: number of the value that is the result.
        codes: how the result is quantized, to integers with a range known before the call: the last of the other
            operands are its scale and, if it has one, its zero point. None for a result in floats.
    """

    dtype: Any
    products: int
    others: int
    steps: tuple[Step, ...]
    result: int
    codes: ActSpec | None = None

    @property
    def out_dtype(self) -> Any:
        """Of the result."""
        if self.codes is not None:
            return jnp.dtype(jnp.int8)
        first = self.products + self.others
        return self.steps[self.result - first].dtype if self.result >= first else self.dtype

    def __call__(
        self, products: Sequence[Float[Array, "*stack M N"]], others: Sequence[Array]
    ) -> Float[Array, "*stack M N"] | Int8[Array, "*stack M N"]:
        """The result for a tile, or for all of them, in `out_dtype`.

        Args:
            products: float32 sums.
            others: `(M, N)`, `(1, N)`, `(M, 1)` or `(1, 1)`, float32 or bfloat16; with a stack in front if the products
                have one.
        """
        values = [_rounded(a, self.dtype) for a in products] + [a.astype(jnp.float32) for a in others]
        for step in self.steps:
            shape = jnp.broadcast_shapes(*(values[o].shape for o in step.operands if isinstance(o, int)), (1, 1))
            operands = [
                jnp.full(shape, o.value, _computed(o.dtype))
                if isinstance(o, Constant)
                else _stretched(values[o], shape)
                for o in step.operands
            ]
            values.append(_rounded(OPERATIONS[step.primitive](step, *operands), step.dtype))
        result = values[self.result]
        return result.astype(self.out_dtype) if self.codes is None else self.encoded(result, others)

    def encoded(self, result: Float[Array, "*stack M N"], others: Sequence[Array]) -> Int8[Array, "*stack M N"]:
        """The codes of a result in float32, for kernels that do not write bytes; `others` as for the call."""
        assert self.codes is not None
        scale, *zero = (_stretched(a, result.shape) for a in others[-2 if self.codes.zero_point else -1 :])
        return _nearest_codes(result, scale, zero[0] if zero else None, self.codes.format)


_ROUNDING = 1.5 * 2**23  # the sum with a smaller number has the nearest integer, ties to even, in its last bits

_BITS_OF_ROUNDING = 0x4B400000


def _nearest_codes(
    x: Float[Array, "*S"], scale: Float[Array, "*S"], zero: Float[Array, "*S"] | None, format: Format
) -> Int8[Array, "*S"]:
    """`activations.quantize`, in operations that every compiler of kernels has; the code of NaN is 0."""
    y = divide(x, scale)
    y = y if zero is None else y + zero
    y = jnp.minimum(jnp.maximum(y, float(format.qmin)), float(format.qmax))
    codes = lax.bitcast_convert_type(y + _ROUNDING, jnp.int32) - _BITS_OF_ROUNDING
    return jnp.where(x == x, codes, 0).astype(jnp.int8)


def _computed(dtype: Any) -> Any:
    """The dtype that stands for another one inside a kernel."""
    return jnp.bool_ if dtype == jnp.bool_ else jnp.float32


def _rounded(a: Array, dtype: Any) -> Array:
    return a.astype(jnp.bfloat16).astype(jnp.float32) if dtype == jnp.bfloat16 else a


def _stretched(a: Array, shape: tuple[int, ...]) -> Array:
    return a if a.shape == shape else jnp.broadcast_to(a, shape)


# --- Operations -----------------------------------------------------------------------------------------------------


def _bind(step: Step, *operands: Array) -> Array:
    return step.primitive.bind(*operands, **dict(step.params))


def _convert(step: Step, a: Array) -> Array:
    return a.astype(_computed(step.dtype))


def _same(step: Step, a: Array) -> Array:
    return a


def _erfc(step: Step, x: Array) -> Array:
    """The Chebyshev fit of Press et al., Numerical Recipes, section 6.2: a relative error of 1.2e-7 everywhere."""
    coefficients = (
        *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807),
        *(-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223),
    )
    t = 1 / (1 + 0.5 * jnp.abs(x))
    series = functools.reduce(lambda total, c: total * t + c, coefficients[1:], jnp.full_like(t, coefficients[0]))
    tail = t * jnp.exp(series - x * x)
    return jnp.where(x >= 0, tail, 2 - tail)


def _expm1(step: Step, x: Array) -> Array:
    """`exp(x) - 1 == tanh(x / 2) * (exp(x) + 1)`, which keeps the digits of small results."""
    return jnp.tanh(x / 2) * (jnp.exp(x) + 1)


_AS_THEY_ARE = (
    *(prims.add_p, prims.sub_p, prims.mul_p, prims.div_p, prims.max_p, prims.min_p, prims.neg_p, prims.abs_p),
    *(prims.exp_p, prims.log_p, prims.log1p_p, prims.tanh_p, prims.logistic_p, prims.erf_p),
    *(prims.sqrt_p, prims.rsqrt_p, prims.square_p, prims.integer_pow_p),
    *(prims.eq_p, prims.ne_p, prims.lt_p, prims.le_p, prims.gt_p, prims.ge_p, prims.select_n_p, prims.clamp_p),
)

# primitive -> (step, operands of one shape) -> result; Mosaic, the compiler of kernels for TPU, has no erfc, no expm1
OPERATIONS: dict[Primitive, Callable[..., Array]] = {
    **dict.fromkeys(_AS_THEY_ARE, _bind),
    prims.convert_element_type_p: _convert,
    prims.copy_p: _same,
    prims.erfc_p: _erfc,
    prims.expm1_p: _expm1,
}

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Of products, other operands and results; what happens between them may be boolean too."""
