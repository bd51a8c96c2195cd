"""Checks and times the kernels for NVIDIA GPUs, on one, within a time limit. `scripts/gpu_check` runs it.

What is done is a list of tasks, the most important first, and what the time is not enough for is left out and said. A
process of its own carries them out, one after the other: one that crashes, or that hangs as a kernel does whose
barriers do not match, is ended, recorded, and followed by another that goes on with the next task. Results are written
after each task, in one step.

* `check`: a product against float64, on new random operands each time, unpacked by NumPy.
* `time`: products of the layers of Llama 3 8B and 70B, in int4 and int8, beside `jnp.dot` of bfloat16.
* `sweep`: one such product in the tiles that `default_blocks` likes best. The fastest ones make a table,
  `blocks_gpu.json`, that can replace the one of `pallas_kernels`.

Times are those of many products in one program, over weights that are several times the size of the cache, so that each
product reads its weight from memory; programs take turns, and the median of their rounds is what counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import jaxtyping  # noqa: F401
except ModuleNotFoundError:  # annotations only, none of which is evaluated
    stub: Any = types.ModuleType("jaxtyping")
    stub.__getattr__ = lambda name: Any
    sys.modules["jaxtyping"] = stub

ROOT = Path(__file__).resolve().parent.parent
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
CACHE = 50e6  # bytes
ROUNDS = 5


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


# --- What the worker does -------------------------------------------------------------------------------------------


def worker(tasks: Sequence[dict[str, Any]], dry: bool) -> None:
    """Prints a line of JSON for each task."""
    if dry:
        os.environ.update(JAX_PLATFORMS="cpu", NPROC="64")
    for task in tasks:
        print(json.dumps({"started": task["id"]}), flush=True)
        try:
            result = {"info": info, "copy": copy, "check": check, "time": time_layer, "sweep": sweep}[task["do"]](
                dry=dry, **task["options"]
            )
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"id": task["id"], "result": result}), flush=True)


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


def copy(dry: bool) -> dict[str, float]:
    """Bytes a second, read and written, of adding 1 to a large array."""
    import jax
    import jax.numpy as jnp

    size = 2**14 if dry else 2**29
    add = jax.jit(lambda a: a + 1)
    seconds = medians({"add": functools.partial(add, jnp.zeros(size, jnp.int32))}, dry)["add"]
    return {"bytes_per_second": 8 * size / seconds}


def product(kernel: str, dry: bool) -> Callable[..., Any]:
    """`matmul` of a kernel as a function of x, the weight, the layer, and tiles."""
    import jax

    from pallas_kernels import matmul_mosaic_gpu, matmul_reference, matmul_triton

    options: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
    module = {"mosaic": matmul_mosaic_gpu, "triton": matmul_triton}[kernel]

    def run(x: Any, w: Any, layer: Any, blocks: Any = None) -> Any:
        reason = module.unsupported(x, w, (), x.dtype)
        if reason is not None:
            raise RuntimeError(f"the kernel does not take this: {reason}")
        if not dry:
            return module.matmul(x, w, layer=layer, blocks=blocks, **options)
        if kernel == "mosaic" and jax.__version_info__ < (0, 11):  # which does not interpret it
            return matmul_reference.matmul(x, w, layer=layer, **options)
        return module.matmul(x, w, layer=layer, blocks=blocks, interpret=True, **options)

    return run


def check(dry: bool, **fields: Any) -> dict[str, Any]:
    """Errors of a product: the largest as part of the bound of `matmul_mosaic_gpu`, and the relative one of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import gpu_operands, matmul_mosaic_gpu
    from pallas_kernels.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from pallas_kernels.qtensor import Layout, quantize

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
        "tiles": str(matmul_mosaic_gpu.default_blocks(case.m, case.k, case.n, FORMATS[case.format].bits))
        if case.kernel == "mosaic"
        else None,
    }


def random_weight(format: str, group: int | None, k: int, n: int, copies: int) -> Any:
    """A stack of weights of random words, K contiguous, and scales about those of a trained model."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
    from pallas_kernels.numerics import Scales
    from pallas_kernels.qtensor import Layout, QTensor

    scale = "bfloat16" if group else "float32"
    spec = QuantSpec(
        FORMATS[format], PerGroup(group) if group else PerChannel(), scale_dtype=scale, scale_rule=AbsMax()
    )
    bits = FORMATS[format].bits
    shape, dtype = ((copies, n, k // 8), jnp.uint32) if bits == 4 else ((copies, n, k), jnp.uint8)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")))
    signed = jnp.int32 if bits == 4 else jnp.int8
    words = jax.jit(lambda key: jax.lax.bitcast_convert_type(jax.random.bits(key, shape, dtype), signed))(keys[0])
    values = (
        0.05 / 2**bits * jax.random.uniform(keys[1], (copies, n, k // group if group else 1), minval=0.5, maxval=1.5)
    )
    layout = Layout((((k, "k"),), ((n, "n"),)))
    return QTensor(words, Scales(values.astype(scale)), spec, layout, jnp.dtype(jnp.bfloat16), "nk")


def copies_of(k: int, n: int, bits: int) -> int:
    return max(2, min(16, round(3 * CACHE / (k * n * bits / 8))))


def medians(programs: dict[str, Callable[[], Any]], dry: bool) -> dict[str, float]:
    """Seconds of each program, the median of rounds in which they take turns."""
    import jax

    repeats = {}
    for name, program in programs.items():
        jax.block_until_ready(program())
        start = time.perf_counter()
        jax.block_until_ready(program())
        repeats[name] = 1 if dry else max(1, min(200, round(0.02 / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 if dry else ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(repeats[name] - 1):
                program()
            jax.block_until_ready(program())
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def small(k: int, n: int, m: int, dry: bool) -> tuple[int, int, int]:
    return (128, 64, min(m, 16)) if dry else (k, n, m)


def packed_program(x: Any, w: Any, dry: bool, blocks: Any = None) -> Callable[[], Any]:
    """The product with each weight of the stack; the kernel is lowered once."""
    import jax
    import jax.numpy as jnp

    one = jax.jit(functools.partial(product("mosaic", dry), blocks=blocks))
    every = jax.jit(lambda x, w: [one(x, w, jnp.int32(i)) for i in range(w.words.shape[0])])
    return functools.partial(every, x, w)


def time_layer(dry: bool, k: int, n: int, m: int, weights: Sequence[str]) -> dict[str, Any]:
    """Seconds of a product with each kind of weight, and with bfloat16."""
    import jax
    import jax.numpy as jnp

    k, n, m = small(k, n, m, dry)
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 2)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    copies = copies_of(k, n, 16)
    floats = [0.02 * jax.random.normal(key, (k, n), jnp.bfloat16) for key in jax.random.split(keys[1], copies)]
    programs: dict[str, Callable[[], Any]] = {
        "bfloat16": functools.partial(jax.jit(lambda x, ws: [jnp.dot(x, w) for w in ws]), x, floats)
    }
    number, errors = {"bfloat16": copies}, {}
    for name in weights:
        format, group = WEIGHTS[name]
        number[name] = copies_of(k, n, 4 if format == "int4" else 8)
        program = packed_program(x, random_weight(format, group, k, n, number[name]), dry)
        try:
            jax.block_until_ready(program())
            programs[name] = program
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    seconds = medians(programs, dry)
    return {"k": k, "n": n, "m": m, "seconds": {a: s / number[a] for a, s in seconds.items()}, "errors": errors}


def sweep(dry: bool, k: int, n: int, m: int, weight: str, most: int) -> dict[str, Any]:
    """Seconds of a product in the tiles that should be best; those that give another result are left out."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import blocks_tpu, matmul_mosaic_gpu

    k, n, m = small(k, n, m, dry)
    format, group = WEIGHTS[weight]
    bits = 4 if format == "int4" else 8
    x = jax.random.normal(jax.random.key(int.from_bytes(os.urandom(3), "little")), (m, k), jnp.bfloat16)
    w = random_weight(format, group, k, n, copies_of(k, n, bits))
    ranked = matmul_mosaic_gpu.ranked(m, k, n, bits, out_dtype=jnp.bfloat16)
    # The best ones, and the best of each shape: the order among shapes is what is least certain.
    shapes: dict[Any, Any] = {}
    for blocks in ranked:
        shapes.setdefault((blocks.m, blocks.n, blocks.ways), blocks)
    chosen = list(dict.fromkeys([*ranked[:2], *shapes.values(), *ranked]))[: 2 if dry else most]
    programs, errors, names = {}, {}, {}
    want = None
    for blocks in chosen:
        name = json.dumps(dataclasses.asdict(blocks))
        program = packed_program(x, w, dry, blocks)
        try:
            got = np.asarray(jax.block_until_ready(program())[0], np.float64)
            want = got if want is None else want
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            if not error < 0.005:
                raise RuntimeError(f"differs from the first tiles by {error}")
            programs[name], names[name] = program, dataclasses.asdict(blocks)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    seconds = {name: s / w.words.shape[0] for name, s in medians(programs, dry).items()}
    best = min(seconds, key=lambda name: seconds[name])
    row = {"weight": blocks_tpu.weight(w.spec, k), "x": "bfloat16", "k": k, "n": n, "m": m, "blocks": names[best]}
    default = json.dumps(dataclasses.asdict(ranked[0]))
    return {"row": row, "best": seconds[best], "default": seconds.get(default), "seconds": seconds, "errors": errors}


# --- The list of tasks ----------------------------------------------------------------------------------------------


def tasks_of() -> list[dict[str, Any]]:
    """All of them, the most important first, with the seconds that each may take."""
    found: list[tuple[str, float, dict[str, Any]]] = [("info", 90, {})]
    found += [("check", 60, dataclasses.asdict(case)) for case in CHECKS[:5]]
    found.append(("copy", 60, {}))
    both = list(WEIGHTS)

    def timed(names: Sequence[str], rows: Sequence[int]) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("time", 90, {"k": k, "n": n, "m": m, "weights": both}))

    def swept(names: Sequence[str], rows: Sequence[int], most: int) -> None:
        for m in rows:
            for name in names:
                k, n = WIDTHS[name]
                found.append(("sweep", 120, {"k": k, "n": n, "m": m, "weight": "int4 g128", "most": most}))

    timed(["70B out", "8B gate, up"], (1, 16, 2048))
    found += [("check", 60, dataclasses.asdict(case)) for case in CHECKS[5:]]
    swept(["70B out"], (16, 2048), 8)
    timed(["70B out", "8B gate, up"], (64, 256, 8192, 4))
    timed(["70B down", "8B down"], (16, 2048, 1))
    swept(["70B down", "8B gate, up"], (16, 256, 2048), 6)
    timed(["8B out", "70B gate, up", "70B qkv", "8B qkv"], (1, 16, 2048))
    timed(["70B down", "8B down"], (64, 256, 8192, 4))
    swept(["8B out", "8B down", "70B gate, up"], (16, 256, 2048), 5)
    timed(["8B out", "70B gate, up", "70B qkv", "8B qkv"], (64, 256, 4, 8192))
    return [{"id": i, "do": do, "limit": limit, "options": options} for i, (do, limit, options) in enumerate(found)]


# --- The process that watches ---------------------------------------------------------------------------------------


def run_all(out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Carries out tasks until the time is up; returns what is written to `gpu.json`."""
    start = time.monotonic()
    tasks = tasks_of()
    if dry:  # one of each kind, and all checks
        kinds: dict[str, Any] = {}
        tasks = [task for task in tasks if task["do"] == "check" or kinds.setdefault(task["do"], task) is task]
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    record: dict[str, Any] = {"date": date, "dry": dry, "results": [], "left_out": len(tasks)}
    left = list(tasks)
    while left and time.monotonic() - start < seconds:
        finished = watch(left, record, out, start + seconds, dry)
        left = [task for task in left if task["id"] not in finished]
        record["left_out"] = len(left)
        write(record, out)
        if record["results"] and record["results"][0].get("result", {}).get("error"):
            break  # there is no GPU
    record["minutes"] = round((time.monotonic() - start) / 60, 1)
    write(record, out)
    return record


def watch(tasks: list[dict[str, Any]], record: dict[str, Any], out: Path, deadline: float, dry: bool) -> set[int]:
    """Runs a worker until it has done all tasks, crashes, hangs, or the time is up; returns those that need no more."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(tasks, file)
    command = [sys.executable, __file__, "--worker", file.name, *(["--dry"] if dry else [])]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    by_id, finished = {task["id"]: task for task in tasks}, set()
    current: dict[str, Any] | None = None

    def note(task: dict[str, Any], result: dict[str, Any]) -> None:
        finished.add(task["id"])
        entry = {"do": task["do"], "options": task["options"], "result": result}
        record["results"].append(entry)
        write(record, out)
        print(f"{max(0, deadline - time.monotonic()):4.0f} s left  {summary(entry)}", flush=True)

    try:
        while True:
            limit = current["limit"] if current else 120
            try:
                line = lines.get(timeout=max(0.1, min(limit, deadline - time.monotonic())))
            except queue.Empty:
                if current and time.monotonic() < deadline:
                    note(current, {"error": f"hung: not done after {limit} s"})
                elif not current:
                    note(tasks[0], {"error": "the process did not start"})
                return finished
            if line is None:
                process.wait()
                if current:
                    errors.seek(0)
                    note(current, {"error": f"crashed ({process.returncode}): {errors.read()[-600:]}"})
                return finished
            try:
                message = json.loads(line)
            except json.JSONDecodeError:  # something else that was printed
                continue
            if "started" in message:
                current = by_id[message["started"]]
            elif "id" in message:
                note(by_id[message["id"]], message["result"])
                current = None
    finally:
        process.kill()
        process.wait()
        errors.close()
        os.unlink(file.name)


def summary(entry: dict[str, Any]) -> str:
    """One line on a result."""
    options, result = entry["options"], entry["result"]
    what = " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
    if "error" in result:
        return f"{entry['do']} {what}: {result['error']}"
    if entry["do"] == "check":
        word = "right" if result["right"] else "WRONG"
        return f"{word} ({result['relative'] / result['eps']:.2f} eps, same again: {result['same_again']}) {what}"
    if entry["do"] == "time":
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"{result['m']} x {result['k']} x {result['n']}: {times} {result['errors'] or ''}"
    if entry["do"] == "sweep":
        default = "failed" if result["default"] is None else f"{1e6 * result['default']:.1f} us"
        return f"sweep {what}: {1e6 * result['best']:.1f} us, default {default}, {result['row']['blocks']}"
    return f"{entry['do']}: {json.dumps(result)}"


# --- What is written ------------------------------------------------------------------------------------------------


def write(record: dict[str, Any], out: Path) -> None:
    """`gpu.json`, `gpu.md` and `blocks_gpu.json`, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"gpu.json": json.dumps(record, indent=1) + "\n", "gpu.md": page(record)}
    if any(entry["do"] == "sweep" for entry in record["results"]):
        texts["blocks_gpu.json"] = table(record)
    for name, text in texts.items():
        temporary = out / f".{name}.new"
        temporary.write_text(text)
        os.replace(temporary, out / name)


def results(record: dict[str, Any], do: str) -> list[dict[str, Any]]:
    return [entry for entry in record["results"] if entry["do"] == do and "error" not in entry["result"]]


def table(record: dict[str, Any]) -> str:
    """The tiles that were fastest, as `pallas_kernels/blocks_gpu.json` has them."""
    from pallas_kernels.blocks_gpu import CHIPS, ROWS

    infos = results(record, "info")
    kind = infos[0]["result"]["device"] if infos else ""
    chip = next((name for name, chip in CHIPS.items() if kind.startswith(chip.kind)), kind)
    rows = []
    for entry in results(record, "sweep"):
        row, most = entry["result"]["row"], next(rows for rows in ROWS if entry["result"]["row"]["m"] <= rows)
        rows.append({"chip": chip, **row, "m": most, "microseconds": round(1e6 * entry["result"]["best"], 1)})
    note = "Written by scripts/gpu_check. m: rows of x, at most. microseconds: for that many rows, or the most timed."
    versions = f"jax {infos[0]['result']['jax']}, {record['date']}" if infos else ""
    head = f'{{\n"note": {json.dumps(note)},\n"versions": {json.dumps(versions)},\n"rows": [\n'
    return head + ",\n".join(map(json.dumps, rows)) + "\n]\n}\n"


def page(record: dict[str, Any]) -> str:
    """A page of Markdown."""
    infos, copies = results(record, "info"), results(record, "copy")
    lines = ["# Kernels on a GPU", ""]
    if record["dry"]:
        lines += ["**A dry run on a CPU, with small shapes: the times mean nothing.**", ""]
    if infos:
        about = infos[0]["result"]
        lines += [
            f"`scripts/gpu_check`, {record['date']}: {about['device']} (compute capability {about['capability']}), "
            f"jax {about['jax']}, jaxlib {about['jaxlib']}, {about['platform'].splitlines()[0]}. "
            f"Tasks that there was no time for: {record['left_out']}.",
            "",
        ]
    bandwidth = copies[0]["result"]["bytes_per_second"] if copies else None
    if bandwidth:
        lines += [f"Adding 1 to 2 GiB reads and writes {bandwidth / 1e12:.2f} TB/s: 100% in the table.", ""]
    failed = [entry for entry in record["results"] if "error" in entry["result"]]
    if failed:
        lines += ["## Failed", "", *(f"* {summary(entry)[:400]}".replace("\n", " ") for entry in failed), ""]
    lines += ["## Right or wrong", "", "Against float64, on random operands; errors in eps of the operands' type.", ""]
    lines += ["| product | result | largest / bound | all, relative | same bits again |", "|---|---|---|---|---|"]
    for entry in results(record, "check"):
        r, case = entry["result"], Check(**entry["options"])
        name = f"{case.kernel}, {case.format}{' zero point' if case.zero_point else ''} "
        name += f"{f'g{case.group}' if case.group else 'channel'}, {case.dtype}, {case.m} x {case.k} x {case.n}"
        name += (
            f"{f', {case.stack} experts' if case.stack else ''}{', layer of a stack' if case.layer is not None else ''}"
        )
        relative = f"{r['relative'] / r['eps']:.2f} eps"
        right = "right" if r["right"] else "**wrong**"
        lines.append(
            f"| {name} | {right} | {r['largest']:.3f} | {relative} | {'yes' if r['same_again'] else '**no**'} |"
        )
    lines += [
        "",
        "## Times",
        "",
        "Of a product, in microseconds; words, scales, x and result as part of a copy's bytes a ",
    ]
    lines[-1] += "second; times as fast as `jnp.dot` of bfloat16."
    lines += ["", "| rows | K x N | bfloat16 | TFLOP/s |" + "".join(f" {name} | bytes/s | speed |" for name in WEIGHTS)]
    lines.append("|" + "---|" * (4 + 3 * len(WEIGHTS)))
    for entry in sorted(results(record, "time"), key=lambda e: (e["result"]["m"], e["result"]["k"] * e["result"]["n"])):
        r = entry["result"]
        m, k, n, base = r["m"], r["k"], r["n"], r["seconds"]["bfloat16"]
        cells = [str(m), f"{k} x {n}", f"{1e6 * base:.1f}", f"{2 * m * k * n / base / 1e12:.0f}"]
        for name, (format, group) in WEIGHTS.items():
            if (s := r["seconds"].get(name)) is None:
                cells += ["failed", "", ""]
                continue
            size = k * n / (2 if format == "int4" else 1) + (k // group * n * 2 if group else n * 4) + 2 * m * (k + n)
            part = f"{size / s / bandwidth:.0%}" if bandwidth else f"{size / s / 1e12:.2f} TB/s"
            cells += [f"{1e6 * s:.1f}", part, f"{base / s:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    sweeps = results(record, "sweep")
    if sweeps:
        lines += [
            "",
            "## Tiles",
            "",
            "The fastest of those tried, and those that are chosen by shape, in microseconds.",
            "",
        ]
        lines += ["| rows | K x N | weight | fastest | its tiles | by shape | tried |", "|---|---|---|---|---|---|---|"]
    for entry in sweeps:
        r, row = entry["result"], entry["result"]["row"]
        b = row["blocks"]
        tiles = f"{b['m']} x {b['n']} x {b['k']}, {b['ways']} ways, {b['stages']} stages, {b['splits']} splits"
        default = "failed" if r["default"] is None else f"{1e6 * r['default']:.1f}"
        cells = (row["m"], f"{row['k']} x {row['n']}", row["weight"], f"{1e6 * r['best']:.1f}", tiles, default)
        lines.append("| " + " | ".join(map(str, (*cells, len(r["seconds"])))) + " |")
    return "\n".join(lines) + "\n"


MARKS = "<!-- scripts/gpu_check --readme writes from here -->", "<!-- to here -->"


def summarized(record: dict[str, Any], text: str) -> str:
    """The README with a short table between `MARKS`: every shape, and every number of rows that was timed.

    Raises:
        ValueError: there are no times of a GPU, or not both marks.
    """
    infos, timed = results(record, "info"), results(record, "time")
    if record["dry"] or not infos or not timed:
        raise ValueError("gpu_check: the results have no times of a GPU (a dry run has none).")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"gpu_check: the README must have {MARKS[0]!r} and {MARKS[1]!r}, once each.")
    about, rows = infos[0]["result"], sorted({entry["result"]["m"] for entry in timed})
    wrong = [entry for entry in results(record, "check") if not entry["result"]["right"]]
    lines = [
        f"On {about['device']} (jax {about['jax']}, {record['date']}), times as fast as `jnp.dot` of bfloat16 with so "
        f"many rows of x; more in [benchmarks/gpu.md](benchmarks/gpu.md). Checks that were wrong: {len(wrong)}.",
        "",
        "| K x N | weights |" + "".join(f" {m} |" for m in rows),
        "|---|---|" + "--:|" * len(rows),
    ]
    shapes: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for r in (entry["result"] for entry in timed):
        shapes.setdefault((r["k"], r["n"]), {})[r["m"]] = r["seconds"]
    for (k, n), times in sorted(shapes.items()):
        for name in WEIGHTS:
            pairs = [(times.get(m, {}).get("bfloat16"), times.get(m, {}).get(name)) for m in rows]
            cells = [f"{base / own:.2f}" if base and own else "" for base, own in pairs]
            lines.append(f"| {k} x {n} | {name} | " + " | ".join(cells) + " |")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return before + "\n".join([MARKS[0], *lines, MARKS[1]]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where results go")
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop")
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, with small shapes")
    parser.add_argument("--readme", action="store_true", help="only put a table of benchmarks/gpu.json into the README")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker.read_text()), options.dry)
        return
    if options.readme:
        readme = ROOT / "README.md"
        text = summarized(json.loads((options.out / "gpu.json").read_text()), readme.read_text())
        temporary = readme.with_name(".README.md.new")
        temporary.write_text(text)
        os.replace(temporary, readme)
        return
    record = run_all(options.out, 60 * options.minutes, options.dry)
    print((options.out / "gpu.md").read_text())
    wrong = [e for e in record["results"] if "error" in e["result"] or not e["result"].get("right", True)]
    sys.exit(1 if wrong or not record["results"] else 0)


if __name__ == "__main__":
    main()
