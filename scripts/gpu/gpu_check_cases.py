"""What `scripts/gpu_check` checks and times, as tables, and the list of tasks in the order of their importance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

WIDTHS = {
    "8B qkv": (4096, 6144),
    "8B out": (4096, 4096),
    "8B gate, up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B qkv": (8192, 10240),
    "70B out": (8192, 8192),
    "70B gate, up": (8192, 57344),
    "70B down": (28672, 8192),
}
"""K and N of the products of a layer of Llama 3."""

ROWS = (1, 4, 16, 64, 256, 2048, 8192)

WEIGHTS: dict[str, tuple[str, int | None]] = {"int4 g128": ("int4", 128), "int8 channel": ("int8", None)}

INTEGERS: dict[str, tuple[str, int | None]] = {"w8a8 channel": ("int8", None), "w4a8 g128": ("int4", 128)}


@dataclasses.dataclass(frozen=True)
class Check:
    """A product to check; `stack` counts experts, `layer` picks one of three."""

    kernel: str
    format: str
    group: int | None
    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    zero_point: bool = False
    stack: int | None = None
    layer: int | None = None
    order: str = "nk"


CHECKS = (
    Check("mosaic", "int4", 128, 1, 4096, 1024),
    Check("mosaic", "int4", 128, 16, 4096, 4096),
    Check("mosaic", "int4", 128, 512, 4096, 1024),
    Check("mosaic", "int8", None, 16, 4096, 1024),
    Check("mosaic", "int8", None, 300, 2048, 1024),
    Check("mosaic", "int4", 64, 64, 4096, 1024, layer=1),
    Check("mosaic", "int4", 32, 7, 1024, 192, zero_point=True),
    Check("mosaic", "int4", None, 33, 4032, 320),
    Check("mosaic", "int4", 128, 16, 4096, 1024, dtype="float32"),
    Check("mosaic", "int8", 128, 5, 2048, 448, zero_point=True, stack=3, layer=-1),
    Check("mosaic", "int4", 96, 100, 960, 64, dtype="float16"),
    Check("mosaic", "int8", 32, 130, 1088, 704, dtype="float32", zero_point=True),
    Check("mosaic", "int4", 128, 1000, 1152, 960, zero_point=True),
    Check("triton", "int4", 128, 16, 4096, 1024, order="kn"),
    Check("triton", "int8", None, 300, 1000, 130, order="kn", zero_point=True),
    Check("triton", "int4", 32, 3, 200, 70, dtype="float32", layer=1),
)


@dataclasses.dataclass(frozen=True)
class IntegerCheck:
    """A product of integers to check: `zeros` says which of x and w have zero points; else as `Check`."""

    kernel: str
    bits: int
    group: int | None
    m: int
    k: int
    n: int
    zeros: str = "x"
    dtype: str = "bfloat16"
    stack: int | None = None
    layer: int | None = None
    order: str = "nk"


INTEGER_CHECKS = (
    IntegerCheck("mosaic", 8, None, 1, 4096, 1024),
    IntegerCheck("mosaic", 8, None, 2048, 4096, 1024),
    IntegerCheck("mosaic", 4, 128, 16, 4096, 1024),
    IntegerCheck("mosaic", 4, None, 300, 4096, 1024, zeros=""),
    IntegerCheck("triton", 8, None, 300, 1000, 130, zeros="xw", order="kn"),
    IntegerCheck("mosaic", 8, 64, 100, 1088, 448, zeros="xw", dtype="float32"),
    IntegerCheck("mosaic", 4, 64, 130, 4032, 320, zeros="xw", stack=3, layer=-1),
    IntegerCheck("mosaic", 4, 128, 1000, 1152, 960, zeros="w", dtype="float16"),
    IntegerCheck("triton", 4, 32, 7, 1000, 130, zeros="xw", layer=1, order="kn"),
    IntegerCheck("triton", 4, 128, 64, 4096, 1024),
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to check; `what` is "gated", "bias, residual", "joint", "transposed" or "product"."""

    what: str
    kernel: str
    format: str
    group: int | None
    m: int
    k: int
    n: int
    zero_point: bool = False
    dtype: str = "bfloat16"


PROGRAMS = (
    Program("gated", "mosaic", "int4", 128, 16, 4096, 14336),
    Program("gated", "mosaic", "int4", 128, 700, 4096, 2048),
    Program("bias, residual", "mosaic", "int4", 128, 300, 2048, 1024),
    Program("joint", "mosaic", "int4", 128, 16, 4096, 4096),
    Program("product", "mosaic", "nf4", 64, 16, 4096, 1024),
    Program("transposed", "triton", "nf4", 64, 300, 1024, 2048),
    Program("gated", "mosaic", "int8", None, 100, 2048, 1024, zero_point=True),
    Program("bias, residual", "mosaic", "int8", None, 40, 1024, 320, dtype="float32"),
    Program("joint", "mosaic", "int8", None, 300, 1024, 512, zero_point=True),
    Program("product", "mosaic", "fp8_e4m3", 128, 16, 4096, 1024),
    Program("product", "triton", "nf4", 64, 300, 1024, 200),
    Program("transposed", "triton", "int4", 64, 5, 200, 130, zero_point=True, dtype="float32"),
    Program("gated", "triton", "int4", 64, 70, 1024, 130),
)

TIMED = {"NF4 g64": 2.5, "gated pair, int4 g128": 2.5}
"""Programs of `time_program`, and how many times as fast as bfloat16 each should be with few rows of x."""


def tasks_of() -> list[dict[str, Any]]:
    """All of them, the most important first, with the seconds that each may take."""
    found: list[tuple[str, float, dict[str, Any]]] = [("info", 90, {})]
    found += [("check", 60, dataclasses.asdict(case)) for case in CHECKS[:5]]
    found.append(("copy", 60, {}))
    both = list(WEIGHTS)
    import gpu_check_attention as attending
    from gpu_check_fp8 import FP8_CHECKS
    from gpu_check_fused import FUSED_CHECKS

    of_fused = [("fused", 60, dataclasses.asdict(case)) for case in FUSED_CHECKS]
    of_fp8 = [("fp8", 60, dataclasses.asdict(case)) for case in FP8_CHECKS]
    of_attention, of_experts = (
        [(do, 60, dataclasses.asdict(case)) for case in cases]
        for do, cases in (("attention", attending.ATTENTION_CHECKS), ("experts", attending.EXPERT_CHECKS))
    )

    def timed(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time", 90, {"k": k, "n": n, "m": m, "weights": both}))

    def timed_integers(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time_integers", 90, {"k": k, "n": n, "m": m}))

    def timed_fp8(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time_fp8", 90, {"k": k, "n": n, "m": m}))

    def swept(names: Sequence[str], rows: Sequence[int], most: int) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("sweep", 120, {"k": k, "n": n, "m": m, "weight": "int4 g128", "most": most}))

    timed(["70B out", "8B gate, up"], (1, 16, 2048))
    found += [("check", 60, dataclasses.asdict(case)) for case in CHECKS[5:]]
    found += [("integers", 60, dataclasses.asdict(case)) for case in INTEGER_CHECKS[:5]]
    timed_integers(["8B gate, up", "8B out"], (2048, 16))
    found += of_fp8[:5]
    timed_fp8(["8B gate, up", "8B out"], (2048, 16))
    found += [("program", 60, dataclasses.asdict(case)) for case in PROGRAMS[:6]]
    found += [*of_fused[:4], *(("time_mlp", 90, {"k": 4096, "n": 14336, "m": m}) for m in (2048, 16))]
    for m in (16, 1, 2048):
        found += [("time_program", 90, {"what": what, "k": 4096, "n": 14336, "m": m}) for what in TIMED]
    found += [*of_attention[:3], *of_experts[:1]]
    found += [("time_attention", 90, {"filled": filled}) for filled in attending.FILLED]
    swept(["70B out"], (16, 2048), 8)
    found += [("program", 60, dataclasses.asdict(case)) for case in PROGRAMS[6:]]
    found += [*of_attention[3:], *of_experts[1:]]
    timed(["70B out", "8B gate, up"], (64, 256, 8192, 4))
    timed(["70B down", "8B down"], (16, 2048, 1))
    swept(["70B down", "8B gate, up"], (16, 256, 2048), 6)
    found += [("integers", 60, dataclasses.asdict(case)) for case in INTEGER_CHECKS[5:]]
    timed_integers(["8B down", "8B qkv"], (2048, 16))
    found += [*of_fp8[5:], *of_fused[4:]]
    timed_fp8(["8B down", "8B qkv"], (2048, 16))
    timed_integers(["8B gate, up", "8B out", "8B down", "8B qkv"], (8192, 1, 256))
    timed_fp8(["8B gate, up", "8B out", "8B down", "8B qkv"], (8192, 1, 256))
    timed(["8B out", "70B gate, up", "70B qkv", "8B qkv"], (1, 16, 2048))
    timed(["70B down", "8B down"], (64, 256, 8192, 4))
    swept(["8B out", "8B down", "70B gate, up"], (16, 256, 2048), 5)
    timed(["8B out", "70B gate, up", "70B qkv", "8B qkv"], (64, 256, 4, 8192))
    found += [
        ("model", 90, {"recipe": recipe, "seconds": 40.0}) for recipe in ("int4 g128", "bfloat16", "w8a8", "w8a8 fp8")
    ]
    found.append(("exported", 90, {}))
    return [{"id": i, "do": do, "limit": limit, "options": options} for i, (do, limit, options) in enumerate(found)]
