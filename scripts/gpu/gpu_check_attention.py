"""What `scripts/gpu_check` does about attention on packed caches, and about experts.

* `attention`, `experts`: the kernel against float64, on new random operands each time.
* `time_attention`: a decode step's attention at 8192 positions, of 8 sequences with 32 heads that share 8 heads of the
  caches, 128 values each, beside the same on bfloat16 caches by XLA. Goal: 1.6 times as fast.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class AttentionCheck:
    """Attention to check, of 2 sequences on caches with 4 heads.

    Attributes:
        format, zero_point: of keys and values.
        queries: of a sequence; each sees a position more than the one before.
        shared: heads of the queries that share one of the caches.
        t: positions; the second sequence has seen a third of them.
        d: values of a vector.
        dtype: of queries, probabilities and results.
        layer: which one of three caches in a stack, or None.
    """

    format: str
    queries: int
    shared: int
    t: int
    d: int
    zero_point: bool = False
    dtype: str = "bfloat16"
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class ExpertCheck:
    """A product of rows sorted by expert to check; `layer` picks one of three."""

    format: str
    group: int | None
    m: int
    experts: int
    k: int
    n: int
    dtype: str = "bfloat16"
    zero_point: bool = False
    layer: int | None = None
    order: str = "kn"
    transpose: bool = False


ATTENTION_CHECKS = (
    AttentionCheck("int8", 1, 4, 8192, 128),
    AttentionCheck("int4", 1, 4, 8192, 128),
    AttentionCheck("int4", 1, 1, 1000, 64, zero_point=True),
    AttentionCheck("int8", 300, 2, 700, 128),
    AttentionCheck("int4", 3, 1, 500, 80, zero_point=True, dtype="float32", layer=1),
    AttentionCheck("int8", 20, 2, 600, 256, zero_point=True, dtype="float16"),
)
EXPERT_CHECKS = (
    ExpertCheck("int4", 128, 16, 8, 4096, 1024),
    ExpertCheck("int8", None, 700, 8, 2048, 512, order="nk", zero_point=True),
    ExpertCheck("int4", 32, 50, 5, 192, 70, dtype="float32", layer=-1),
    ExpertCheck("nf4", 64, 300, 4, 512, 384, transpose=True),
)
FILLED = (8192, 1024)
"""Positions that a sequence has seen, of 8192, in `time_attention`."""


def _generator() -> Any:
    import numpy as np

    return np.random.default_rng(int.from_bytes(os.urandom(4), "little"))


def _result(got: Any, again: Any, want: Any, bound: Any, eps: float) -> dict[str, Any]:
    import numpy as np

    error = np.abs(got - want)
    largest, relative = float((error / bound).max()), float(np.linalg.norm(error) / np.linalg.norm(want))
    return {
        "right": bool(np.isfinite(got).all() and largest < 1),
        "same_again": bool((got == again).all()),
        "largest": largest,
        "relative": relative,
        "eps": eps,
    }


def _attention_spec(d: int, dtype: Any) -> Any:
    """Of q (B, H, M, D) and caches (B, T, H, D), with a mask (B, 1, M, T)."""
    import jax.numpy as jnp

    from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec
    from qjax.pallas_kernels.ops.cache_attention.reference import CacheDot as Dot

    heads, dtype = ((0, 1), (0, 2)), jnp.dtype(dtype)
    scores, result = (Dot((((3,), (axis,)), heads), 1, None, dtype) for axis in (3, 1))
    steps: Any = (("multiply", d**-0.5), ("cast", jnp.dtype("float32")), ("mask", float("-inf")))
    return AttentionSpec(scores, (0, 1, 2, 3), steps, dtype, result)


def _value(cache: Any) -> Any:
    """The float value of an int4 or int8 cache whose vectors lie along the last axis, in float64, from its bytes."""
    import numpy as np

    codes = np.asarray(cache.codes).astype(np.int64)
    if cache.spec.format.bits == 4:
        codes = ((codes[..., None] >> (4 * np.arange(8))) & 15).reshape(*codes.shape[:-1], -1)[..., : cache.size]
        codes -= 16 * (codes >= 8)
    zero = 0 if cache.zero is None else np.asarray(cache.zero, np.float64)[..., None]
    return (codes - zero) * np.asarray(cache.scale, np.float64)[..., None]


def attention(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of attention on packed caches: the largest as part of its bound, and the relative one of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.numbers.formats import FORMATS
    from qjax.pallas_kernels.ops.cache_attention import triton as cache_attention_triton
    from qjax.pallas_kernels.packed import qcache

    case, generator = AttentionCheck(**fields), _generator()
    if dry:
        case = dataclasses.replace(case, t=min(case.t, 70), queries=min(case.queries, 5))
    lead, heads, m = () if case.layer is None else (3,), 4, case.queries * case.shared
    spec = qcache.CacheSpec(FORMATS[case.format], case.zero_point)

    def normal(*shape: int) -> Any:
        return jnp.asarray(0.3 + generator.standard_normal(shape), case.dtype)

    pack = jax.jit(lambda a: qcache.quantize(a, spec, -1))
    keys, values = (pack(normal(*lead, 2, case.t, heads, case.d)) for _ in range(2))
    q = normal(2, heads, m, case.d)
    last = np.asarray([case.t - 1, case.t // 3 + case.queries])[:, None] - np.arange(case.queries)[::-1]
    mask = np.arange(case.t) <= np.repeat(last, case.shared, axis=1)[:, None, :, None]
    layers = None if case.layer is None else (jnp.int32(case.layer),) * 2
    attend = functools.partial(
        cache_attention_triton.attention, spec=_attention_spec(case.d, q.dtype), layers=layers, interpret=dry
    )
    run = jax.jit(attend)
    got, again = (np.asarray(run(q, keys, values, jnp.asarray(mask)), np.float64) for _ in range(2))
    exact = [_value(cache) for cache in (keys, values)]
    of_keys, of_values = exact if case.layer is None else [a[case.layer] for a in exact]
    scores = np.einsum("bhmd,bthd->bhmt", np.asarray(q, np.float64), of_keys) * case.d**-0.5
    scores = np.where(mask, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want, size = (np.einsum("bhmt,bthd->bhmd", p, a) for a in (of_values, np.abs(of_values)))
    eps = float(jnp.finfo(q.dtype).eps)
    return _result(got, again, want, eps * (size + np.abs(want)) + 2e-4 * size, eps)


def experts(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of rows sorted by expert, of weights that XLA dequantizes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.backends import gpu_operands
    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
    from qjax.pallas_kernels.ops.ragged_matmul import triton as ragged_matmul_triton
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import quantize

    case, generator = ExpertCheck(**fields), _generator()
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 40), k=min(case.k, 192), n=min(case.n, 70))
    granularity = PerGroup(case.group) if case.group else PerChannel()
    spec = QuantSpec(FORMATS[case.format], granularity, scale_rule=AbsMax(), zero_point=case.zero_point)
    layout = Layout((((case.experts, "stack"),), ((case.k, "k"),), ((case.n, "n"),)))
    lead = () if case.layer is None else (3,)
    order: Any = case.order
    floats = generator.standard_normal((*lead, case.experts, case.k, case.n)) / case.k**0.5
    w = jax.jit(lambda a: quantize(a, spec, layout, order))(jnp.asarray(floats, case.dtype))
    x = jnp.asarray(generator.standard_normal((case.m, case.n if case.transpose else case.k)), case.dtype)
    sizes = generator.multinomial(case.m - 3, generator.dirichlet(np.ones(case.experts)))  # 3 rows are of no expert
    how: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": case.transpose}
    if reason := matmul_triton.unsupported(x, w, (), x.dtype, transpose=case.transpose):
        raise RuntimeError(f"the kernel does not take this: {reason}")
    run = jax.jit(functools.partial(ragged_matmul_triton.matmul, layer=case.layer, interpret=dry, **how))
    got, again = (np.asarray(run(x, w, jnp.asarray(sizes, jnp.int32)), np.float64) for _ in range(2))
    matrices = np.asarray(w.matrix().astype(jnp.float32), np.float64)
    matrices = matrices if case.layer is None else matrices[case.layer]
    matrices = matrices.swapaxes(1, 2) if case.transpose else matrices
    exact, expert = np.asarray(x, np.float64), np.repeat(np.arange(case.experts), sizes)
    want, size = np.zeros(got.shape), np.zeros(got.shape)
    for row, own in enumerate(expert):
        want[row], size[row] = exact[row] @ matrices[own], np.abs(exact[row]) @ np.abs(matrices[own])
    eps = float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (w.dtype,))).eps)
    return _result(got, again, want, 2 * eps * size + float(jnp.finfo(x.dtype).eps) * np.abs(want) + 1e-30, eps)


def time_attention(dry: bool, filled: int, medians: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """Seconds of a decode step's attention, on caches of bfloat16 by XLA and on packed ones by the kernel.

    Args:
        dry: on the CPU, with small shapes.
        filled: positions that each sequence has seen.
        medians: `gpu_check.medians`.
    """
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels.numbers.formats import FORMATS
    from qjax.pallas_kernels.ops.cache_attention import triton as cache_attention_triton
    from qjax.pallas_kernels.packed import qcache

    b, t, heads, shared, d = (1, 64, 2, 4, 32) if dry else (8, 8192, 8, 4, 128)
    filled = min(filled, t)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 3)
    floats = [jax.random.normal(key, (b, t, heads, d), jnp.bfloat16) for key in keys[:2]]
    q = jax.random.normal(keys[2], (b, heads, shared, d), jnp.bfloat16)
    spec = _attention_spec(d, q.dtype)

    def seen(last: Any) -> Any:
        return (jnp.arange(t) < last)[None, None, None]

    def by_xla(q: Any, keys: Any, values: Any, last: Any) -> Any:
        scores = jnp.einsum("bhmd,bthd->bhmt", q, keys) * d**-0.5
        p = jax.nn.softmax(jnp.where(seen(last), scores.astype(jnp.float32), -jnp.inf))
        return jnp.einsum("bhmt,bthd->bhmd", p.astype(q.dtype), values)

    def by_kernel(q: Any, keys: Any, values: Any, last: Any) -> Any:
        return cache_attention_triton.attention(q, keys, values, seen(last), spec, interpret=dry)

    last = jnp.int32(filled)
    programs: dict[str, Callable[[], Any]] = {
        "bfloat16": functools.partial(jax.jit(by_xla), q, *floats, last),
    }
    sizes, errors = {"bfloat16": sum(a.nbytes for a in floats)}, {}
    for name in ("int8", "int4"):
        pack = jax.jit(lambda a, name=name: qcache.quantize(a, qcache.CacheSpec(FORMATS[name]), -1))
        packed = [pack(a) for a in floats]
        program = functools.partial(jax.jit(by_kernel), q, *packed, last)
        try:
            jax.block_until_ready(program())
            programs[name], sizes[name] = program, sum(cache.nbytes for cache in packed)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    return {"filled": filled, "t": t, "seconds": medians(programs, dry), "bytes": sizes, "errors": errors}


def page(record_of: Callable[[str], Sequence[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown, from the results of each kind of task."""
    lines, checks = [], [(kind, entry) for kind in ("attention", "experts") for entry in record_of(kind)]
    if checks:
        lines += ["", "## Packed caches and experts", "", "Against float64; errors in eps of the operands' type.", ""]
        lines += ["| kernel | result | largest / bound | all, relative | same bits again |", "|---|---|---|---|---|"]
    for kind, entry in checks:
        r, options = entry["result"], entry["options"]
        what = ", ".join(f"{name} {value}" for name, value in options.items() if value not in (None, False))
        right, again = "right" if r["right"] else "**wrong**", "yes" if r["same_again"] else "**no**"
        lines.append(
            f"| {kind}: {what} | {right} | {r['largest']:.3f} | {r['relative'] / r['eps']:.2f} eps | {again} |"
        )
    times = [entry["result"] for entry in record_of("time_attention")]
    if times:
        lines += [
            "",
            "Attention of a decode step, 8 sequences, 32 heads that share 8, 128 values each: microseconds, bytes of "
            "what the sequences have seen a second, and times as fast as XLA on bfloat16 (goal: 1.6 with all seen).",
            "",
            "| seen | of | bfloat16, XLA | TB/s | int8 | TB/s | speed | int4 | TB/s | speed |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for r in times:
        cells, base = [str(r["filled"]), str(r["t"])], r["seconds"]["bfloat16"]
        for name in ("bfloat16", "int8", "int4"):
            s = r["seconds"].get(name)
            rate = "" if s is None else f"{r['bytes'][name] * r['filled'] / r['t'] / s / 1e12:.2f}"
            cells += ["failed" if s is None else f"{1e6 * s:.1f}", rate]
            cells += [] if name == "bfloat16" else ["" if s is None else f"{base / s:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
