"""The process that carries out tasks of `scripts/gpu_check`: a line of JSON before and after each."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from gpu_check_products import check, integers, program, refuse, runs
from gpu_check_timing import (
    copies_of,
    copy,
    medians,
    random_weight,
    small,
    sweep,
    time_integers,
    time_layer,
    time_program,
)

try:
    import jaxtyping  # noqa: F401
except ModuleNotFoundError:  # annotations only, none of which is evaluated
    stub: Any = types.ModuleType("jaxtyping")
    stub.__getattr__ = lambda name: Any
    sys.modules["jaxtyping"] = stub


def attention(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of attention on packed caches: `gpu_check_attention.attention`."""
    import gpu_check_attention

    return gpu_check_attention.attention(dry, **fields)


def experts(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of rows sorted by expert: `gpu_check_attention.experts`."""
    import gpu_check_attention

    return gpu_check_attention.experts(dry, **fields)


def time_attention(dry: bool, filled: int) -> dict[str, Any]:
    """Seconds of attention on packed caches: `gpu_check_attention.time_attention`."""
    import gpu_check_attention

    return gpu_check_attention.time_attention(dry, filled, medians)


def fp8(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of 8-bit floats: `gpu_check_fp8.fp8`."""
    import gpu_check_fp8

    return gpu_check_fp8.fp8(dry, **fields)


def time_fp8(dry: bool, k: int, n: int, m: int) -> dict[str, Any]:
    """Seconds of a product of 8-bit floats: `gpu_check_fp8.time_fp8`."""
    import gpu_check_fp8

    return gpu_check_fp8.time_fp8(dry, *small(k, n, m, dry), medians, copies_of)


def fused(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product of integers with an epilogue: `gpu_check_fused.fused`."""
    import gpu_check_fused

    return gpu_check_fused.fused(dry, refuse, runs, **fields)


def time_mlp(dry: bool, k: int, n: int, m: int) -> dict[str, Any]:
    """Seconds of an MLP with static ranges: `gpu_check_fused.time_mlp`."""
    import gpu_check_fused

    return gpu_check_fused.time_mlp(dry, *small(k, n, m, dry), medians, random_weight)


def info(dry: bool) -> dict[str, Any]:
    """The device and the versions."""
    import jax

    device = jax.devices()[0]
    if not dry and device.platform != "gpu":
        raise RuntimeError(f"JAX has no GPU here, but {device}")
    return {
        "device": device.device_kind,
        "capability": str(getattr(device, "compute_capability", None)),
        "processors": getattr(device, "core_count", None),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.client.platform_version,
    }


def model(dry: bool, recipe: str, seconds: float) -> dict[str, Any]:
    """Tokens a second of a whole model: `bench_decode.measure`."""
    import bench_decode

    return bench_decode.measure(recipe, dry, seconds)


def exported(dry: bool) -> dict[str, Any]:
    """Whether an exported model says the same: `bench_decode.exported`."""
    import bench_decode

    result = bench_decode.exported(dry)
    return {**result, "right": result["same_tokens"]}


DO: dict[str, Callable[..., dict[str, Any]]] = {
    "info": info,
    "copy": copy,
    "check": check,
    "time": time_layer,
    "integers": integers,
    "time_integers": time_integers,
    "sweep": sweep,
    "program": program,
    "time_program": time_program,
    "attention": attention,
    "experts": experts,
    "time_attention": time_attention,
    "fp8": fp8,
    "time_fp8": time_fp8,
    "fused": fused,
    "time_mlp": time_mlp,
    "model": model,
    "exported": exported,
}
"""By kind of task, what the worker calls with `dry` and the options."""


def worker(tasks: Sequence[dict[str, Any]], dry: bool) -> None:
    """Prints a line of JSON for each task."""
    if dry:
        os.environ.update(JAX_PLATFORMS="cpu", NPROC="64")
    for task in tasks:
        print(json.dumps({"started": task["id"]}), flush=True)
        try:
            result = DO[task["do"]](dry=dry, **task["options"])
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"id": task["id"], "result": result}), flush=True)
