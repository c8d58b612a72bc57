"""The project as a whole: notebooks as they are shown, the commands of a clean clone, nothing that does not belong."""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NBS if p.stem[:2].isdigit()]
MACHINE_PATHS = re.compile(r"/work/|/root/|/home/|/tmp/[a-z]")
names = {"ids": lambda p: p.stem}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    return [c for c in load(path)["cells"] if c["cell_type"] == "code"]


def code_lines(cell):
    lines = "".join(cell["source"]).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#|")]


@pytest.mark.parametrize("path", NBS, **names)
def test_notebook_format(path):
    nb = load(path)
    assert (nb["nbformat"], nb["nbformat_minor"]) >= (4, 5)
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))
    assert "widgets" not in nb["metadata"], "GitHub shows a notebook with widget metadata but no state as invalid"


@pytest.mark.parametrize("path", NBS, **names)
def test_nothing_of_a_machine_is_kept(path):
    text = path.read_text(encoding="utf-8")
    assert not (found := MACHINE_PATHS.search(re.sub(r'"image/png": "[^"]*"', "", text))), found
    outputs = [o for c in code_cells(path) for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]


@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.stem < "90"], **names)
def test_chapter_is_readable(path):
    sizes = [len(code_lines(c)) for c in code_cells(path)]
    assert statistics.median(sizes) <= 4
    assert sorted(sizes)[int(0.9 * len(sizes))] <= 12
    assert path.stat().st_size < 1_500_000


@pytest.mark.parametrize("path", CHAPTERS, **names)
def test_chapter_keeps_its_outputs_and_opens_in_colab(path):
    first = "".join(load(path)["cells"][0]["source"])
    assert f"blob/main/nbs/{path.name}" in first
    assert [o for c in code_cells(path) for o in c["outputs"]], "run the chapter and save it with its outputs"


def test_one_chapter_one_module():
    modules = {p.stem for p in (ROOT / "mmfer").glob("[a-z]*.py")}
    assert modules == {p.stem[3:] for p in CHAPTERS if "#| default_exp" in p.read_text(encoding="utf-8")}


def test_links_between_chapters_lead_somewhere():
    for path in NBS:
        prose = "\n".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_clean_clone_imports_and_runs(tmp_path):
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    said = subprocess.run([sys.executable, "-c", "from mmfer.cli import main; main()", "info"], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("mmfer "), said.stderr


def test_the_table_of_benchmarks_is_that_of_their_results():
    subprocess.run([sys.executable, "benchmarks/readme.py"], cwd=ROOT, check=True)
