"""The rules that the code keeps: which module knows which, what is explained, how a line is written."""
import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

from mmfer.corpus import RAVDESS_EMOTIONS

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "mmfer").glob("[a-z]*.py"))
WRITTEN = [p for folder in ("mmfer", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))
           if p.name != "_modidx.py"]  # which nbdev writes
module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def module_but(*names):
    others = [p for p in MODULES if p.stem not in names]
    return pytest.mark.parametrize("path", others, ids=lambda p: p.stem)


file = pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))

# A module imports only from those before it; `lesson` is for the chapters alone.
ORDER = ("core", "lesson", "media", "corpus", "toy", "faces", "processor", "audio", "visual", "fusion",
         "classifier", "weights", "model", "losses", "augment", "cache", "runs", "trainer", "stages",
         "evaluate", "explain", "truth", "page", "errors", "prepare", "download", "features", "ablations",
         "cli")


PUBLIC = re.compile(r"^__all__ = \[.*?\]\n", re.S | re.M)


@functools.cache
def source(path):
    "A file with the list of its public names left empty: nbdev writes and wraps that."
    return PUBLIC.sub(lambda m: "\n" * m[0].count("\n"), path.read_text(encoding="utf-8"))


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path, *kinds):
    return [n for n in ast.walk(tree(path)) if isinstance(n, kinds)]


def tokens(path, kind):
    return [t for t in tokenize.generate_tokens(io.StringIO(source(path)).readline) if t.type == kind]


def public_names(path):
    [found] = [n.value for n in nodes(path, ast.Assign) if ast.unparse(n.targets[0]) == "__all__"]
    return ast.literal_eval(found)


def require_none(found):
    "Fail with all that was found, one on a line."
    found = [*map(str, found)]
    assert not found, "\n" + "\n".join(found)


# Which module knows what


def imports(path):
    "Names of the modules of mmfer that a module imports, wherever in it."
    for node in nodes(path, ast.ImportFrom):
        name = node.module or ""
        if node.level or name.split(".")[0] == "mmfer": yield name.removeprefix("mmfer").lstrip(".")
    for node in nodes(path, ast.Import):
        yield from (a.name.removeprefix("mmfer.") for a in node.names if a.name.startswith("mmfer."))


@module
def test_no_arrow_runs_back_up(path):
    before = {"", *ORDER[:ORDER.index(path.stem)]} - {"lesson"}  # "": the package itself, for its version
    require_none({*imports(path)} - before)


@module_but("corpus", "toy")
def test_nothing_but_corpus_and_toy_knows_the_eight_emotions(path):
    explained = {node.body[0].value for node in nodes(path, ast.Module, ast.ClassDef, ast.FunctionDef)
                 if ast.get_docstring(node) is not None}
    texts = [n for n in nodes(path, ast.Constant) if isinstance(n.value, str) and n not in explained]
    require_none([n.value for n in texts if {*re.findall(r"\w+", n.value)} & {*RAVDESS_EMOTIONS}])
    if path.stem not in ("features", "download"):  # which read and fetch files of RAVDESS
        require_none([line for line in source(path).splitlines() if "RAVDESS_EMOTIONS" in line])


@module_but("corpus", "toy", "download", "cli")
def test_people_are_speakers_but_in_ravdess(path):
    named = {n.name for n in nodes(path, ast.FunctionDef, ast.ClassDef)}
    named |= {n.arg for n in nodes(path, ast.arg)} | {n.id for n in nodes(path, ast.Name)}
    require_none([name for name in named if re.search(r"(^|_)actors?(_|$)", name, re.I)])


OTHER_VERBS = re.compile(r"_?(check|refuse|validate|ensure|must)_|.*_problems$")


@module
def test_checks_are_called_require(path):
    defined = {n.name for n in nodes(path, ast.FunctionDef)} - {"check_shape"}  # which asserts, for lessons
    require_none(filter(OTHER_VERBS.match, defined))


@module_but("core")
def test_a_wrong_choice_is_told_by_choose(path):
    require_none([line for line in source(path).splitlines() if "choose one of" in line])


# What is explained

BY_THE_CLASS = ("__init__", "__call__", "forward", "run")  # methods that the docstring of the class explains


def unexplained(function, comments):
    "What a function lacks: a docstring, a comment on the line of a parameter."
    a = function.args
    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    if ast.get_docstring(function) is None and function.name not in BY_THE_CLASS: yield "has no docstring"
    for p in parameters:
        if p.arg not in ("self", "cls") and p.lineno not in comments: yield f"{p.arg} has no comment"


def methods(node):
    "The methods of a class that users call, properties apart."
    for item in node.body:
        if not isinstance(item, ast.FunctionDef): continue
        if "property" in map(ast.unparse, item.decorator_list): continue
        if not item.name.startswith("_") or item.name in BY_THE_CLASS: yield item


def unexplained_in_class(node, comments):
    if ast.get_docstring(node) is None: yield "has no docstring"
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and not {field.lineno, field.lineno - 1} & set(comments):
            yield f"{ast.unparse(field.target)} has no comment"
    for method in methods(node):
        yield from (f"{method.name}: {missing}" for missing in unexplained(method, comments))


@module
def test_what_is_public_is_explained(path):
    comments = {t.start[0] for t in tokens(path, tokenize.COMMENT)}
    look = {ast.FunctionDef: unexplained, ast.ClassDef: unexplained_in_class}
    public = [n for n in tree(path).body if type(n) in look and n.name in public_names(path)]
    require_none(f"{n.name}: {missing}" for n in public for missing in look[type(n)](n, comments))


# How a line is written


@file
def test_lines_are_at_most_110_characters(path):
    lines = enumerate(source(path).splitlines(), 1)
    require_none([f"line {n} has {len(line)}: {line}" for n, line in lines if len(line) > 110])


def is_computed(node):
    return any(isinstance(n, ast.Call | ast.Attribute | ast.Subscript) for n in ast.walk(node))


def is_packed(node):
    "`a, b = f(x), g(y)`: two steps on one line. A swap is one step."
    if not isinstance(node.targets[0], ast.Tuple) or not isinstance(node.value, ast.Tuple): return False
    if {*map(ast.unparse, node.targets[0].elts)} == {*map(ast.unparse, node.value.elts)}: return False
    return sum(map(is_computed, node.value.elts)) >= 2


@module
def test_one_line_does_one_thing(path):
    packed = [n.lineno for n in nodes(path, ast.Assign) if is_packed(n)]
    require_none([source(path).splitlines()[n - 1].strip() for n in packed])
    require_none([t.line.strip() for t in tokens(path, tokenize.OP) if t.string == ";"])
