"""The scripts that `make gpu` runs: their arguments fit them, and what was not measured says so."""
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import tyro

HERE = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(HERE))
gpu = importlib.import_module("gpu")
readme = importlib.import_module("readme")
JOBS = [*gpu.JOBS.items(), *gpu.BESIDE.items()]
LINES = [(script, line) for script, lines in JOBS for line in lines]


@pytest.mark.parametrize("script, line", LINES)
def test_the_arguments_fit_the_script(script, line):
    settings = importlib.import_module(Path(script).stem).Settings
    assert tyro.cli(settings, args=shlex.split(line))


def told(script): return readme.rows(HERE / script)


def test_a_figure_of_a_cpu_is_no_figure_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "HERE", tmp_path)
    result = dict(answer="fast", command="python benchmarks/step_time.py", machine=dict(chip="X", torch="2"))
    (tmp_path / "results").mkdir()

    def measured_on(device):
        machine = result["machine"] | dict(device=device)
        (tmp_path / "results" / f"{device}.json").write_text(json.dumps(result | dict(machine=machine)))
        return told("step_time.py")
    assert [row.split(" | ")[1] for row in told("step_time.py")] == ["not measured"]
    assert [row.split(" | ")[1] for row in measured_on("cpu")] == ["fast", "not measured"]
    assert [row.split(" | ")[1] for row in measured_on("cuda")] == ["fast", "fast"]


def test_a_question_without_an_answer_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "HERE", tmp_path)
    [row] = told("kill_resume.py")
    assert "not measured" in row and "GPU" not in row
