"""Check that the table in benchmarks/README.md is that of the results; with --write, write it.

    python benchmarks/readme.py [--write]
"""
import ast
import json
import sys
from pathlib import Path

import gpu

HERE = Path(__file__).parent
SHARED = ("common", "readme")
HEAD = """\
# Benchmarks

One script per question. Each writes its result with chip, versions and settings into `results/`, and this
table is made from those files (`python benchmarks/readme.py --write`). What has not been measured says so.
`make gpu` on a machine with a GPU runs the tests that need one and writes all figures of a GPU at once.

| question | answer | chip | command |
| --- | --- | --- | --- |
"""
TAIL = """
Also in `results/`: `compare_toy` and `compare_ravdess`, all systems on the same folds, explained in
[chapter 27](../nbs/27_ablations.ipynb); `audio_ravdess_speech`, sound alone from scratch, of
`mmfer cv ravdess_speech --system audio_only --preset tiny --folds hicmae --stages benchmarks/audio_alone.json
--out runs/audio`.
"""


def question(script):
    "The first line of a script's docstring."
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))).splitlines()[0]


def rows(script):
    "One row per result; one that says so where there is no result, or none of a GPU that should have one."
    kept = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((HERE / "results").glob("*.json"))]
    mine = [r for r in kept if f"benchmarks/{script.name}" in r["command"]]
    row = "| {} | {} | {chip}, torch {torch} | `{}` |"
    rows = [row.format(question(script), r["answer"], r["command"], **r["machine"]) for r in mine]
    needs_gpu = script.name in ("gpu.py", *gpu.JOBS)
    lacks_gpu = needs_gpu and not any(r["machine"].get("device") == "cuda" for r in mine)
    if lacks_gpu: rows.append(f"| {question(script)} | not measured | a GPU | `make gpu` |")
    return rows or [f"| {question(script)} | not measured | | `python benchmarks/{script.name}` |"]


def readme():
    scripts = [p for p in sorted(HERE.glob("*.py")) if p.stem not in SHARED]
    return HEAD + "\n".join(row for s in scripts for row in rows(s)) + "\n" + TAIL


if __name__ == "__main__":
    path = HERE / "README.md"
    if "--write" in sys.argv: path.write_text(readme(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != readme():
        sys.exit(f"{path} is not the table of the results: run python benchmarks/readme.py --write")
