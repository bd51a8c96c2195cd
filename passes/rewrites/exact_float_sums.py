"""Integer convolutions and ragged dots by float32 arithmetic that is exact."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer
from qjax.passes.jaxpr.values import Ref
from qjax.passes.rewrites import lower

# --- Convolution and ragged dot: integers that float32 holds -------------------------------------------------------
#
# XLA has no fast integer form of these on every platform. Products of codes are small integers, and float32 adds them
# exactly up to 2**24: the program's own equation runs on them, in parts of what is contracted where it must.

_EXACT = 2**24


def _largest(format: Format, centred: bool) -> int:
    """The largest magnitude of a code, or of a code less its zero point."""
    return 2**format.bits - 1 if centred else 2 ** (format.bits - 1)


def _most(x: Activation, spec: ActSpec, q: QTensor) -> int:
    """How many products of codes float32 adds up exactly."""
    largest = _largest(spec.format, x.zero is not None) * _largest(q.spec.format, q.scales.zero is not None)
    return max(1, _EXACT // largest)


def _centred_weight(ref: Ref) -> Float[Array, "*S"]:
    """`code - zero` of a packed weight as the program sees it, casts left out; float32 integers."""
    q = ref.base
    words, scales = q.matrix_arrays()
    codes = packing.unpack(words, q.spec.format, q.layout.k).astype(jnp.float32)
    if scales.zero is not None:
        codes = codes - jnp.broadcast_to(scales.zero.astype(jnp.float32), (*scales.zero.shape[:-2], 1, codes.shape[-1]))
    return dataclasses.replace(ref.view, casts=()).apply(q.layout.from_matrix(codes), ref.indices)


def _bind_float32(eqn: Any, values: list[Any]) -> Array:
    params = eqn.primitive.get_bind_params({**eqn.params, "preferred_element_type": jnp.dtype("float32")})
    return eqn.primitive.bind(*values, **params)


def exact_conv(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    """A convolution of codes; None where the weight was packed for another reading."""
    picked = lower.pick(ref, [])
    if picked is None:
        return None
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    x_axis, w_axis, out_batch, out_axis = (
        numbers.lhs_spec[1],
        numbers.rhs_spec[1],
        numbers.out_spec[0],
        numbers.out_spec[1],
    )
    out = eqn.outvars[0].aval

    def of_codes() -> Array:
        q = pick_layer(*picked)
        most = _most(x, spec, q)
        codes, weight = x.centred(spec.format), _centred_weight(ref)
        features = weight.shape[w_axis]
        window = math.prod(weight.shape) // max(1, features * weight.shape[numbers.rhs_spec[0]])
        if window * features <= most:
            acc = _bind_float32(eqn, [codes, weight])
        elif groups > 1 or window > most:
            params = {**eqn.params, "preferred_element_type": jnp.dtype("int32")}
            operands = [codes.astype(jnp.int32), weight.astype(jnp.int32)]
            acc = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params)).astype(jnp.float32)
        else:
            acc, step = jnp.zeros(out.shape, jnp.int32), most // window
            for start in range(0, features, step):
                end = min(start + step, features)
                features_of = ((codes, x_axis), (weight, w_axis))
                part = [lax.slice_in_dim(a, start, end, axis=axis) for a, axis in features_of]
                acc = acc + _bind_float32(eqn, part).astype(jnp.int32)
            acc = acc.astype(jnp.float32)
        _, scales = q.matrix_arrays()
        columns = stored_scales.resolve_scales(scales).reshape(-1)  # one for each output feature, or one
        columns = columns.reshape([columns.size if i == out_axis else 1 for i in range(len(out.shape))])
        rows = x.scale.reshape([x.scale.size if i == out_batch else 1 for i in range(len(out.shape))])
        return (acc * columns * rows).astype(out.dtype)

    return of_codes


def exact_ragged(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    """A ragged dot of codes; None where the weight was packed for another reading."""
    group_axes = eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    picked = lower.pick(ref, [atom for i in group_axes for atom in ref.view.axes[i]])
    if picked is None or len(picked[0].words.shape) - 2 - (picked[1] is not None) != 1:
        return None
    (_, (w_axis,)), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    sizes, out = values[2], eqn.outvars[0].aval

    def of_codes() -> Array:
        q = pick_layer(*picked)
        most, k = _most(x, spec, q), q.layout.k
        codes, weight = x.centred(spec.format), _centred_weight(ref)
        acc = jnp.zeros(out.shape, jnp.int32)
        for start in range(0, k, most):
            end = min(start + most, k)
            part = (lax.slice_in_dim(codes, start, end, axis=1), lax.slice_in_dim(weight, start, end, axis=w_axis))
            acc = acc + _bind_float32(eqn, [*part, sizes]).astype(jnp.int32)
        _, scales = q.matrix_arrays()
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(codes.shape[0]), side="right")
        columns = stored_scales.resolve_scales(scales)[:, 0][jnp.minimum(expert, sizes.size - 1)]  # (M, N or 1)
        return (acc.astype(jnp.float32) * columns * x.scale).astype(out.dtype)

    return of_codes
