"""What is installed where: the setup cell on Colab, the versions that are tested, the forge."""
import importlib.metadata
import json
import re
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NAME = re.compile(r"[A-Za-z0-9_-]+")
COLAB = {  # what Colab has of all that is needed
    "torch", "torchaudio", "torchvision", "transformers", "accelerate", "numpy", "pandas", "scikit-learn",
    "matplotlib", "seaborn", "jupyter", "ipywidgets", "pooch", "opencv-python-headless", "safetensors",
    "huggingface-hub", "pydantic", "fastcore", "joblib", "threadpoolctl", "scipy", "pyyaml", "filelock",
    "requests", "urllib3", "tqdm", "typing-extensions", "packaging"}


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def name_of(requirement):
    return NAME.match(requirement)[0].lower().replace("_", "-")


def pinned(file):
    "{name: version} of a file of constraints."
    return dict(line.split("==") for line in (ROOT / file).read_text().split())


def setup_cells():
    sources = {p.stem: ["".join(c["source"]) for c in json.loads(p.read_text())["cells"]] for p in NBS}
    return {name: [s for s in cells if s.startswith("#@title Setup")] for name, cells in sources.items()}


def brought():
    "The packages that the setup cell installs beside mmfer."
    [cell] = setup_cells()["21_capstone"]
    return set(re.search(r'%pip install -q --no-deps "mmfer @ [^"]+" (.+)', cell)[1].split())


def test_every_chapter_has_the_same_setup_cell():
    cells = setup_cells()
    assert {len(found) for found in cells.values()} == {1}
    assert len({cell for [cell] in cells.values()}) == 1


def test_nothing_else_is_installed_by_a_notebook():
    assert all(p.read_text().count("%pip") == 1 for p in NBS)


def test_setup_brings_all_that_colab_lacks():
    needed = {name_of(r) for r in settings()["requirements"].split() if "decord2" not in r}  # for ARM
    assert needed - COLAB <= brought()


def test_what_setup_brings_without_its_dependencies_lacks_none():
    wanted = [r for package in brought() for r in importlib.metadata.requires(package) or []]
    needed = {name_of(r) for r in wanted if ";" not in r}
    assert needed <= COLAB | brought()


def test_the_lowest_version_that_is_promised_is_tested():
    promised = re.search(r"transformers>=(\S+)", settings()["requirements"])[1]
    assert pinned("constraints-lowest.txt")["transformers"].startswith(f"{promised}.")


def test_the_forge_runs_what_a_contributor_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert settings()["min_python"] in [step.get("with", {}).get("python-version") for step in steps]
    assert "make test" in [step.get("run") for step in steps]
