"""Every exercise has a solution that its checker accepts, and a wrong answer that its checker refuses."""
import ast
import importlib
import json
import re
from pathlib import Path

import pytest

CHAPTERS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("[0-9]*.ipynb"))
STUB = 'raise NotImplementedError("your turn")'
FOLDED = r"<details><summary>{}[^<]*</summary>\s*```python\n(.*?)```"
SOLUTION = re.compile(FOLDED.format("Solution"), re.S)
WRONG = re.compile(FOLDED.format("A wrong answer, and why"), re.S)
NOT_A_REFUSAL = (NameError, SyntaxError, NotImplementedError)  # the answer did not even run


def sources(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def is_imports(cell):
    try: body = ast.parse(cell).body
    except SyntaxError: return False  # a cell with a command of IPython
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def exercises(path):
    "(name of the checker, name of the answer, solution, wrong answer) of each exercise, in order."
    stubs = [cell for cell in sources(path, "code") if STUB in cell]
    prose = "\n".join(sources(path, "markdown"))
    solutions = SOLUTION.findall(prose)
    wrong = WRONG.findall(prose)
    assert len(solutions) == len(stubs), f"{len(stubs)} exercises have {len(solutions)} folded solutions"
    assert len(wrong) == len(stubs), f"{len(stubs)} exercises have {len(wrong)} folded wrong answers"
    calls = [re.search(r"^(\w+)\((\w+)\)\s*\Z", stub, re.M) for stub in stubs]
    assert all(calls), "a stub ends with checker(answer)"
    return [(*call.groups(), *answers) for call, *answers in zip(calls, solutions, wrong)]


def chapter_space(path):
    "The names that a checker may use: those of the chapter's module, what the chapter imports, the checkers."
    code = sources(path, "code")
    exported = re.search(r"#\| default_exp (\w+)", "\n".join(code))
    module = vars(importlib.import_module(f"mmfer.{exported[1]}")) if exported else {}
    space = {**module, "__name__": path.stem}
    for cell in code:
        if is_imports(cell) or "@exercise" in cell: exec(cell, space)
    return space


def define(name, code, space):
    space.pop(name, None)
    exec(code, space)
    return space[name]


def verdict(checker, answer, capsys):
    capsys.readouterr()
    checker(answer)
    [line] = capsys.readouterr().out.splitlines()
    return line


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_the_solution_passes_and_the_wrong_answer_does_not(path, capsys):
    found = exercises(path)
    space = chapter_space(path) if found else {}
    for checker, answer, solution, wrong in found:
        bad = define(answer, wrong, space)
        with pytest.raises(Exception) as refusal: space[checker].check(bad)
        assert not isinstance(refusal.value, NOT_A_REFUSAL), f"{answer}: {refusal.value!r}"
        assert verdict(space[checker], bad, capsys).startswith(f"☒ {answer}: not yet: ")
        good = define(answer, solution, space)
        space[checker].check(good)
        assert verdict(space[checker], good, capsys) == f"☑ {answer}: solved"
