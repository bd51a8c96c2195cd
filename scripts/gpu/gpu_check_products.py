"""Checks of `scripts/gpu_check`: weight-only products, products of integers and programs, against NumPy."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from gpu_check_cases import Check, IntegerCheck, Program


def refuse(reason: str | None) -> None:
    """What a kernel has against a product, as an error."""
    if reason is not None:
        raise RuntimeError(f"the kernel does not take this: {reason}")


def runs(kernel: str, dry: bool) -> bool:
    """Whether the kernel runs, or is interpreted, here; else a dry run has the reference in its place."""
    import jax

    return not (dry and kernel == "mosaic" and jax.__version_info__ < (0, 11))


def product(kernel: str, dry: bool) -> Callable[..., Any]:
    """`matmul` of a kernel as a function of x, the weight, the layer, and tiles."""
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.ops.matmul import reference as matmul_reference
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton

    options: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
    module = {"mosaic": matmul_mosaic, "triton": matmul_triton}[kernel]

    def run(x: Any, w: Any, layer: Any, blocks: Any = None) -> Any:
        refuse(module.unsupported(x, w, (), x.dtype))
        if not runs(kernel, dry):
            return matmul_reference.matmul(x, w, layer=layer, **options)
        return module.matmul(x, w, layer=layer, blocks=blocks, interpret=dry, **options)

    return run


def check(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product: the largest as part of the bound of `ops.matmul.mosaic`, and the relative one of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.backends import gpu_operands
    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import quantize

    case = Check(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    seed = int.from_bytes(os.urandom(4), "little")
    generator = np.random.default_rng(seed)
    spec = QuantSpec(
        FORMATS[case.format],
        PerGroup(case.group) if case.group else PerChannel(),
        scale_dtype="bfloat16" if case.group else "float32",
        scale_rule=AbsMax(),
        zero_point=case.zero_point,
    )
    experts = () if case.stack is None else (case.stack,)
    layout = Layout((*(((size, "stack"),) for size in experts), ((case.k, "k"),), ((case.n, "n"),)))
    lead = () if case.layer is None else (3,)
    values = 0.02 * (0.3 + generator.standard_normal((*lead, *experts, case.k, case.n)))
    order: Any = case.order
    w = jax.jit(lambda w: quantize(w, spec, layout, order))(jnp.asarray(values, case.dtype))
    x = jnp.asarray(generator.standard_normal((*experts, case.m, case.k)), case.dtype)
    run = jax.jit(product(case.kernel, dry))
    layer = None if case.layer is None else jnp.int32(case.layer)
    got = np.asarray(run(x, w, layer), np.float64)
    again = np.asarray(run(x, w, layer), np.float64)

    words, scales = w.matrix_arrays()
    codes = np.asarray(words)
    if case.format == "int4":
        nibbles = (codes[..., :, None, :] >> (4 * np.arange(8))[:, None]) & 15
        codes = nibbles.reshape(*codes.shape[:-2], -1, case.n)[..., : case.k, :]
        codes = codes - 16 * (codes >= 8)

    def spread(a: Any) -> Any:
        return np.repeat(np.asarray(a, np.float64), case.group or case.k, axis=-2)[..., : case.k, :]

    zero = 0.0 if scales.zero is None else spread(scales.zero)
    weights = (codes.astype(np.float64) - zero) * spread(scales.values)
    weights = weights if case.layer is None else weights[case.layer]
    exact = np.asarray(x, np.float64)
    want = exact @ weights
    # Per channel, weights are exact in the kernel; in groups, and in the float parameter, they are rounded.
    eps = float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (w.dtype,))).eps)
    bound = 2 * eps * (np.abs(exact) @ np.abs(weights)) + float(jnp.finfo(x.dtype).eps) * np.abs(want)
    error = np.abs(got - want)
    largest, relative = float((error / bound).max()), float(np.linalg.norm(error) / np.linalg.norm(want))
    return {
        "right": bool(np.isfinite(got).all() and largest < 1 and relative < 0.5 * eps),
        "same_again": bool((got == again).all()),
        "largest": largest,
        "relative": relative,
        "eps": eps,
        "seed": seed,
        "tiles": str(matmul_mosaic.default_blocks(case.m, case.k, case.n, FORMATS[case.format].bits))
        if case.kernel == "mosaic"
        else None,
    }


def program(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a program: as `check` gives them, of weights that XLA dequantizes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.extend.core import primitives as prims

    from qjax.pallas_kernels.backends import gpu_operands
    from qjax.pallas_kernels.backends.epilogue import Epilogue, Step
    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import quantize

    case = Program(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    generator, f32 = np.random.default_rng(int.from_bytes(os.urandom(4), "little")), jnp.dtype(jnp.float32)
    granularity = PerGroup(case.group) if case.group else PerChannel()
    spec = QuantSpec(FORMATS[case.format], granularity, scale_rule=AbsMax(), zero_point=case.zero_point)
    order: Any = "nk" if case.kernel == "mosaic" else "kn"

    def packed(n: int) -> Any:
        layout = Layout((((case.k, "k"),), ((n, "n"),)))
        values = generator.standard_normal((case.k, n)) / case.k**0.5
        return jax.jit(lambda w: quantize(w, spec, layout, order))(jnp.asarray(values, case.dtype))

    def normal(*shape: int) -> Any:
        return jnp.asarray(generator.standard_normal(shape), case.dtype)

    def step(primitive: Any, *operands: int, **params: Any) -> Step:
        return Step(primitive, operands, tuple(params.items()), f32)

    gated = (step(prims.logistic_p, 0, accuracy=None), step(prims.mul_p, 0, 2), step(prims.mul_p, 3, 1))
    added = (step(prims.add_p, 0, 1), step(prims.add_p, 3, 2))
    epilogues = {"gated": Epilogue(f32, 2, 0, gated, 4), "bias, residual": Epilogue(f32, 1, 2, added, 4)}
    epilogue, transpose = epilogues.get(case.what), case.what == "transposed"
    widths = (case.n, 64, 192) if case.what == "joint" else (case.n,) * (epilogue.products if epilogue else 1)
    weights, x = [packed(n) for n in widths], normal(case.m, case.n if transpose else case.k)
    others = [normal(1, 1, case.n), normal(1, case.m, case.n)] if case.what == "bias, residual" else []
    module: Any = {"mosaic": matmul_mosaic, "triton": matmul_triton}[case.kernel]
    how: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": f32}
    refuse(module.unsupported(x, weights[0], (), f32, transpose=transpose))
    refuse(module.unsupported_epilogue(epilogue) if epilogue else None)
    if runs(case.kernel, dry):
        how["interpret"] = dry
    else:
        module = matmul_gpu  # which computes the same without a kernel

    @jax.jit
    def run(x: Any, weights: Any, others: Any) -> list[Any]:
        if epilogue:
            layers = [None] * len(weights)
            return [module.fused_matmul(x, weights, others, layers=layers, epilogue=epilogue, **how)]
        if case.what == "joint" and module is matmul_mosaic:
            return module.joint_matmul(x, weights, layers=[None] * len(weights), **how)
        return [module.matmul(x, w, layer=None, transpose=transpose, **how) for w in weights]

    got, again = ([np.asarray(a, np.float64) for a in run(x, weights, others)] for _ in range(2))
    exact, matrices = np.asarray(x, np.float64), [np.asarray(w.dequantize(), np.float64) for w in weights]
    matrices = [a.T for a in matrices] if transpose else matrices
    want = [exact @ a for a in matrices]
    eps = float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (weights[0].dtype,))).eps)
    off = [2 * eps * (np.abs(exact) @ np.abs(a)) for a in matrices]
    if case.what == "gated":
        gate, up = want
        sigmoid = 1 / (1 + np.exp(-gate))
        want, off = [gate * sigmoid * up], [1.1 * np.abs(up) * off[0] + np.abs(gate * sigmoid) * off[1]]
    elif others:
        want = [want[0] + sum(np.asarray(a, np.float64)[0] for a in others)]
    errors = [np.abs(a - b) for a, b in zip(got, want, strict=True)]
    largest = max(float((e / (o + 1e-5 * (1 + np.abs(w)))).max()) for e, o, w in zip(errors, off, want, strict=True))
    relative = max(float(np.linalg.norm(e) / np.linalg.norm(w)) for e, w in zip(errors, want, strict=True))
    return {
        "right": bool(all(np.isfinite(a).all() for a in got) and largest < 1 and relative < eps),
        "same_again": all(bool((a == b).all()) for a, b in zip(got, again, strict=True)),
        "largest": largest,
        "relative": relative,
        "eps": eps,
    }


def integer_product(kernel: str, dry: bool) -> Callable[..., Any]:
    """`matmul` of a kernel of `integer_matmul`, as a function."""
    from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic
    from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton
    from qjax.pallas_kernels.ops.integer_matmul.reference import matmul as matmul_reference

    module = {"mosaic": integer_matmul_mosaic, "triton": integer_matmul_triton}[kernel]

    def run(x: Any, scale: Any, zero: Any, w: Any, layer: Any, dtype: str) -> Any:
        refuse(module.unsupported(x, w, dtype))
        if not runs(kernel, dry):
            return matmul_reference(x, scale, zero, w, layer=layer, out_dtype=dtype)
        return module.matmul(x, scale, zero, w, layer=layer, out_dtype=dtype, interpret=dry)

    return run


def integers(dry: bool, **fields: Any) -> dict[str, Any]:
    """How many elements of a product of random codes have other bits than they should have."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.numbers.stored_scales import Scales
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import QTensor

    case = IntegerCheck(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    seed = int.from_bytes(os.urandom(4), "little")
    generator = np.random.default_rng(seed)
    experts = () if case.stack is None else (case.stack,)
    lead = experts if case.layer is None else (3, *experts)
    size, low = case.group or case.k, -(2 ** (case.bits - 1))
    groups = -(-case.k // size)

    codes = generator.integers(low, -low, (*lead, case.n, case.k))
    scales = (generator.standard_normal((*lead, case.n, groups)) * 0.01).astype(np.float32)
    weight_zero = generator.integers(low, -low, scales.shape) if "w" in case.zeros else None
    words = codes.astype(np.int8)
    if case.bits == 4:
        nibbles = (codes & 15).reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
        words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=-1).view(np.int32)
    granularity = PerGroup(case.group) if case.group else PerChannel()
    zero_point = weight_zero is not None
    spec = QuantSpec(FORMATS[f"int{case.bits}"], granularity, scale_rule=AbsMax(), zero_point=zero_point)
    arrays = [words, scales, *([] if weight_zero is None else [weight_zero.astype(np.int8)])]
    words, *small_arrays = (jnp.asarray(a if case.order == "nk" else np.swapaxes(a, -1, -2)) for a in arrays)
    layout = Layout((((case.k, "k"),), ((case.n, "n"),)))
    order: Any = case.order
    w = QTensor(words, Scales(*small_arrays), spec, layout, jnp.dtype("bfloat16"), order)
    x = generator.integers(-128, 128, (*experts, case.m, case.k))
    scale = (generator.random((*experts, case.m, 1)) + 0.1).astype(np.float32)
    zero = generator.integers(-128, 128, scale.shape).astype(np.float32) if "x" in case.zeros else None

    run = jax.jit(integer_product(case.kernel, dry), static_argnums=5)
    layer = None if case.layer is None else jnp.int32(case.layer)
    operands = (jnp.asarray(x, jnp.int8), jnp.asarray(scale), None if zero is None else jnp.asarray(zero), w, layer)
    got, again = (np.asarray(run(*operands, case.dtype)) for _ in range(2))

    def picked(a: Any) -> Any:
        return a if case.layer is None else a[case.layer]

    centred, want = x - (0 if zero is None else zero.astype(np.int64)), np.zeros((*experts, case.m, case.n), np.float32)
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, case.k))
        weights = picked(codes)[..., part] - (0 if weight_zero is None else picked(weight_zero)[..., g : g + 1])
        exact = centred[..., part].astype(np.float64) @ np.swapaxes(weights, -1, -2).astype(np.float64)
        want = want + exact.astype(np.float32) * picked(scales)[..., None, :, g]
    want = (want * scale).astype(got.dtype)
    bits = f"u{got.itemsize}"
    wrong = int((got.view(bits) != want.view(bits)).sum())
    return {
        "right": wrong == 0,
        "same_again": bool((got.view(bits) == again.view(bits)).all()),
        "wrong": wrong,
        "elements": got.size,
        "seed": seed,
    }
