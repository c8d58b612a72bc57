"""A training that was cut off goes on as if nothing had happened, or ends in one clear sentence."""
import os
import resource
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmfer import runs
from mmfer.core import MmferError, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.model import MultimodalFER, preset_config
from mmfer.runs import Checkpoints, RunFolder, checksum, disk_need
from mmfer.trainer import RECIPES, Trainer
from test_trainer import Clips, without_times

ROOT = Path(__file__).resolve().parent.parent
BATCHES = 5  # of an epoch: nine clips, two a batch; with accumulation 2 the last group is half
RECIPE = replace(RECIPES["tiny"], epochs=2, batch_size=2, accumulation=2, warmup_epochs=0.5, save_batches=1,
                 mixup=0.4, augment=["audio", "video"], class_weights=True, alignment_loss=0.1)


class Cut(Exception):
    "The power goes."


class Breaking(Trainer):
    "A trainer that is cut off before a batch."
    stop_at = -1

    def train_step(self, batch):
        if self.stop_at == 0: raise Cut
        self.stop_at -= 1
        return super().train_step(batch)


def trainer(out, resume=False, stop_at=-1, kind=Breaking, data=None, seed=0, **changes):
    seed_everything(seed)
    config = preset_config("tiny", RAVDESS_EMOTIONS)
    config.modality_dropout = 0.5
    recipe = replace(RECIPE, **changes)
    made = kind(MultimodalFER(config), recipe, data or Clips(9), Clips(3), out, resume=resume)
    made.stop_at = stop_at
    return made


def break_and_resume(out, stop_at, **changes):
    "The result of a run that was cut off before batch `stop_at` and resumed by a model that began elsewhere."
    with pytest.raises(Cut): trainer(out, stop_at=stop_at, **changes).fit()
    again = trainer(out, resume=True, seed=99, **changes)
    again.fit()
    return result(again)


def result(made):
    weights = {k: v.clone() for k, v in made.objective.state_dict().items()}
    return without_times(made.progress.history), weights


def assert_same(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(v, b[1][k]) for k, v in a[1].items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("whole") / "run")
    made.fit()
    return result(made)


# at once; within a group; between epochs; in the last, half group
@pytest.mark.parametrize("stop_at", [0, 3, BATCHES, 2 * BATCHES - 1])
def test_cut_off_anywhere_and_resumed_is_the_unbroken_run(stop_at, unbroken, tmp_path):
    assert_same(break_and_resume(tmp_path / "run", stop_at), unbroken)


@pytest.mark.parametrize("stop_at, changes", [
    (6, dict(schedule="restarts", save_batches=0)),
    (8, dict(schedule="plateau", warmup_epochs=0.0, keep_last=False)),
    (7, dict(workers=1))])
def test_other_settings_resume_exactly_too(stop_at, changes, tmp_path):
    whole = trainer(tmp_path / "whole", **changes)
    whole.fit()
    assert_same(break_and_resume(tmp_path / "cut", stop_at, **changes), result(whole))


def test_what_is_frozen_is_in_no_checkpoint_and_must_be_the_same(tmp_path):
    frozen = dict(freeze=["audio", "visual"], audio_loss=0.0, visual_loss=0.0, alignment_loss=0.0)
    whole = trainer(tmp_path / "whole", **frozen)
    whole.fit()
    with pytest.raises(Cut): trainer(tmp_path / "cut", stop_at=6, **frozen).fit()
    state = RunFolder(tmp_path / "cut").checkpoints.load()
    assert {name.split(".")[1] for name in state["objective"]} == {"fusion", "classifier", "class_weights"}
    with pytest.raises(MmferError, match="other weights in its frozen audio and visual: go on as it began"):
        trainer(tmp_path / "cut", resume=True, seed=99, **frozen).fit()
    again = trainer(tmp_path / "cut", resume=True, **frozen)  # built as before: the frozen parts are the same
    again.fit()
    assert_same(result(again), result(whole))


@pytest.mark.parametrize("changes", [
    dict(keep_last=True), dict(keep_last=False), dict(save_every=1), dict(freeze=["audio"])])
def test_a_run_needs_as_much_disk_as_it_says(changes, tmp_path, monkeypatch):
    "Measured when a new checkpoint is whole and the one before it is still there."
    config = preset_config("tiny", RAVDESS_EMOTIONS, "early")
    config.audio = replace(config.audio, d_model=256, layers=1)
    config.visual = replace(config.visual, ffn=8000)  # so that only the numbers in a file count
    sizes = []
    monkeypatch.setattr(runs, "checksum", lambda path: sizes.append(size(tmp_path)) or checksum(path))
    recipe = replace(RECIPES["tiny"], epochs=3, **changes)
    made = Trainer(MultimodalFER(config), recipe, Clips(2), Clips(2), tmp_path)
    made.fit()
    need = disk_need(made.model, made.config)
    assert size(tmp_path / "checkpoint") == pytest.approx(need["checkpoints"], rel=0.02)
    assert size(tmp_path / "best") + size(tmp_path / "last") == pytest.approx(need["models"], rel=0.01)
    assert need["total"] == sum(need.values()) / 2
    is_peak = not {"freeze", "save_every"} & changes.keys()  # elsewhere another file would be the largest
    if is_peak: assert max(sizes) == pytest.approx(need["total"], rel=0.02)
    assert max(sizes) < 1.02 * need["total"]


def size(folder): return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(MmferError, match="models and checkpoints need .*run, and the disk has 0.001 GB"):
        trainer(tmp_path / "run").fit()
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.fixture(scope="module")
def killing():
    "The script that kills trainings, and what its training ends with when nobody kills it."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try: import kill_resume
    finally: sys.path.pop(0)
    with tempfile.TemporaryDirectory() as folder: return kill_resume, kill_resume.in_child(Path(folder))[1]


def test_killed_with_sigkill_while_it_writes_a_checkpoint_and_resumed(killing):
    script, whole = killing
    killed = script.kill_once(8, script.MOMENTS[2], whole)
    assert killed["equal"] and len(whole["history"]) == 3, killed
    assert killed["resumed_from"] == dict(epoch=1, batch=2)


def test_a_fresh_folder_starts_and_a_finished_run_returns_at_once(tmp_path):
    first = trainer(tmp_path / "run", resume=True, epochs=1)
    rows = first.fit()
    again = trainer(tmp_path / "run", resume=True, epochs=1, seed=3, stop_at=0)  # a batch would raise
    assert again.fit() == rows
    assert_same(result(again), result(first))
    with pytest.raises(MmferError, match="already holds a run: resume it"):
        trainer(tmp_path / "run", epochs=1)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    "A run that was cut off in its first epoch."
    out = tmp_path_factory.mktemp("started") / "run"
    with pytest.raises(Cut): trainer(out, stop_at=3).fit()
    return out


@pytest.mark.parametrize("changes, said", [
    (dict(lr_fusion=0.5), "trained with lr_fusion=0.0006, now it is 0.5"),
    (dict(data=Clips(8)), "a training set of 9 clips, now it has 8; they differ in clip-8"),
    (dict(freeze=["fusion"]), r"freeze=\[\], now it is \['fusion'\]")])
def test_another_run_is_refused_with_the_difference(changes, said, started):
    with pytest.raises(MmferError, match=said): trainer(started, resume=True, **changes).fit()


def test_another_model_is_refused_with_the_difference(started):
    model = MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS)
    made = Trainer(model, RECIPE, Clips(9), Clips(3), started, resume=True)
    with pytest.raises(MmferError, match="modality_dropout=0.5, now it is 0.1"): made.fit()


def copy_of(folder, out):
    shutil.copytree(folder, out)
    return Checkpoints(out / "checkpoint").newest()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [
    lambda note: flip(note.with_suffix(".pt")),
    lambda note: os.truncate(note.with_suffix(".pt"), 1000),
    lambda note: note.with_suffix(".pt").unlink(),
    lambda note: note.write_text("{")], ids=["bit flipped", "truncated", "gone", "no JSON"])
def test_a_damaged_checkpoint_is_named(harm, started, tmp_path):
    note = copy_of(started, tmp_path / "run")
    harm(note)
    with pytest.raises(MmferError, match=f"{note.stem}.pt cannot be read .*delete it and {note.name}") as e:
        trainer(tmp_path / "run", resume=True).fit()
    assert "\n" not in str(e.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "pwned"),)
    saves = Checkpoints(tmp_path / "checkpoint")
    saves.save(dict(evil=Evil()), 0, 0)
    with pytest.raises(MmferError, match="holds more than plain data"): saves.load()
    assert not (tmp_path / "pwned").exists()


def test_two_runs_on_one_folder(tmp_path):
    made = trainer(tmp_path / "run", epochs=1)
    with RunFolder(tmp_path / "run").lock(), pytest.raises(MmferError, match="in use by another training"):
        made.fit()
    made.fit()


@pytest.mark.parametrize("limit", [2_000, 2_000_000], ids=["nothing fits", "part of a file fits"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(limit, tmp_path, unbroken):
    with pytest.raises(Cut): trainer(tmp_path / "run", stop_at=4).fit()
    before = RunFolder(tmp_path / "run").checkpoints.newest()
    made = trainer(tmp_path / "run", resume=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(MmferError, match="run cannot be read or written .*make room, then resume") as e:
            made.fit()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value)
    assert RunFolder(tmp_path / "run").checkpoints.newest() == before
    again = trainer(tmp_path / "run", resume=True)
    again.fit()
    assert_same(result(again), unbroken)


class OnDisk(Clips):
    "Clips in a folder that can be pulled out."
    def __init__(self, folder):
        super().__init__(9)
        self.folder = folder

    def __getitem__(self, i):
        clip = self.folder / f"clip-{i}.mp4"
        if not self.folder.exists(): raise MmferError(f"{clip} does not exist: check the path")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_folder_that_vanished_and_came_back(workers, tmp_path, unbroken):
    class Pulled(Breaking):
        def checkpoint(self, *args, **kwargs):
            super().checkpoint(*args, **kwargs)
            if self.progress.epoch == 1: data.folder.unlink()

    data = OnDisk(tmp_path / "disk")
    data.folder.touch()
    made = trainer(tmp_path / "run", kind=Pulled, data=data, workers=workers)
    with pytest.raises(MmferError, match=r"^\S+disk/clip-\d.mp4 does not exist: check the path$"): made.fit()
    data.folder.touch()
    again = trainer(tmp_path / "run", data=data, resume=True, workers=workers)
    again.fit()
    assert_same(result(again), unbroken)


def test_checkpoints_are_kept_every_so_many_epochs(tmp_path):
    made = trainer(tmp_path / "run", epochs=3, save_every=2, save_batches=0, augment=[])
    made.fit()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir()) == [
        "00002-0000000.json", "00002-0000000.pt", "00003-0000000.json", "00003-0000000.pt"]


def test_another_precision_goes_on(tmp_path):
    "As on another kind of GPU after a disconnect."
    with pytest.raises(Cut): trainer(tmp_path, stop_at=6, precision="no").fit()
    again = trainer(tmp_path, resume=True, precision="bf16")
    history = again.fit()
    assert [row["epoch"] for row in history] == list(range(again.config.epochs))


def test_a_state_without_a_scaler_is_taken_up_by_an_updater_that_has_one(tmp_path):
    made = trainer(tmp_path / "one")
    state = made.updater.state_dict()
    assert "scaler" not in state
    other = trainer(tmp_path / "other").updater
    other.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other.load_state_dict(state)
    assert other.accelerator.scaler.get_scale() == 8.0
    other.accelerator.scaler = None
