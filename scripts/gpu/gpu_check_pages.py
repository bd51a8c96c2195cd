"""What `scripts/gpu_check` writes: `gpu.json`, the page `gpu.md`, a table of tiles, and a table for the README."""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

from gpu_check_cases import INTEGERS, TIMED, WEIGHTS, Check, IntegerCheck, Program


def write(record: dict[str, Any], out: Path) -> None:
    """`gpu.json`, `gpu.md` and `chips/gpu.json`, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"gpu.json": json.dumps(record, indent=1) + "\n", "gpu.md": page(record)}
    if any(entry["do"] == "sweep" for entry in record["results"]):
        texts["blocks_gpu.json"] = table(record)
    for name, text in texts.items():
        temporary = out / f".{name}.new"
        temporary.write_text(text)
        os.replace(temporary, out / name)


def summary(entry: dict[str, Any]) -> str:
    """One line on a result."""
    options, result = entry["options"], entry["result"]
    what = " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
    if "error" in result:
        return f"{entry['do']} {what}: {result['error']}"
    if entry["do"] in ("check", "program", "attention", "experts", "fp8", "fused"):
        word = "right" if result["right"] else "WRONG"
        return f"{word} ({result['relative'] / result['eps']:.2f} eps, same again: {result['same_again']}) {what}"
    if entry["do"] == "integers":
        word = "right" if result["right"] else f"WRONG in {result['wrong']} of {result['elements']} elements"
        return f"{word} (same again: {result['same_again']}) integers {what}"
    if entry["do"] == "time_program":
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"{result['m']} x {result['k']} x {result['n']}: {times}"
    if entry["do"] == "time_attention":
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"attention on {result['filled']} of {result['t']} positions: {times} {result['errors'] or ''}"
    if entry["do"] in ("time", "time_integers", "time_fp8", "time_mlp"):
        times = ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in result["seconds"].items())
        return f"{result['m']} x {result['k']} x {result['n']}: {times} {result['errors'] or ''}"
    if entry["do"] == "sweep":
        default = "failed" if result["default"] is None else f"{1e6 * result['default']:.1f} us"
        return f"sweep {what}: {1e6 * result['best']:.1f} us, default {default}, {result['row']['blocks']}"
    if entry["do"] == "model":
        rates = ", ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in result["tokens_per_second"].items())
        return f"{what}: {rates}"
    return f"{entry['do']}: {json.dumps(result)}"


def results(record: dict[str, Any], do: str) -> list[dict[str, Any]]:
    """Those of one kind of task that did not fail."""
    return [entry for entry in record["results"] if entry["do"] == do and "error" not in entry["result"]]


def table(record: dict[str, Any]) -> str:
    """The tiles that were fastest, as `pallas_kernels/chips/gpu.json` has them."""
    from qjax.pallas_kernels.chips.gpu import CHIPS, ROWS

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
    for entry in results(record, "program"):
        r, case = entry["result"], Program(**entry["options"])
        name = f"{case.what}: {case.kernel}, {case.format}{' zero point' if case.zero_point else ''} "
        name += f"{f'g{case.group}' if case.group else 'channel'}, {case.dtype}, {case.m} x {case.k} x {case.n}"
        cells = [name, "right" if r["right"] else "**wrong**", f"{r['largest']:.3f}"]
        cells += [f"{r['relative'] / r['eps']:.2f} eps", "yes" if r["same_again"] else "**no**"]
        lines.append("| " + " | ".join(cells) + " |")
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
    programs = results(record, "time_program")
    if programs:
        lines += ["", "## Times of other programs", "", "In microseconds; times as fast as bfloat16, and the goal.", ""]
        lines += ["| program | rows | K x N | bfloat16 | packed | speed | goal |", "|---|---|---|---|---|---|---|"]
    for entry in programs:
        r, what = entry["result"], entry["options"]["what"]
        base, own = r["seconds"]["bfloat16"], r["seconds"][what]
        cells = [what, r["m"], f"{r['k']} x {r['n']}", f"{1e6 * base:.1f}", f"{1e6 * own:.1f}", f"{base / own:.2f}x"]
        lines.append("| " + " | ".join(map(str, (*cells, f"{TIMED[what]}x" if r["m"] <= 16 else ""))) + " |")
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
    import gpu_check_attention
    import gpu_check_fp8
    import gpu_check_fused

    parts = (gpu_check_fused, gpu_check_fp8, gpu_check_attention)
    others = itertools.chain(*(part.page(functools.partial(results, record)) for part in parts))
    return "\n".join([*lines, *_integers(record), *others, *_models(record)]) + "\n"


def _integers(record: dict[str, Any]) -> list[str]:
    """The page's part on products of integers."""
    checks, lines = results(record, "integers"), []
    if checks:
        lines += ["", "## Integers", "", "Elements with other bits than NumPy's, on random codes."]
        lines += ["", "| product | zero points | wrong | of | same bits again |", "|---|---|--:|--:|---|"]
    for entry in checks:
        r, case = entry["result"], IntegerCheck(**entry["options"])
        name = f"{case.kernel}, w{case.bits}a8 {f'g{case.group}' if case.group else 'channel'}, {case.dtype}, "
        name += f"{case.m} x {case.k} x {case.n}{f', {case.stack} experts' if case.stack else ''}"
        name += ", layer of a stack" if case.layer is not None else ""
        wrong = "0" if r["right"] else f"**{r['wrong']}**"
        again = "yes" if r["same_again"] else "**no**"
        lines.append(f"| {name} | {', '.join(case.zeros) or 'none'} | {wrong} | {r['elements']} | {again} |")
    times = sorted(results(record, "time_integers"), key=lambda e: (e["result"]["m"], e["result"]["n"]))
    if times:
        lines += [
            "",
            "Microseconds of a product of codes, and times as fast as `jnp.dot` of bfloat16; of the rounding of",
        ]
        lines += ["an input of bfloat16, which comes before.", ""]
        lines += ["| rows | K x N | bfloat16 | rounding |" + "".join(f" {name} | speed |" for name in INTEGERS)]
        lines.append("|" + "---|" * (4 + 2 * len(INTEGERS)))
    for r in (entry["result"] for entry in times):
        base = r["seconds"]["bfloat16"]
        cells = [str(r["m"]), f"{r['k']} x {r['n']}", f"{1e6 * base:.1f}", f"{1e6 * r['seconds']['rounding']:.1f}"]
        for name in INTEGERS:
            s = r["seconds"].get(name)
            cells += ["failed", ""] if s is None else [f"{1e6 * s:.1f}", f"{base / s:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _models(record: dict[str, Any]) -> list[str]:
    """The page's part on whole models."""
    entries, lines = [entry["result"] for entry in results(record, "model")], []
    if entries:
        lines += [
            "",
            "## A decoder of the shape of Llama 3 8B",
            "",
            f"Random weights; {entries[0]['prompt']} tokens are read, and come before those that are written. The "
            f"cache is int8, with bfloat16 weights bfloat16. XLA_FLAGS: {entries[0]['flags'] or 'none'}. Tokens a "
            "second, by sequences at a time. Memory in GB: weights; what the device has in use with them and the cache "
            "of one sequence, and at most. TB/s: bytes of weights times tokens a second, of one sequence. All models "
            "scan over stacked layers, out of which XLA may copy float ones: bfloat16 is no lower bound.",
            "",
            "| weights | read 1 | write 1 | TB/s | write 16 | GB of weights | in use | most |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for r in entries:
        read, one, many = (r["tokens_per_second"].get(name) for name in ("prefill 1", "decode 1", "decode 16"))
        sizes = [r["weight_bytes"], r["memory"]["made"]["in_use"], r["memory"]["end"]["peak"]]
        cells = [r["recipe"], *("-" if rate is None else f"{rate:,.0f}" for rate in (read, one))]
        cells += ["-" if one is None else f"{one * r['weight_bytes'] / 1e12:.2f}"]
        cells += ["-" if many is None else f"{many:,.0f}"]
        cells += ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        lines.append("| " + " | ".join(cells) + " |")
    for r in (entry["result"] for entry in results(record, "exported")):
        same = "the same tokens" if r["same_tokens"] else "**other tokens**"
        same += ", and the same bits of all logits" if r["same_bits"] else ""
        lines += ["", f"Exported by `qjax.export` and loaded again, int4 with {r['layers']} layers says {same}."]
    return lines


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
    kinds = ("check", "program", "attention", "experts", "fp8", "fused")
    checks = [entry for kind in kinds for entry in results(record, kind)]
    wrong = [entry for entry in checks if not entry["result"]["right"]]
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
