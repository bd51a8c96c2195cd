"""What `scripts/gpu_check` does when a kernel hangs or crashes, and what it writes; nothing runs on a GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_cases
import gpu_check_pages
import pytest

from qjax.pallas_kernels.chips.gpu import KEY
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic

# In place of the script, a worker whose tasks say what happens.
_WORKER = """
import json, os, sys, time
print("something that a library prints", flush=True)
for task in json.load(open(sys.argv[2])):
    print(json.dumps({"started": task["id"]}), flush=True)
    if task["do"] == "hang":
        time.sleep(60)
    if task["do"] == "crash":
        print("illegal instruction", file=sys.stderr, flush=True)
        os._exit(3)
    print(json.dumps({"id": task["id"], "result": {"pid": os.getpid()}}), flush=True)
"""


def test_a_task_that_hangs_or_crashes_costs_that_task_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    kinds = ["fine", "hang", "fine", "crash", "fine"]
    tasks = [{"id": i, "do": do, "limit": 2.0, "options": {}} for i, do in enumerate(kinds)]
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "tasks_of", lambda: tasks)
    record = gpu_check.run_all(tmp_path / "out", 60.0, dry=False)
    found = [(entry["do"], entry["result"]) for entry in record["results"]]
    assert [do for do, _ in found] == kinds
    assert "hung" in found[1][1]["error"]
    assert "illegal instruction" in found[3][1]["error"]
    assert len({found[i][1]["pid"] for i in (0, 2, 4)}) == 3  # each goes on in a process of its own
    assert record["left_out"] == 0
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == record


def test_the_time_limit_ends_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    tasks = [{"id": i, "do": do, "limit": 60.0, "options": {}} for i, do in enumerate(["fine", "hang", "fine"])]
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "tasks_of", lambda: tasks)
    start = time.monotonic()
    record = gpu_check.run_all(tmp_path, 2.0, dry=False)
    assert time.monotonic() - start < 20
    assert len(record["results"]) == 1
    assert record["left_out"] == 2


def record() -> dict[str, Any]:
    blocks = {"m": 16, "n": 64, "k": 512, "ways": 4, "stages": 6, "splits": 1}
    timed = {"k": 8192, "n": 8192, "m": 16, "seconds": {"bfloat16": 50e-6, "int4 g128": 20e-6}, "errors": {"int8": "x"}}
    row = {"weight": "int4/g128", "x": "bfloat16", "k": 8192, "n": 8192, "m": 12, "blocks": blocks}
    swept = {"row": row, "best": 18e-6, "default": None, "seconds": {json.dumps(blocks): 18e-6}, "errors": {}}
    about = {
        "device": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
        "jax": "0.11.2",
        "jaxlib": "0.11.2",
        "platform": "a\nb",
    }
    entries = [("info", about), ("copy", {"bytes_per_second": 3e12}), ("time", timed), ("sweep", swept)]
    results = [{"do": do, "options": {}, "result": result} for do, result in entries]
    return {"date": "2026-01-01", "dry": False, "results": results, "left_out": 3}


def test_the_page_says_how_fast_and_what_failed():
    page = gpu_check_pages.page(record())
    # 8192 * 8192 / 2 bytes of words, a scale of 2 bytes for 128 of them, x and the result in 20 us, of 3 TB/s
    assert "| 16 | 8192 x 8192 | 50.0 | 43 | 20.0 | 59% | 2.50x | failed |  |  |" in page
    assert "| 12 | 8192 x 8192 | int4/g128 | 18.0 | 16 x 64 x 512, 4 ways, 6 stages, 1 splits | failed | 1 |" in page
    assert "no time for: 3" in page


def test_the_readme_gets_a_table():
    before, after = gpu_check_pages.MARKS
    text = gpu_check_pages.summarized(record(), f"a\n{before}\nold\n{after}\nz\n")
    assert text.startswith(f"a\n{before}\nOn NVIDIA H100 80GB HBM3 (jax 0.11.2, 2026-01-01)")
    assert text.endswith(f"{after}\nz\n") and "old" not in text
    assert "| K x N | weights | 16 |" in text
    assert "| 8192 x 8192 | int4 g128 | 2.50 |" in text
    assert "| 8192 x 8192 | int8 channel |  |" in text
    assert gpu_check_pages.summarized(record(), text) == text
    with pytest.raises(ValueError, match="once each"):
        gpu_check_pages.summarized(record(), "no marks")
    with pytest.raises(ValueError, match="no times of a GPU"):
        gpu_check_pages.summarized({**record(), "dry": True}, text)


def test_the_readme_has_the_marks_once():
    text = (Path(gpu_check.ROOT) / "README.md").read_text()
    assert [text.count(mark) for mark in gpu_check_pages.MARKS] == [1, 1]


def test_the_table_of_tiles_is_what_the_kernel_reads():
    (row,) = json.loads(gpu_check_pages.table(record()))["rows"]
    assert set(KEY) <= set(row)
    assert (row["chip"], row["m"]) == ("h100", 16)
    assert matmul_mosaic.Blocks(**row["blocks"]).warpgroups == 4


def test_every_shape_of_the_tasks_has_a_limit_and_a_known_kind():
    tasks = gpu_check_cases.tasks_of()
    timed = {(t["options"]["k"], t["options"]["n"], t["options"]["m"]) for t in tasks if t["do"] == "time"}
    assert timed == {(k, n, m) for k, n in gpu_check_cases.WIDTHS.values() for m in gpu_check_cases.ROWS}
    assert len({task["id"] for task in tasks}) == len(tasks)
