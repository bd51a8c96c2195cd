"""The quickstart runs from end to end and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"name", "training", "bits_per_weight", "bytes", "bits_per_byte", "bits_per_byte_gap", "top1", "kl"}


def test_the_quickstart_writes_its_table_plot_and_checkpoint(tmp_path: Path):
    command = [sys.executable, ROOT / "scripts" / "bench" / "quickstart.py", "--quick", "--out", tmp_path]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    data = json.loads((tmp_path / "table.json").read_text())
    rows = {(row["name"], row["training"]): row for row in data["rows"]}
    assert all(set(row) == FIELDS for row in data["rows"])
    post = {name: row for (name, training), row in rows.items() if training == "post-training"}
    assert set(rows) == {(name, "post-training") for name in ("int4", "int2")} | {("int2", "QAT")}
    assert set(data["recovered"]) == {"int2"}

    # Bits per weight are the format's and the scales': bfloat16 for each 64 weights.
    for name, bits in (("int4", 4.25), ("int2", 2.25)):
        assert bits < post[name]["bits_per_weight"] < bits + 0.1
    # The committed weights are a language model, and fewer bits are further from it.
    assert 1 < data["float"]["bits_per_byte"] < 3
    assert 0 < post["int4"]["kl"] < post["int2"]["kl"] < 1
    assert all(0 < row["top1"] <= 1 for row in rows.values())

    assert "bit for bit" in done.stdout
    assert (tmp_path / "int4" / "manifest.json").is_file()
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "bits/byte" in (tmp_path / "table.txt").read_text()
