"""What `scripts/gpu_check` does about products of integers and what a program makes of them in the same kernel.

* `fused`: a product, or a gated pair, with its epilogue against float64: floats, or codes of the next product's x,
  which must be the nearest ones but for rounding errors of float32.
* `time_mlp`: the MLP of Llama 3 8B with weights and static ranges of int8, between whose products nothing but codes of
  a byte is stored, beside the same kernels without epilogues and beside bfloat16.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class FusedCheck:
    """Products to check; `what` is "gated" or "bias, residual", `codes` whether the result is quantized."""

    what: str
    kernel: str
    bits: int
    group: int | None
    m: int
    k: int
    n: int
    codes: bool = False
    zero: bool = True


FUSED_CHECKS = (
    FusedCheck("gated", "mosaic", 8, None, 16, 4096, 14336, codes=True),
    FusedCheck("gated", "mosaic", 8, None, 700, 4096, 2048, codes=True, zero=False),
    FusedCheck("bias, residual", "mosaic", 8, None, 300, 2048, 1024),
    FusedCheck("gated", "triton", 8, None, 300, 2048, 1024, codes=True),
    FusedCheck("bias, residual", "mosaic", 4, 128, 64, 4096, 1024),
    FusedCheck("gated", "mosaic", 4, None, 40, 2048, 1024),
    FusedCheck("gated", "triton", 4, 128, 64, 1024, 520, codes=True),
    FusedCheck("bias, residual", "triton", 4, 32, 7, 1000, 130, codes=True),
)


def _step(primitive: Any, *operands: int, dtype: Any, **params: Any) -> Any:
    from qjax.pallas_kernels.backends.epilogue import Step

    return Step(primitive, operands, tuple(params.items()), dtype)


def _gated(first: int, dtype: Any) -> tuple[Any, ...]:
    """SiLU of product 0 times product 1; steps are numbered from `first` on."""
    from jax.extend.core import primitives as prims

    return (
        _step(prims.logistic_p, 0, dtype=dtype, accuracy=None),
        _step(prims.mul_p, 0, first, dtype=dtype),
        _step(prims.mul_p, first + 1, 1, dtype=dtype),
    )


def _modules() -> dict[str, Any]:
    from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic
    from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton

    return {"mosaic": integer_matmul_mosaic, "triton": integer_matmul_triton}


def fused(
    dry: bool, refuse: Callable[[str | None], None], runs: Callable[[str, bool], bool], **fields: Any
) -> dict[str, Any]:
    """Errors of a program: as `gpu_check.check` gives them; of codes, how far they are from the middle between two.

    Args:
        dry: on the CPU, with small shapes.
        refuse, runs: those of `gpu_check`.
        fields: of a `FusedCheck`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.extend.core import primitives as prims

    from qjax.pallas_kernels.backends.epilogue import Epilogue
    from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MinMax
    from qjax.pallas_kernels.numbers.activations import Activation
    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.ops.integer_matmul.reference import matmul as matmul_reference
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import quantize

    case = FusedCheck(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    m, k, n, pair = case.m, case.k, case.n, case.what == "gated"
    seed, f32 = int.from_bytes(os.urandom(4), "little"), jnp.dtype(jnp.float32)
    generator = np.random.default_rng(seed)
    granularity = PerGroup(case.group) if case.group else PerChannel()
    spec, layout = (
        QuantSpec(FORMATS[f"int{case.bits}"], granularity, scale_rule=AbsMax()),
        Layout((((k, "k"),), ((n, "n"),))),
    )
    order: Any = "nk" if case.kernel == "mosaic" else "kn"
    pack = jax.jit(lambda w: quantize(w, spec, layout, order))
    weights = [pack(jnp.asarray(generator.standard_normal((k, n)) / k**0.5, f32)) for _ in range(2 if pair else 1)]
    codes, scale = generator.integers(-128, 128, (m, k)), (generator.random((m, 1)) + 0.5) / 74
    zero = generator.integers(-20, 20, (m, 1)) if case.zero else None
    x = Activation(
        jnp.asarray(codes, jnp.int8), jnp.asarray(scale, f32), None if zero is None else jnp.asarray(zero, f32)
    )
    beside = [] if pair else [generator.standard_normal(shape) for shape in ((1, 1, n), (1, m, n))]
    others = [jnp.asarray(a, f32) for a in beside]
    quantized = ActSpec(FORMATS["int8"], MinMax(), "tensor", zero_point=True) if case.codes else None
    step, offset = 0.05, -7.0
    others += [jnp.full((1, 1, 1), a, f32) for a in (step, offset)] if case.codes else []
    first = len(weights) + len(others)
    steps = _gated(first, f32)
    if not pair:
        steps = (_step(prims.add_p, 0, 1, dtype=f32), _step(prims.add_p, first, 2, dtype=f32))
    epilogue = Epilogue(f32, len(weights), len(others), steps, first + len(steps) - 1, quantized)
    module = _modules()[case.kernel]
    refuse(module.unsupported(x.codes, weights[0], f32) or module.unsupported_epilogue(epilogue, weights[0]))

    @jax.jit
    def run(x: Any, weights: Any, others: Any) -> Any:
        if runs(case.kernel, dry):
            return module.fused_matmul(
                x, weights, others, layers=[None] * len(weights), epilogue=epilogue, interpret=dry
            )
        products = [matmul_reference(x.codes, x.scale, x.zero, w, layer=None, out_dtype=f32) for w in weights]
        return epilogue([a[None] for a in products], others)[0]

    got, again = (np.asarray(run(x, weights, others)) for _ in range(2))
    exact = (codes - (0 if zero is None else zero)) * np.asarray(x.scale, np.float64)
    products = [exact @ np.asarray(w.dequantize(), np.float64) for w in weights]
    if pair:
        want = products[0] / (1 + np.exp(-products[0])) * products[1]
    else:
        want = products[0] + sum(np.asarray(a, np.float64)[0] for a in others[:2])
    if case.codes:
        unrounded = np.clip(want / step + offset, -128, 127)
        error, eps = np.maximum(np.abs(got - unrounded) - 0.5, 0), 1e-3
        relative = float(error.max())
    else:
        error, eps = np.abs(got - want), 2e-5
        relative = float(np.linalg.norm(error) / np.linalg.norm(want))
    return {
        "right": bool(relative < eps and error.max() < 1e-3 * (1 + np.abs(want).max())),
        "same_again": bool((got == again).all()),
        "largest": float(error.max()),
        "relative": relative,
        "eps": eps,
        "seed": seed,
    }


def time_mlp(
    dry: bool, k: int, n: int, m: int, medians: Callable[..., Any], random_weight: Callable[..., Any]
) -> dict[str, Any]:
    """Seconds of an MLP whose input and middle are quantized with static ranges, and of one of bfloat16.

    Args:
        dry: on the CPU, with small shapes.
        k, n, m: width, width in the middle, rows of x.
        medians, random_weight: those of `gpu_check`.
    """
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels.backends.epilogue import Epilogue
    from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MinMax
    from qjax.pallas_kernels.numbers.activations import Activation
    from qjax.pallas_kernels.numbers.formats import FORMATS
    from qjax.pallas_kernels.ops.integer_matmul.reference import matmul as matmul_reference

    count, bf16 = 2 if dry else 3, jnp.dtype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 1 + count)
    x = jax.random.normal(keys[0], (m, k), bf16)
    shapes = ((k, n), (k, n), (n, k))
    floats = [[0.02 * jax.random.normal(key, shape, bf16) for shape in shapes] for key in keys[1:]]
    gates, ups, downs = (random_weight("int8", None, *shape, count) for shape in shapes)
    spec, module = ActSpec(FORMATS["int8"], MinMax(), "tensor", zero_point=True), _modules()["mosaic"]
    scales = [jnp.full((1, 1, 1), a) for a in (0.03, -3.0)]
    epilogue = Epilogue(bf16, 2, 2, _gated(4, bf16), 6, spec)

    def multiplied(x: Activation, w: Any, i: int) -> Any:
        matmul = matmul_reference if dry else module.matmul
        return matmul(x.codes, x.scale, x.zero, w, layer=jnp.int32(i), out_dtype=bf16)

    def rounded(values: Any) -> Activation:
        codes = epilogue.encoded(values.astype(jnp.float32)[None], scales)[0]
        return Activation(codes, *(jnp.broadcast_to(a[0], (m, 1)) for a in scales))

    def apart(x: Activation, i: int) -> Activation:
        return rounded(jax.nn.silu(multiplied(x, gates, i)) * multiplied(x, ups, i))

    def together(x: Activation, i: int) -> Activation:
        if dry:
            return apart(x, i)
        layers = [jnp.int32(i)] * 2
        codes = module.fused_matmul(x, [gates, ups], scales, layers=layers, epilogue=epilogue)
        return Activation(codes, *(jnp.broadcast_to(a[0], (m, 1)) for a in scales))

    def floating(x: Any) -> list[Any]:
        return [jnp.dot(jax.nn.silu(jnp.dot(x, gate)) * jnp.dot(x, up), down) for gate, up, down in floats]

    def all_of(middle: Callable[[Activation, int], Activation]) -> Callable[[], Any]:
        run = jax.jit(lambda x: [multiplied(middle(rounded(x), i), downs, i) for i in range(count)])
        return lambda: run(x)

    run = jax.jit(floating)
    programs = {"bfloat16": lambda: run(x), "products apart": all_of(apart), "w8a8 static": all_of(together)}
    seconds = {name: s / count for name, s in medians(programs, dry).items()}
    return {"k": k, "n": n, "m": m, "seconds": seconds, "errors": {}}


def page(record_of: Callable[[str], Sequence[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown, from the results of each kind of task."""
    lines, checks = [], record_of("fused")
    if checks:
        lines += ["", "## Products of integers with an epilogue", ""]
        lines += ["Against float64; of codes, by how much they are beyond the middle between two."]
        lines += ["", "| program | result | error | same bits again |", "|---|---|--:|---|"]
    for entry in checks:
        r, case = entry["result"], FusedCheck(**entry["options"])
        name = f"{case.what}{', codes' if case.codes else ''}: {case.kernel}, w{case.bits}a8 "
        name += f"{f'g{case.group}' if case.group else 'channel'}, {case.m} x {case.k} x {case.n}"
        right, again = "right" if r["right"] else "**wrong**", "yes" if r["same_again"] else "**no**"
        lines.append(f"| {name} | {right} | {r['relative']:.1e} | {again} |")
    times = sorted((entry["result"] for entry in record_of("time_mlp")), key=lambda r: r["m"])
    if times:
        names = list(times[0]["seconds"])
        lines += ["", "Microseconds of the MLP of Llama 3 8B, and times as fast as bfloat16.", ""]
        lines += ["| rows |" + "".join(f" {name} |" for name in names), "|---|" + "--:|" * len(names)]
    for r in times:
        base = r["seconds"]["bfloat16"]
        cells = [f"{1e6 * s:.1f} ({base / s:.2f}x)" for s in r["seconds"].values()]
        lines.append(f"| {r['m']} | " + " | ".join(cells) + " |")
    return lines
