"""An exercise says in one line how it stands, whatever an answer does; the map knows every chapter."""
import numpy as np
import pytest
from fastcore.test import test_close as close
from hypothesis import given
from hypothesis import strategies as st

from mmfer.core import MmferError
from mmfer.lesson import CHAPTERS, draw_map, exercise


def said(check, answer, capsys):
    capsys.readouterr()
    exercise(check)(answer)
    [line] = capsys.readouterr().out.splitlines()
    return line


def doubles(f):
    close(f(np.arange(3.0)), 2 * np.arange(3.0))
    assert f(np.ones(1))[0] == 2, "twice one is two"


def double(x): return 2 * x
def half(x): return x / 2
def twice_but_one(x): return 2 * x if len(x) > 1 else x
def lost(x): return x.nothing
def stub(x): raise NotImplementedError


@pytest.mark.parametrize("answer, line", [
    (double, "☑ double: solved"),
    (stub, "☐ stub: not started yet"),
    (half, "☒ half: not yet: [0. 0.5 1. ] came out, [0. 2. 4.] was wanted"),
    (twice_but_one, "☒ twice_but_one: not yet: twice one is two"),
    (lost, "☒ lost: not yet: AttributeError in `def lost(x): return x.nothing`: "
           "'numpy.ndarray' object has no attribute 'nothing'"),
])
def test_each_answer_gets_its_line(answer, line, capsys):
    assert said(doubles, answer, capsys) == line


@given(words=st.text())
def test_whatever_an_answer_raises_is_one_line(words):
    def check(answer): answer()
    def raises(): raise ValueError(words)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lines.append)
        exercise(check)(raises)
    [line] = lines
    assert len(line.splitlines()) == 1 and line.startswith("☒ raises: not yet: ValueError")


def test_the_check_itself_raises():
    with pytest.raises(AssertionError): exercise(doubles).check(half)
    exercise(doubles).check(double)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_chapter_is_marked_on_the_map(chapter):
    marked = [t.get_text() for t in draw_map(chapter).axes[0].texts if t.get_weight() == "bold"]
    assert len(marked) > 1  # the first says where we are


def test_an_unknown_chapter_is_refused():
    with pytest.raises(MmferError, match="chapter 'sound' is unknown"): draw_map("sound")
