"""The folder of a run: whole files, one training at a time, a model with all that it needs."""
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfer import runs
from mmfer.core import MmferError
from mmfer.model import MultimodalFER
from mmfer.processor import Processor
from mmfer.runs import (
    Checkpoints, RunFolder, checksum, durable_write, load_run, require_same_run, rng_state, run_facts,
    save_run, set_rng_state, smaller_setting, user_errors, weights_checksum)
from mmfer.trainer import TrainConfig
from mmfer.weights import Origin

EMOTIONS = ("happy", "sad", "cross")
SPLIT = dict(corpus="toy", train=["01", "02"], val=["03"])


@pytest.fixture(scope="module")
def model():
    return MultimodalFER.from_preset("tiny", EMOTIONS)


@pytest.fixture(scope="module")
def processor(model):
    return Processor.for_model(model.config, faces="none", n_frames=4)


# files

def test_a_file_is_all_old_or_all_new(tmp_path):
    path = tmp_path / "file"
    with durable_write(path) as f: f.write("old")
    with pytest.raises(ConnectionError), durable_write(path) as f:
        f.write("ne")
        raise ConnectionError
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with durable_write(path, "wb") as f: f.write(b"new")
    assert path.read_text() == "new"


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_checksum_sees_every_bit(content, data):
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        other = Path(folder) / "other"
        one.write_bytes(content)
        other.write_bytes(changed)
        assert checksum(one) != checksum(other)
        other.write_bytes(content)
        assert checksum(one) == checksum(other)


def test_drawing_goes_on_where_it_was():
    cpu = torch.device("cpu")
    def draw(): return random.random(), np.random.rand(), torch.rand(3).tolist()
    draw()
    state = rng_state(cpu)
    first = draw()
    assert draw() != first
    set_rng_state(state, cpu)
    assert draw() == first


def test_newer_checkpoints_replace_older_ones_but_those_to_keep(tmp_path):
    saves = Checkpoints(tmp_path)
    assert saves.newest() is None
    for epoch, batch, keep in ((0, 0, False), (1, 0, True), (1, 30, False), (2, 4, False)):
        saves.save(dict(at=(epoch, batch)), epoch, batch, keep)
        assert saves.load() == dict(at=(epoch, batch))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["00001-0000000.pt", "00002-0000004.pt"]
    assert len([*tmp_path.iterdir()]) == 4


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    saves = Checkpoints(tmp_path)
    saves.save(dict(x=1), 0, 0)
    (tmp_path / "00000-0000001.pt").write_bytes(b"half")  # cut off before its .json
    assert saves.load() == dict(x=1)
    saves.save(dict(x=2), 0, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000-0000002.json", "00000-0000002.pt"]


# models

@pytest.mark.parametrize("place", ["run", "run/best"])
def test_what_is_saved_is_loaded(place, model, processor, tmp_path):
    save_run(tmp_path / "run" / "best", model, processor, SPLIT)
    loaded, how, split = load_run(tmp_path / place)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert loaded.config == model.config and how == processor and split == SPLIT


def test_a_model_may_come_alone(model, tmp_path):
    save_run(tmp_path, model)
    assert load_run(tmp_path)[1:] == (None, None)


def test_what_is_lost_or_does_not_fit_is_named(model, processor, tmp_path):
    with pytest.raises(MmferError, match="nowhere/at/all cannot be read .*pass the folder of a run") as e:
        load_run("nowhere/at/all")
    assert "\n" not in str(e.value)
    save_run(tmp_path, model, Processor(image_size=224, grid=14, faces="none"), SPLIT)
    with pytest.raises(MmferError, match="pictures of 224 pixels"): load_run(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "split.json").write_text("{")
    with pytest.raises(MmferError, match="split.json cannot be read"): load_run(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MmferError, match="holds no model.safetensors"): load_run(tmp_path)


def test_a_model_on_the_hub_is_fetched_whole(model, processor, tmp_path, monkeypatch):
    save_run(tmp_path / "fetched", model, processor, SPLIT)
    asked = []

    def fetch(name):
        asked.append(name)
        return str(tmp_path / "fetched")

    monkeypatch.setattr(runs, "snapshot_download", fetch)
    assert load_run("someone/a-model")[1:] == (processor, SPLIT) and asked == ["someone/a-model"]


# folders

def test_a_folder_is_taken_once(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.require_room(resume=False)
    run.require_room(resume=True)
    run.checkpoints.save({}, 0, 0)
    run.require_room(resume=True)
    with pytest.raises(MmferError, match="already holds a run: resume it"): run.require_room(resume=False)
    lost = RunFolder(tmp_path / "lost")
    lost.write_json("training_history.json", [])
    for resume in (True, False):
        with pytest.raises(MmferError, match="without a checkpoint"): lost.require_room(resume)


def test_one_training_at_a_time(tmp_path):
    with RunFolder(tmp_path).lock():
        with pytest.raises(MmferError, match="in use by another training"), RunFolder(tmp_path).lock(): pass
    with RunFolder(tmp_path).lock(): pass


@given(st.lists(st.integers(0, 255), min_size=1, max_size=8), st.data())
def test_a_checksum_of_weights_sees_every_bit_and_every_name(values, data):
    module = torch.nn.Module()
    module.register_buffer("a", torch.tensor(values, dtype=torch.uint8))
    other = torch.nn.Module()
    place = data.draw(st.integers(0, len(values) - 1))
    changed = torch.tensor(values, dtype=torch.uint8)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    other.register_buffer("a", changed)
    renamed = torch.nn.Module()
    renamed.register_buffer("b", module.a)
    assert len({*map(weights_checksum, (module, other, renamed))}) == 3
    other.a = module.a.clone()
    assert weights_checksum(other) == weights_checksum(module)


def test_a_model_is_replaced_whole(model, processor, tmp_path):
    run = RunFolder(tmp_path)
    run.save_model(model, "best", processor, SPLIT)

    class Full:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "model.safetensors").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(MmferError, match="No space left on device.*make room, then resume"):
        run.save_model(Full(), "best")
    assert load_run(tmp_path)[1:] == (processor, SPLIT)
    run.save_model(model, "best", processor, SPLIT)
    assert not (tmp_path / ".best").exists()


# the same run

CLIPS = pd.Series({"a": 0, "b": 1, "c": 0})


def facts(model, train=CLIPS, val=CLIPS, frozen=None, easiest=None, processes=1, **changes):
    clips = dict(training=train, validation=val)
    return run_facts(model, TrainConfig(**changes), clips, frozen or {}, easiest, processes)


@pytest.mark.parametrize("changes, said", [
    (dict(seed=7), "seed=0, now it is 7"),
    (dict(freeze=["audio"]), r"freeze=\[\], now it is \['audio'\]"),
    (dict(train=CLIPS[:2]), "a training set of 3 clips, now it has 2; they differ in c"),
    (dict(val=CLIPS.replace(1, 2)), "a validation set of 3 clips, now it has 3; they differ in b"),
    (dict(train=CLIPS[::-1]), "the same training clips in another order"),
    (dict(easiest=[2, 0, 1]), "another difficulty of its clips"),
    (dict(processes=2), r"1 process\(es\), now there are 2")])
def test_the_first_difference_is_named(changes, said, model, tmp_path):
    with pytest.raises(MmferError, match=f"{tmp_path} was trained with {said}: go on as it began"):
        require_same_run(facts(model), facts(model, **changes), tmp_path)


def test_a_difference_deep_in_the_model_is_named(model, tmp_path):
    other = MultimodalFER.from_preset("tiny", EMOTIONS, "early")
    with pytest.raises(MmferError, match="trained with fusion.kind='lfm2', now it is 'early'"):
        require_same_run(facts(model), facts(other), tmp_path)


def test_other_frozen_weights_are_named(model, tmp_path):
    tower = {"visual.vision": model.visual.vision}
    require_same_run(facts(model, frozen=tower), facts(model, frozen=dict(tower)), tmp_path)
    other = MultimodalFER.from_preset("tiny", EMOTIONS).visual.vision
    other.load_state_dict(model.visual.vision.state_dict())
    with torch.no_grad(): next(other.parameters()).view(-1)[0] += 1e-7  # a single bit is enough
    said = f"{tmp_path} was trained with other weights in its frozen visual.vision"
    with pytest.raises(MmferError, match=said):
        require_same_run(facts(model, frozen=tower), facts(model, frozen={"visual.vision": other}), tmp_path)
    with pytest.raises(MmferError, match="other weights in its frozen visual.vision"):
        require_same_run(facts(model, frozen=tower), facts(model), tmp_path)


def test_other_origins_are_named(model, tmp_path):
    then = facts(model)
    other = MultimodalFER(model.config)
    other.config = replace(model.config, origins=[Origin("audio", "a.nemo", "1", 2, 17, "none", 1.0)])
    with pytest.raises(MmferError, match="origins.audio=None, now it is 'a.nemo 1, 2 layers'"):
        require_same_run(then, facts(other), tmp_path)


def test_what_does_not_change_the_result_may_differ(model, tmp_path):
    free = dict(
        workers=3, precision="bf16", keep_last=False, save_every=2, save_batches=5, trackers=["tensorboard"])
    assert {*free} == {*runs.MAY_CHANGE}
    require_same_run(facts(model), facts(model, **free), tmp_path)


# errors

def test_the_next_smaller_setting(model):
    half = smaller_setting(TrainConfig(batch_size=8, accumulation=2), model)
    assert half == "batch_size=4 with accumulation=4"
    assert smaller_setting(TrainConfig(batch_size=1), model) == "gradient_checkpointing=True"
    least = TrainConfig(batch_size=1, gradient_checkpointing=True)
    assert smaller_setting(least, model).startswith("shorter clips")
    deeper = MultimodalFER.from_preset("tiny", EMOTIONS)
    deeper.config.audio.layers = 17
    assert smaller_setting(least, deeper) == "the preset 'lightweight'"


def test_other_errors_pass(model):
    for error in (KeyError("x"), MmferError("one sentence")):
        with pytest.raises(type(error)) as e, user_errors(TrainConfig(), model): raise error
        assert e.value is error
    told = MmferError("Caught MmferError in DataLoader worker process 0.\nStack\nMmferError: clip is gone")
    with pytest.raises(MmferError, match="^clip is gone$"), user_errors(TrainConfig(), model): raise told


def test_the_split_is_plain_json(model, tmp_path):
    save_run(tmp_path, model, split=SPLIT)
    assert json.loads((tmp_path / "split.json").read_text()) == SPLIT
