"""Checks and times the kernels for NVIDIA GPUs, on one, within a time limit. `scripts/gpu_check` runs it.

What is done is a list of tasks, the most important first, and what the time is not enough for is left out and said. A
process of its own carries them out, one after the other: one that crashes, or that hangs as a kernel does whose
barriers do not match, is ended, recorded, and followed by another that goes on with the next task. Results are written
after each task, in one step.

* `check`: a product against float64, on new random operands each time, unpacked by NumPy.
* `time`: products of the layers of Llama 3 8B and 70B, in int4 and int8, beside `jnp.dot` of bfloat16.
* `integers`: a product of integers against NumPy, which must have the same bits.
* `time_integers`: such products of the layers of Llama 3 8B beside `jnp.dot` of bfloat16, and what it takes to round
  their inputs. Goal: with 2048 rows and more, 1.7 times as fast as bfloat16.
* `program`: products with an epilogue, several in one kernel, other formats and the transposed one, against float64.
* `time_program`: NF4, and a gated pair, beside bfloat16.
* `sweep`: one such product in the tiles that `default_blocks` likes best. The fastest ones make a table,
  `chips/gpu.json`, that can replace the one of `pallas_kernels`.
* `attention`, `experts`, `time_attention`: `scripts/gpu/gpu_check_attention.py`.
* `fp8`, `time_fp8`: `scripts/gpu/gpu_check_fp8.py`.
* `fused`, `time_mlp`: `scripts/gpu/gpu_check_fused.py`.
* `model`, `exported`: a decoder of the shape of Llama 3 8B (`scripts/bench/bench_decode.py`): tokens a second,
  and whether an exported one says the same. Three tenths of the time are kept for it, and each has a process of its
  own: what that took of memory is in the result.

Times are those of many products in one program, over weights that are several times the size of the cache, so that each
product reads its weight from memory; programs take turns, and the median of their rounds is what counts.

This file is the process that watches. The tables are in `gpu_check_cases.py`, the process that works in
`gpu_check_worker.py`, what it calls in `gpu_check_products.py`, `gpu_check_timing.py` and the three files named above,
and what is written in `gpu_check_pages.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gpu_check_cases import tasks_of
from gpu_check_pages import summarized, summary, write
from gpu_check_worker import worker

ROOT = Path(__file__).resolve().parents[2]


def run_all(out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Carries out tasks until the time is up; returns what is written to `gpu.json`."""
    start = time.monotonic()
    tasks = tasks_of()
    if dry:  # one of each kind, and all checks
        kinds: dict[str, Any] = {}
        checks = ("check", "integers", "program", "attention", "experts", "fp8", "fused")
        tasks = [task for task in tasks if task["do"] in checks or kinds.setdefault(task["do"], task) is task]
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    record: dict[str, Any] = {"date": date, "dry": dry, "results": [], "left_out": len(tasks)}
    models = [task for task in tasks if task["do"] in ("model", "exported")]
    kernels, end = [task for task in tasks if task not in models], start + seconds
    parts = [(kernels, end - 0.3 * seconds if models else end), *(([task], end) for task in models)]

    def has_no_gpu() -> bool:
        return bool(record["results"]) and "error" in record["results"][0]["result"]

    for left, until in parts:
        while left and time.monotonic() < until and not has_no_gpu():
            finished = watch(left, record, out, until, dry)
            left = [task for task in left if task["id"] not in finished]
            record["left_out"] -= len(finished)
            write(record, out)
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
