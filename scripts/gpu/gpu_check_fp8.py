"""What `scripts/gpu_check` does about products of 8-bit floats (`pallas_kernels.ops.fp8_matmul`), most of them XLA's.

* `fp8`: a product of random codes against float64. Hopper adds up in about 14 bits, so that errors of sums are up to
  2 % (arXiv 2412.19437, section 3.3.2); more than that is wrong.
* `time_fp8`: products of the layers of Llama 3 8B beside `jnp.dot` of bfloat16, of weights that are arrays of their own
  and of such that are layers of one, and what it takes to round their inputs. Goal: with 2048 rows and more, 1.7 times
  as fast as bfloat16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

WRONG = 0.02


@dataclasses.dataclass(frozen=True)
class Fp8Check:
    """A product to check; `layer` picks one of three, in `target_chip`."""

    m: int
    k: int
    n: int
    x: str = "e4m3"
    w: str = "e4m3"
    order: str = "nk"
    precision: str = "default"
    stack: int | None = None
    layer: int | None = None


FP8_CHECKS = (
    Fp8Check(1, 4096, 4096),
    Fp8Check(16, 4096, 1024),
    Fp8Check(2048, 4096, 1024),
    Fp8Check(2048, 4096, 1024, precision="highest"),
    Fp8Check(16, 4096, 1024, layer=1),
    Fp8Check(300, 4096, 1024, layer=-1),
    Fp8Check(300, 1000, 130, order="kn"),
    Fp8Check(100, 1024, 512, x="e5m2"),
    Fp8Check(100, 1024, 512, x="e5m2", w="e5m2"),
    Fp8Check(70, 1024, 512, stack=3),
)


def _weight(format: str, lead: tuple[int, ...], k: int, n: int, order: Any = "nk") -> Any:
    """Normal codes, and scales about those of a trained model."""
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, QuantSpec
    from qjax.pallas_kernels.numbers.stored_scales import Scales
    from qjax.pallas_kernels.packed.layout import Layout
    from qjax.pallas_kernels.packed.qtensor import QTensor

    spec = QuantSpec(FORMATS[f"fp8_{format}"], PerChannel(), scale_rule=AbsMax())
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")))
    sizes = (k, n) if order == "kn" else (n, k)

    @jax.jit
    def words(key: Any) -> Any:
        codes = jnp.clip(100 * jax.random.normal(key, (*lead, *sizes)), -448, 448).astype(spec.format.dtype)
        return jax.lax.bitcast_convert_type(codes, jnp.int8)

    scales = 2e-4 * jax.random.uniform(keys[1], (*lead, *(1 if a == k else a for a in sizes)), minval=0.5, maxval=1.5)
    layout = Layout((((k, "k"),), ((n, "n"),)))
    return QTensor(words(keys[0]), Scales(scales), spec, layout, jnp.dtype("bfloat16"), order)


def _target() -> contextlib.AbstractContextManager[Any]:
    """`target_chip` of this GPU, if there are kernels for it."""
    import jax

    from qjax.pallas_kernels.chips.gpu import CHIPS, target_chip

    kind = jax.devices()[0].device_kind
    name = next((name for name, chip in CHIPS.items() if kind.startswith(chip.kind)), None)
    return contextlib.nullcontext() if name is None else target_chip(name)


def fp8(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of codes: the largest as part of a bound, and the relative one of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
    from qjax.pallas_kernels.numbers.activations import quantize
    from qjax.pallas_kernels.numbers.formats import FORMATS
    from qjax.pallas_kernels.ops.fp8_matmul.api import fp8_matmul

    case = Fp8Check(**fields)
    if dry:
        case = dataclasses.replace(case, m=min(case.m, 9), k=min(case.k, 192), n=min(case.n, 64))
    experts = () if case.stack is None else (case.stack,)
    w = _weight(case.w, experts if case.layer is None else (3, *experts), case.k, case.n, case.order)
    key = jax.random.key(int.from_bytes(os.urandom(3), "little"))
    spec = ActSpec(FORMATS[f"fp8_{case.x}"])
    x = quantize(jax.random.normal(key, (*experts, case.m, case.k)), spec, (len(experts) + 1,))
    codes = jax.lax.bitcast_convert_type(x.codes, jnp.dtype(spec.format.dtype))
    how: dict[str, Any] = {"layer": case.layer, "precision": getattr(jax.lax.Precision, case.precision.upper())}
    with contextlib.nullcontext() if case.layer is None or dry else _target():
        run = jax.jit(functools.partial(fp8_matmul, **how))
        got, again = (np.asarray(run(codes, x.scale, w), np.float64) for _ in range(2))
    words, scales = (np.asarray(a) for a in jax.tree.leaves(w.matrix_arrays()))
    weights = words.view(np.dtype(w.spec.format.dtype)).astype(np.float64) * scales
    weights = weights if case.layer is None else weights[case.layer]
    exact = np.asarray(codes).astype(np.float64) * np.asarray(x.scale, np.float64)
    want, size = exact @ weights, np.abs(exact) @ np.abs(weights)
    error = np.abs(got - want)
    largest, relative = float((error / (WRONG * size / 2)).max()), float(np.linalg.norm(error) / np.linalg.norm(want))
    return {
        "right": bool(np.isfinite(got).all() and largest < 1 and relative < WRONG),
        "same_again": bool((got == again).all()),
        "largest": largest,
        "relative": relative,
        "eps": 2.0**-13,  # what 14 bits hold
    }


def time_fp8(
    dry: bool, k: int, n: int, m: int, medians: Callable[..., Any], copies: Callable[..., int]
) -> dict[str, Any]:
    """Seconds of a product, of one of bfloat16, and of rounding the input of one.

    Args:
        dry: on the CPU, with small shapes.
        k, n, m: the sizes.
        medians: `gpu_check.medians`.
        copies: `gpu_check.copies_of`.
    """
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
    from qjax.pallas_kernels.numbers.activations import quantize
    from qjax.pallas_kernels.numbers.formats import FORMATS
    from qjax.pallas_kernels.ops.fp8_matmul.api import fp8_matmul

    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 2)
    xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in jax.random.split(keys[0], 2)]
    number = {"bfloat16": copies(k, n, 16), "rounding": len(xs), "fp8": copies(k, n, 8), "fp8, layers": copies(k, n, 8)}
    floats = [
        0.02 * jax.random.normal(key, (k, n), jnp.bfloat16) for key in jax.random.split(keys[1], number["bfloat16"])
    ]
    spec = ActSpec(FORMATS["fp8_e4m3"])

    def rounded(x: Any) -> tuple[Any, Any]:
        found = quantize(x, spec, (1,))
        return jax.lax.bitcast_convert_type(found.codes, jnp.float8_e4m3fn), found.scale

    x, weights = jax.jit(rounded)(xs[0]), [_weight("e4m3", (), k, n) for _ in range(number["fp8"])]

    def one(x: Any, w: Any, layer: Any = None) -> Any:
        codes, scale = x
        return fp8_matmul(codes, scale, w, layer=layer, out_dtype=jnp.bfloat16)

    def each(x: Any, w: Any) -> list[Any]:
        return [one(x, w, jnp.int32(i)) for i in range(number["fp8, layers"])]

    programs: dict[str, Callable[[], Any]] = {
        "bfloat16": functools.partial(jax.jit(lambda x, ws: [jnp.dot(x, w) for w in ws]), xs[0], floats),
        "rounding": functools.partial(jax.jit(lambda xs: [rounded(x) for x in xs]), xs),
        "fp8": functools.partial(jax.jit(lambda x, ws: [one(x, w) for w in ws]), x, weights),
    }
    errors: dict[str, str] = {}
    with contextlib.nullcontext() if dry else _target():
        program = functools.partial(jax.jit(each), x, _weight("e4m3", (number["fp8, layers"],), k, n))
        try:
            jax.block_until_ready(program())
            programs["fp8, layers"] = program
        except Exception as error:
            errors["fp8, layers"] = f"{type(error).__name__}: {error}"[:500]
        seconds = medians(programs, dry)
    return {"k": k, "n": n, "m": m, "seconds": {a: s / number[a] for a, s in seconds.items()}, "errors": errors}


def page(record_of: Callable[[str], Sequence[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown, from the results of each kind of task."""
    lines, checks = [], record_of("fp8")
    if checks:
        text = (
            "Against float64, by XLA, or by a kernel where few rows are multiplied by a layer of a stack. Hopper adds "
            "up in about 14 bits."
        )
        lines += ["", "## 8-bit floats times 8-bit floats", "", text]
        lines += ["", "| product | result | error of all | same bits again |", "|---|---|--:|---|"]
    for entry in checks:
        r, options = entry["result"], entry["options"]
        what = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
        right, again = "right" if r["right"] else "**wrong**", "yes" if r["same_again"] else "**no**"
        lines.append(f"| {what} | {right} | {r['relative']:.3%} | {again} |")
    times = sorted((entry["result"] for entry in record_of("time_fp8")), key=lambda r: (r["m"], r["n"]))
    if times:
        text = (
            "Microseconds, and times as fast as `jnp.dot` of bfloat16 (goal: 1.7 with 2048 rows and more); of the "
            "rounding of an input of bfloat16, which comes before."
        )
        lines += ["", text, "", "| rows | K x N | bfloat16 | rounding | fp8 | speed | layer of a stack | speed |"]
        lines.append("|--:|---|--:|--:|--:|--:|--:|--:|")
    for r in times:
        base = r["seconds"]["bfloat16"]
        cells = [str(r["m"]), f"{r['k']} x {r['n']}", f"{1e6 * base:.1f}", f"{1e6 * r['seconds']['rounding']:.1f}"]
        for name in ("fp8", "fp8, layers"):
            s = r["seconds"].get(name)
            cells += ["failed", ""] if s is None else [f"{1e6 * s:.1f}", f"{base / s:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
