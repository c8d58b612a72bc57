"""The capstone: its form, what it decides, what it says when something is amiss, and that it goes on."""
import copy
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from execnb.shell import CaptureShell

from mmfer import core, stages
from mmfer.core import MmferError, pick_tier
from mmfer.corpus import Corpus
from mmfer.explain import even_shares
from mmfer.model import MultimodalFER, example_clip
from mmfer.toy import make_toy

NOTEBOOK = json.loads((Path(__file__).parent.parent / "nbs/21_capstone.ipynb").read_text(encoding="utf-8"))
CELLS = {cell["id"]: cell for cell in NOTEBOOK["cells"]}
FORM = "".join(CELLS["settings"]["source"])
SETUP = "1d827b9f"


class Pictures(list):
    "Stands for a place in the notebook where a picture is drawn again and again."

    def display(self, *shown, display_id=False):
        self.extend(shown)
        return self

    update = list.append


def run(until=None, pictures=None, **settings):
    "The names after the notebook's cells, or those up to `until`, with settings as papermill sets them."
    pictures = Pictures() if pictures is None else pictures
    names = {"get_ipython": lambda: SimpleNamespace(set_custom_exc=lambda *_: None)}
    for place, cell in CELLS.items():
        if cell["cell_type"] != "code" or place == SETUP: continue
        code = "".join(cell["source"])
        exec(compile(code, place, "exec"), names)
        if "import display\n" in code: names["display"] = pictures.display
        if place == "settings": names |= settings
        if place == until: break
    return names


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.fixture
def a100(monkeypatch):
    "A machine that says it has a GPU."
    monkeypatch.setattr(core, "this_machine", lambda: pick_tier("cuda", 39.6, 8))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")


# The form


def test_colab_offers_a_gpu_and_a_form():
    assert NOTEBOOK["metadata"]["accelerator"] == "GPU"
    assert NOTEBOOK["metadata"]["colab"] == {"gpuType": "A100"}
    assert CELLS["settings"]["metadata"] == {"cellView": "form", "tags": ["parameters"]}


def test_every_setting_is_a_field_and_is_explained():
    title, *fields = FORM.splitlines()
    names = [re.match(r"(\w+) = .+ #@param [\[{]", field)[1] for field in fields]
    text = "".join("".join(cell["source"]) for cell in CELLS.values() if cell["cell_type"] == "markdown")
    assert title.startswith("#@title")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.M)) == sorted({*names})


def test_only_one_cell_is_a_form():
    forms = [place for place, cell in CELLS.items() if "#@param" in "".join(cell["source"])]
    assert forms == ["settings"]


# What it decides


def test_without_a_gpu_it_takes_cartoons(quick):
    names = run("plan")
    assert (names["data"], names["preset"], names["cartoons"]) == ("toy", "tiny", True)


@pytest.mark.parametrize("memory, preset", [(14.7, "lightweight"), (39.6, "full")])
def test_with_a_gpu_it_takes_people_and_what_the_memory_allows(quick, a100, monkeypatch, memory, preset):
    monkeypatch.setattr(core, "this_machine", lambda: pick_tier("cuda", memory, 8))
    names = run("plan")
    assert (names["data"], names["preset"], names["cartoons"]) == ("ravdess", preset, False)


def test_a_toy_stays_tiny_on_a_gpu(quick, a100, tmp_path):
    (tmp_path / "truth.json").touch()
    assert run("plan", data=str(tmp_path))["preset"] == "tiny"
    assert run("plan", data="toy")["preset"] == "tiny"


def test_the_same_settings_lead_to_the_same_folder_and_others_to_another(tmp_path):
    keep = str(tmp_path)
    usual = run("plan", keep=keep, data="ravdess", preset="full")["out"]
    assert run("plan", keep=keep, data="ravdess", preset="full")["out"] == usual
    others = [dict(seed=1), dict(epochs=3), dict(weights="none"), dict(folds="all folds"), dict(actors="1-4"),
              dict(stages="one"), dict(preset="tiny")]
    settings = [dict(data="ravdess", preset="full") | other for other in others]
    folders = [run("plan", keep=keep, **setting)["out"] for setting in settings]
    assert len({usual, *folders}) == 1 + len(others)
    assert run("plan", keep=keep, out=str(tmp_path / "mine"))["out"] == tmp_path / "mine"


def test_on_drive_only_what_must_survive(quick, monkeypatch):
    mounted = []
    drive = SimpleNamespace(mount=mounted.append)
    colab = SimpleNamespace(drive=drive)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    names = run("places", keep="drive")
    assert mounted == ["/content/drive"]
    assert names["place"] == Path("/content/drive/MyDrive/mmfer-runs")
    assert Path("/content/drive") not in names["local"].parents


# What it says


@pytest.mark.parametrize("setting, told", [
    (dict(preset="huge"), "preset 'huge' is unknown: choose one of tiny, lightweight, full"),
    (dict(folds="six"), "folds 'six' is unknown: choose one of one split, all folds"),
    (dict(weights="mine"), "weights 'mine' is unknown: choose one of pretrained, none"),
    (dict(keep="drive"), "keep = 'drive' is for Colab only: write a folder in its place"),
    (dict(stages="two"), "stages 'two' is unknown: choose one of one, three, auto"),
])
def test_a_wrong_setting_is_told_before_anything_begins(quick, setting, told):
    with pytest.raises(MmferError, match=re.escape(told)): run("disk", **setting)


def test_a_full_disk_is_told_before_anything_is_fetched(quick, monkeypatch):
    full = SimpleNamespace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(MmferError, match="models and checkpoints need .* GB in .* the disk has 0.001 GB"):
        run("disk", data="toy")


def test_weights_that_cannot_be_fetched_are_told_before_anything_else(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MmferError): run("step-weights", data="ravdess", preset="lightweight", actors="1-4")
    assert not [*tmp_path.rglob("*.npz")]


def test_a_mistake_is_one_sentence_without_a_traceback():
    shell = CaptureShell()
    shell.run_cell("from mmfer.core import MmferError")
    shell.run_cell("".join(CELLS["one-sentence"]["source"]))
    done = shell.run_cell("raise MmferError('the disk is full: make room')")
    assert isinstance(done.exception, MmferError), "a run without a screen must still see the error"
    said = re.sub(r"\x1b\[\d+m", "", done.stdout + done.stderr)  # without colours
    assert "MmferError: the disk is full: make room" in said and "Traceback" not in said


# Looking inside


def test_without_attention_all_segments_and_all_sound_frames_count_the_same():
    function, _ = "".join(CELLS["attention6"]["source"]).split("\n\n\ndef ask_again")
    names = dict(copy=copy, torch=torch)
    exec(function, names)
    model = MultimodalFER.from_preset("tiny", ("happy", "sad")).eval()
    queries = [weight for name, weight in model.named_parameters() if name.endswith("query")]
    for query in queries: torch.nn.init.normal_(query)
    clip = example_clip(model)
    clip["audio"].normal_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(**clip)
        even = names["without_attention"](model)(**clip)
        assert torch.equal(model(**clip).logits, before.logits), "the model itself has changed"
    assert (before.temporal_attention - 1 / 8).abs().max() > 0.01
    torch.testing.assert_close(even.temporal_attention, torch.full((1, 8), 1 / 8))
    shares = torch.tensor(even_shares(even.audio_attention.shape[-1], 8)).float()
    torch.testing.assert_close(even.audio_attention[0], shares)


# That it goes on


def test_the_curves_show_where_a_stage_begins():
    names = dict(plt=plt, pd=pd, np=np, SYSTEMS=dict(fused="lfm2"))
    exec("".join(CELLS["curves"]["source"]), names)
    stages = ["branches", "branches", "fusion", "end_to_end"]
    rows = [dict(stage=stage, train_loss=2.0, val_uar=0.5) for stage in stages]
    for ax in names["draw_curves"]({"fused": rows}, "fold 1").axes:
        curve, *borders = ax.lines
        assert curve.get_xdata().tolist() == [1, 2, 3, 4]
        assert [border.get_xdata()[0] for border in borders] == [2.5, 3.5]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    "Three people in a CSV file, who have no RAVDESS names, genders or intensities."
    folder = tmp_path_factory.mktemp("people")
    table = Corpus.from_folder(make_toy(folder / "toy", 3, 0, 16, progress=False)).table
    table = table[table.emotion.isin(["happy", "sad"])]
    table.assign(path=[str(Path(path).relative_to(folder)) for path in table.path]).to_csv(
        folder / "people.csv", columns=["path", "emotion", "speaker"], index=False)
    return folder / "people.csv"


def test_own_clips_in_all_folds_and_again(quick, people, tmp_path, monkeypatch):
    settings = dict(data=str(people), keep=str(tmp_path), folds="all folds", faces="none")
    pictures = Pictures()
    run(pictures=pictures, **settings)
    out = next((tmp_path / "runs").iterdir())
    metrics = json.loads((out / "metrics.json").read_text())
    assert sorted(folder.name for folder in out.glob("fold_*")) == ["fold_1", "fold_2", "fold_3"]
    assert metrics["fused"]["n_clips"] == len(pd.read_csv(people))
    assert metrics["unseen_speakers"] and metrics["seed"] == 0
    assert {"explanation.png", "explanation.html", "other.html"} <= {file.name for file in out.iterdir()}
    curves = [picture for picture in pictures if hasattr(picture, "axes")]
    assert len(curves) > 3 * 3 * 3, "three folds, three systems, three epochs: a picture after each"

    def not_again(*args, **kwargs): raise AssertionError("a finished training was begun again")
    monkeypatch.setattr(stages, "_train_stage", not_again)
    again = Pictures()
    run(pictures=again, **settings)
    then = json.loads((out / "metrics.json").read_text())
    assert metrics | dict(seconds=0) == then | dict(seconds=0)
    assert len(again) >= 3 * 3, "curves of what is finished"
