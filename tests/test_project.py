"""The project as a whole: its front door, its chapters, their numbers and links, a fresh clone."""
import ast
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmfer
from mmfer.lesson import CHAPTERS as NUMBERS

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NBS if p.stem[:2].isdigit()]
MODULES = {p.stem for p in (ROOT / "mmfer").glob("[a-z]*.py")}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
CODE = [p for folder in ("mmfer", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
MACHINE_PATHS = re.compile(r"/work/|/root/|/home/|/tmp/[a-z]")
names = {"ids": lambda p: p.stem}


def within(path):
    return str(path.relative_to(ROOT))


@functools.cache
def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    return [c for c in load(path)["cells"] if c["cell_type"] == "code"]


def prose(path):
    "The text of a page or of a notebook's Markdown cells, without what stands in code blocks."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


# The front door


def test_import_is_instant_and_loads_no_torch():
    script = """import sys, time
start = time.perf_counter()
import mmfer
took = time.perf_counter() - start
assert took < 0.2, took
assert not {"torch", "numpy", "pandas"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", mmfer.__all__)
def test_what_is_offered_is_public_where_it_lives(name):
    home = importlib.import_module(f"mmfer.{mmfer._HOME[name]}")
    assert getattr(mmfer, name) is getattr(home, name)
    assert name in home.__all__ and name in dir(mmfer)
    assert name not in MODULES, "a module of this name would take its place as soon as it is imported"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Procesor'"): mmfer.Procesor
    with pytest.raises(ImportError): exec("from mmfer import Procesor")


def test_the_export_leaves_the_front_door_as_it_is(tmp_path, monkeypatch):
    from nbdev.config import update_version
    monkeypatch.chdir(ROOT)
    shutil.copy(ROOT / "mmfer/__init__.py", tmp_path)
    update_version(tmp_path)
    assert (tmp_path / "__init__.py").read_text() == (ROOT / "mmfer/__init__.py").read_text()


# Chapters


@pytest.mark.parametrize("path", NBS, **names)
def test_notebook_format(path):
    nb = load(path)
    assert (nb["nbformat"], nb["nbformat_minor"]) >= (4, 5)
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))
    assert "widgets" not in nb["metadata"], "GitHub calls a notebook with widgets but no state invalid"
    assert path.stat().st_size < 1_500_000


@pytest.mark.parametrize("path", NBS, **names)
def test_nothing_of_a_machine_is_kept(path):
    text = re.sub(r'"image/png": "[^"]*"|base64,[^"\\]*', "", path.read_text(encoding="utf-8"))
    found = [text[m.start():m.end() + 60] for m in MACHINE_PATHS.finditer(text)]
    assert not found, "\n" + "\n".join(found)
    outputs = [o for c in code_cells(path) for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]


@pytest.mark.parametrize("path", CHAPTERS, **names)
def test_chapter_keeps_its_outputs_and_opens_in_colab(path):
    first = "".join(load(path)["cells"][0]["source"])
    assert f"blob/main/nbs/{path.name}" in first
    assert [o for c in code_cells(path) for o in c["outputs"]], "run the chapter and save it with its outputs"


def test_chapters_are_numbered_in_reading_order():
    assert {p.stem[3:]: p.stem[:2] for p in CHAPTERS} == NUMBERS
    numbers = [*NUMBERS.values()]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("path", CHAPTERS, **names)
def test_a_chapter_exports_the_module_of_its_name(path):
    code = "\n".join("".join(c["source"]) for c in code_cells(path))
    exported = re.findall(r"#\| default_exp (\w+)", code)
    assert exported == ([] if path.stem[3:] == "capstone" else [path.stem[3:]])


def test_every_module_has_its_chapter():
    modidx = importlib.import_module("mmfer._modidx").d["syms"]
    assert MODULES == {*NUMBERS} - {"capstone"} == {name.removeprefix("mmfer.") for name in modidx}


def is_shown(cell):
    "A cell that runs something, imports apart."
    try: body = ast.parse("".join(cell["source"])).body
    except SyntaxError: return True  # a command of IPython
    return not all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def longest_unshown(path):
    "The most exported lines in a row that no cell between them runs."
    longest = lines = 0
    for cell in filter(is_shown, code_cells(path)):
        text = "".join(cell["source"]).splitlines()
        exported = any(line.startswith("#| export") for line in text)
        lines += sum(bool(line.strip()) and not line.startswith("#|") for line in text)
        if not exported: lines = 0
        longest = max(longest, lines)
    return longest


@pytest.mark.parametrize("path", CHAPTERS, **names)
def test_what_is_exported_is_soon_run(path):
    assert longest_unshown(path) < 60


# Links

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
OWN = re.compile(r"https://(?:github\.com|colab\.research\.google\.com/github)/mmfer/mmfer/blob/main/")


def anchors(path):
    heads = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().replace(" ", "-").lower() for head in heads}


def dead_links(path):
    for text, target, tag in LINK.findall(prose(path)):
        where, _, anchor = (target or tag).partition("#")
        folder = ROOT if OWN.match(where) else path.parent
        where = OWN.sub("", where)
        if re.match(r"https?:|mailto:|data:", where): continue
        page = folder / where if where else path
        if not page.exists(): yield f"{where} does not exist"
        elif anchor and anchor.lower() not in anchors(page): yield f"{page.name} has no heading #{anchor}"
        number = re.match(r"(?:[Cc]hapter )?(\d\d)\b", text)
        if number and not page.name.startswith(number[1]): yield f"[{text}] leads to {page.name}"


@pytest.mark.parametrize("path", [*NBS, *PAGES], ids=within)
def test_links_lead_where_they_say(path):
    dead = [*dead_links(path)]
    assert not dead, "\n" + "\n".join(dead)


@pytest.mark.parametrize("path", [*NBS, *PAGES, *CODE, ROOT / "Makefile"], ids=within)
def test_every_chapter_spoken_of_exists(path):
    cells = load(path)["cells"] if path.suffix == ".ipynb" else [{"source": path.read_text(encoding="utf-8")}]
    text = "\n".join("".join(c["source"]) for c in cells)
    groups = re.findall(r"[Cc]hapters?((?:(?:,| and| or| to)? \d\d\b)+)", text)
    spoken = {number for group in groups for number in re.findall(r"\d\d", group)}
    files = {*re.findall(r"\b\d\d_[a-z]\w*(?=\.ipynb)", text)}
    unknown = spoken - {*NUMBERS.values()} | files - {p.stem for p in CHAPTERS}
    assert not unknown, sorted(unknown)


# A clone of the project


def test_clean_clone_imports_and_runs(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    command = [sys.executable, "-c", "from mmfer.cli import main; main()", "info"]
    said = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("mmfer "), said.stderr


def test_the_table_of_benchmarks_is_that_of_their_results():
    subprocess.run([sys.executable, "benchmarks/readme.py"], cwd=ROOT, check=True)
