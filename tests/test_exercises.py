"""Every exercise has a solution, and the solution passes the chapter's own checker."""
import json
import re
from pathlib import Path

import pytest

NBS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("[0-9]*.ipynb"))
SOLUTION = re.compile(r"<details><summary>Solution.*?</summary>.*?```python\n(.*?)```", re.S)
STUB = re.compile(r"raise NotImplementedError\(\"your turn\"\)")


def sources(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def exercises(path):
    "(checkers, stub, solution) of each exercise of a chapter."
    code, prose = sources(path, "code"), "\n".join(sources(path, "markdown"))
    stubs = [c for c in code if STUB.search(c)]
    return [c for c in code if "@exercise" in c], stubs, SOLUTION.findall(prose)


def is_imports(cell):
    return all(re.match(r"(import |from |#|\s|\)|$)", line) for line in cell.splitlines()) and "import" in cell


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_solutions_pass(path, capsys):
    checkers, stubs, solutions = exercises(path)
    assert len(stubs) == len(solutions), "each exercise needs one folded solution"
    code = sources(path, "code")
    module = next((m[1] for c in code if (m := re.search(r"#\| default_exp (\w+)", c))), None)
    space = {}
    exec("from mmfer.core import *" + (f"\nfrom mmfer.{module} import *" if module else ""), space)
    for cell in filter(is_imports, code): exec(cell, space)
    for cell in checkers: exec(STUB.sub("raise NotImplementedError", cell), space)
    for stub, solution in zip(stubs, solutions):
        exec(solution, space)
        name = re.findall(r"^def (\w+)", stub, re.M)[-1]
        call = re.findall(rf"^\w+\({name}\)", stub, re.M)
        assert call, f"{path.name}: the stub {name} is not handed to a checker"
        exec(call[0], space)
        assert "solved" in capsys.readouterr().out
