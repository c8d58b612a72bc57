"""Stages: frozen parts stand still, each starts from the best of the one before, a broken run goes on."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmfer import stages
from mmfer.core import MmferError, seed_everything, to_dict
from mmfer.model import FEROutput, MultimodalFER, preset_config
from mmfer.processor import collate, model_inputs
from mmfer.runs import disk_need
from mmfer.stages import (
    Stage, StagesConfig, diff_stages, difficulty, join_branches, judge_branches, load_stages, one_stage,
    plan_stages, run_stages, save_stages, stages_disk_need, three_stages, weights_in_stages)
from mmfer.trainer import RECIPES, TrainConfig, Trainer
from mmfer.weights import Origin

EMOTIONS = tuple("abcdefgh")
CONFIG = replace(RECIPES["tiny"], epochs=5, batch_size=2)  # 2, 1 and 2 epochs


class Clips(torch.utils.data.Dataset):
    "Made-up clips in memory; pulls the plug when the `stop`-th clip is read."
    def __init__(self, n=5, stop=None):
        g = torch.Generator().manual_seed(n)
        self.items = [self.made_up(n, i, g) for i in range(n)]
        self.rows = [dict(clip=x["clip"], label=x["label"]) for x in self.items]
        self.reads = 0
        self.stop = stop

    def made_up(self, n, i, g):
        audio = 0.1 * torch.randn(8_000, generator=g)
        video = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=g)
        return dict(audio=audio, label=i % 8, clip=f"clip-{n}-{i}", video=video)

    def __len__(self): return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        if self.reads == self.stop: raise KeyboardInterrupt
        return dict(self.items[i])


def build(**classifier):
    seed_everything(0)
    config = preset_config("tiny", EMOTIONS)
    config.classifier = replace(config.classifier, **classifier)
    return MultimodalFER(config)


def weights(folder): return load_file(folder / "model.safetensors")


def parts_that_moved(before, after):
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


def without_times(path):
    rows = json.loads(path.read_text())
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A whole run: its folder, the weights before it, the model. The classifier has BatchNorm, too."
    out = tmp_path_factory.mktemp("unbroken")
    model = build(norm="batch")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    return out, start, run_stages(model, three_stages(CONFIG), Clips(6), Clips(3), out)


def test_frozen_parts_stand_still_with_their_batchnorm(unbroken):
    out, start, _ = unbroken
    one, two, three = (weights(out / f / "best") for f in ("1_branches", "2_fusion", "3_end_to_end"))
    averages = {k.split(".")[0] for k in one if "running_mean" in k}
    assert averages == {"audio", "classifier"}
    assert parts_that_moved(start, one) == {"audio", "visual"}
    assert parts_that_moved(one, two) == {"fusion", "classifier"}
    assert parts_that_moved(two, three) == {"audio", "visual", "fusion", "classifier"}


def test_the_folder_of_a_run(unbroken):
    out, _, model = unbroken
    folders = {"1_branches", "2_fusion", "3_end_to_end", "best"}
    files = {"stages.json", "training_history.json", "weights.json", ".lock"}
    assert {p.name for p in out.iterdir()} == folders | files
    assert load_stages(out / "stages.json") == three_stages(CONFIG)
    rows = json.loads((out / "training_history.json").read_text())
    told = [("branches", 0), ("branches", 1), ("fusion", 0), ("end_to_end", 0), ("end_to_end", 1)]
    assert [(r["stage"], r["epoch"]) for r in rows] == told
    best = MultimodalFER.from_pretrained(out / "best").state_dict()
    last = weights(out / "3_end_to_end" / "best")
    assert all(torch.equal(v, best[k]) and torch.equal(v, last[k]) for k, v in model.state_dict().items())
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_each_stage_starts_from_the_best_of_the_one_before(tmp_path, monkeypatch):
    plan = three_stages(CONFIG)
    train_stage = stages._train_stage
    for rate in ("lr_branches", "lr_fusion", "lr_classifier"): setattr(plan.stages[2].config, rate, 0.0)

    def stop_before_the_end(model, before, stage, *rest, **settings):
        if stage.name == "end_to_end": raise KeyboardInterrupt
        return train_stage(model, before, stage, *rest, **settings)
    monkeypatch.setattr(stages, "_train_stage", stop_before_the_end)
    with pytest.raises(KeyboardInterrupt): run_stages(build(), plan, Clips(), Clips(3), tmp_path)
    monkeypatch.undo()

    mark = weights(tmp_path / "2_fusion" / "best")
    mark["classifier.mlp.2.bias"] = torch.arange(8.0)
    save_file(mark, tmp_path / "2_fusion" / "best" / "model.safetensors")
    model = run_stages(build(), plan, Clips(), Clips(3), tmp_path, resume=True)
    assert model.state_dict()["classifier.mlp.2.bias"].tolist() == list(range(8))


@pytest.mark.parametrize("stop", [12, 12 + 3, 12 + 6 + 5])  # the last clip of stage 1; within stages 2 and 3
def test_a_broken_run_ends_as_the_unbroken_one(tmp_path, unbroken, stop):
    out, _, model = unbroken
    plan = three_stages(CONFIG)
    for stage in plan.stages: stage.config.save_batches = 1
    with pytest.raises(KeyboardInterrupt):
        run_stages(build(norm="batch"), plan, Clips(6, stop), Clips(3), tmp_path)
    again = run_stages(build(norm="batch"), plan, Clips(6), Clips(3), tmp_path, resume=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert without_times(tmp_path / "training_history.json") == without_times(out / "training_history.json")


def test_a_finished_run_reads_no_clip_again(unbroken):
    out, _, model = unbroken
    data = Clips(6)
    again = run_stages(build(norm="batch"), three_stages(CONFIG), data, Clips(3), out, resume=True)
    assert data.reads == 0
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_spoilt_best_model_ends_in_one_sentence(tmp_path, unbroken):
    shutil.copytree(unbroken[0], tmp_path / "run")
    file = tmp_path / "run" / "2_fusion" / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MmferError, match="2_fusion/best/model.safetensors cannot be read"):
        again = build(norm="batch")
        run_stages(again, three_stages(CONFIG), Clips(6), Clips(3), tmp_path / "run", resume=True)


def test_what_comes_in_frozen_stays_frozen(tmp_path):
    model = build()
    model.visual.vision.requires_grad_(False)
    before = {k: v.clone() for k, v in model.visual.vision.state_dict().items()}
    run_stages(model, three_stages(CONFIG), Clips(), Clips(3), tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.visual.vision.state_dict().items())
    assert not any(p.requires_grad for p in model.visual.vision.parameters())
    assert all(p.requires_grad for p in model.fusion.parameters())


def loaded(*parts):
    "A tiny model that believes that these parts come from a checkpoint."
    model = build()
    note = dict(source="a checkpoint", revision="1", layers=2, held=2, licence="none", megabytes=1.0)
    model.config.origins = [Origin(part=part, **note) for part in parts]
    return model


def test_loaded_parts_thaw_in_the_last_stage(tmp_path):
    model = loaded("audio", "vision", "fusion")
    model.visual.freeze()
    inside = {part: f"{name}." for part, name in
              dict(audio="audio.encoder", vision="visual.vision", fusion="fusion.backbone").items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = three_stages(replace(CONFIG, thaw_vision=1, lr_branches_loaded=1e-3, lr_fusion_loaded=1e-3))
    run_stages(model, plan, Clips(), Clips(3), tmp_path)
    one, two, three = (weights(tmp_path / f / "best") for f in ("1_branches", "2_fusion", "3_end_to_end"))

    def moved(a, b): return {k for k in b if not torch.equal(a[k], b[k])}
    early = moved(before, one) | moved(one, two)
    assert early and not any(k.startswith(tuple(inside.values())) for k in early)
    late = moved(two, three)
    assert all(any(k.startswith(prefix) for k in late) for prefix in inside.values())
    assert not any("running" in k and k.startswith(inside["audio"]) for k in late)
    blocks = {k.split(".")[4] for k in late if k.startswith("visual.vision.encoder.")}
    assert blocks == {"1"} and not any(k.startswith("visual.vision.embeddings.") for k in late)
    assert not any(p.requires_grad for p in model.visual.vision.parameters())


def test_the_plan_of_the_weights_is_told_stage_by_stage(tmp_path):
    model = loaded("audio")
    plan = three_stages(CONFIG)
    table = weights_in_stages(model, plan)
    states = table.pivot(index="part", columns="stage", values="state")
    assert states.loc["audio"].to_dict() == dict(branches="frozen", fusion="frozen", end_to_end="trained")
    assert states.loc["fusion"].to_dict() == dict(branches="frozen", fusion="random", end_to_end="random")
    assert states.loc["vision"].to_dict() == dict(branches="random", fusion="frozen", end_to_end="random")
    stages._begin(model, plan, tmp_path / "run", resume=False)
    assert json.loads((tmp_path / "run" / "weights.json").read_text()) == table.to_dict("records")
    with torch.device("meta"): shapes = MultimodalFER(model.config)
    assert weights_in_stages(shapes, plan).equals(table)
    assert stages_disk_need(shapes, plan) == stages_disk_need(model, plan)


def test_a_run_with_other_weights_is_refused_even_when_it_is_finished(tmp_path):
    def weigh(source):
        model = loaded("audio")
        model.config.origins[0].source = source
        return model

    run_stages(weigh("a.nemo"), one_stage(CONFIG), Clips(2), Clips(3), tmp_path)
    run_stages(weigh("a.nemo"), one_stage(CONFIG), Clips(2), Clips(3), tmp_path, resume=True)
    said = "begun with other weights .audio is from a.nemo 1 2 of 2 there and from b.nemo 1 2 of 2 here."
    with pytest.raises(MmferError, match=said):
        run_stages(weigh("b.nemo"), one_stage(CONFIG), Clips(2), Clips(3), tmp_path, resume=True)


def size(folder): return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("keep", [0, 1])
def test_a_finished_stage_needs_no_checkpoint_any_more(keep, tmp_path):
    plan = three_stages(replace(CONFIG, save_every=keep))
    model = run_stages(build(), plan, Clips(), Clips(3), tmp_path)
    left = {p.parent.parent.name for p in tmp_path.glob("*/checkpoint/*.pt")}
    assert left == ({"1_branches", "2_fusion", "3_end_to_end"} if keep else set())
    need = stages_disk_need(model, plan)
    if not keep: assert size(tmp_path) == pytest.approx(need["models"], rel=0.03)
    assert size(tmp_path) < need["total"] == sum(need.values()) / 2


def test_a_checkpoint_left_by_a_kill_goes_with_the_next_start(tmp_path, unbroken):
    shutil.copytree(unbroken[0], tmp_path / "run")
    left = tmp_path / "run" / "1_branches" / "checkpoint"
    left.mkdir()
    run_stages(build(norm="batch"), three_stages(CONFIG), Clips(6), Clips(3), tmp_path / "run", resume=True)
    assert not left.exists()


def test_a_disk_that_is_too_small_for_all_stages_is_refused_at_once(tmp_path, monkeypatch):
    model = build()
    need = stages_disk_need(model, three_stages(CONFIG))["total"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=need - 1))
    with pytest.raises(MmferError, match="models and checkpoints need .* make room"):
        run_stages(model, three_stages(CONFIG), Clips(), Clips(3), tmp_path / "run")
    assert not (tmp_path / "run" / "stages.json").exists()
    assert need > disk_need(model, CONFIG)["total"]


def test_whoever_watches_sees_all_stages(tmp_path):
    told = []
    def tell(history, seconds_left): told.append(([row["stage"] for row in history], seconds_left))
    run_stages(build(), three_stages(CONFIG), Clips(), Clips(3), tmp_path, on_epoch=tell)
    names = ["branches", "branches", "fusion", "end_to_end", "end_to_end"]
    assert [stages for stages, _ in told] == [names[:1], names[:2], names[:3], names[:4], names, names]
    assert all(left > 0 for _, left in told[:4]) and [left for _, left in told[4:]] == [0, 0]
    first = json.loads((tmp_path / "training_history.json").read_text())[0]["seconds"]
    assert told[0][1] == pytest.approx(4 * first)  # one epoch to come here and three in later stages


@pytest.mark.parametrize("name, pretrained, n", [
    ("one", True, 1), ("three", False, 3), ("auto", True, 3), ("auto", False, 1)])
def test_a_plan_is_chosen_by_name(name, pretrained, n):
    assert len(plan_stages(name, CONFIG, pretrained).stages) == n
    with pytest.raises(MmferError, match="stages 'two' is unknown: choose one of one, three, auto"):
        plan_stages("two", CONFIG, pretrained)


@pytest.mark.parametrize("system", ["audio_only", "visual_only", "late"])
def test_systems_that_lack_a_part(tmp_path, system):
    fresh = MultimodalFER.from_preset("tiny", EMOTIONS, system)
    model = run_stages(fresh, three_stages(CONFIG), Clips(), Clips(3), tmp_path)
    assert model.config.fusion.kind == system and (tmp_path / "best" / "config.json").is_file()


def test_the_fused_logits_teach_the_branches_nothing():
    model = build().eval()
    inputs = model_inputs(collate([Clips()[i] for i in range(3)]))
    with judge_branches(model): out = model(**inputs)
    assert torch.equal(out.logits, join_branches(out))
    assert not out.logits.requires_grad and out.audio_logits.requires_grad
    assert torch.allclose(out.probabilities.sum(1), torch.ones(3))
    assert model(**inputs).logits.requires_grad, "the block is over, but the branches are still judged"


def test_a_branch_without_a_modality_is_left_out():
    a, v = torch.randn(2, 2, 8)
    here = dict(audio_present=torch.tensor([True, False]), visual_present=torch.tensor([True, True]))
    joint = join_branches(FEROutput(audio_logits=a, visual_logits=v, **here))
    assert torch.allclose(joint[0], (a.log_softmax(-1) + v.log_softmax(-1))[0] / 2)
    assert torch.allclose(joint[1], v.log_softmax(-1)[1])
    alone = join_branches(FEROutput(audio_logits=a, audio_present=torch.tensor([True, True])))
    assert torch.allclose(alone, a.log_softmax(-1))


@pytest.mark.parametrize("plan", [*map(three_stages, RECIPES.values()), one_stage(CONFIG)])
def test_json_round_trip(tmp_path, plan):
    save_stages(plan, tmp_path / "stages.json")
    assert load_stages(tmp_path / "stages.json") == plan


@given(st.integers(3, 100))
def test_three_stages_take_as_many_epochs_as_one(epochs):
    each = [s.config.epochs for s in three_stages(TrainConfig(epochs=epochs)).stages]
    assert sum(each) == epochs and min(each) >= 1 and abs(each[0] - each[2]) <= 1


@pytest.mark.parametrize("epochs", [1, 2])
def test_three_stages_need_three_epochs(epochs):
    config = TrainConfig(epochs=epochs)
    with pytest.raises(MmferError, match=f"cannot share {epochs} epochs"): three_stages(config)


@given(st.integers(0, 2), st.sampled_from(["epochs", "batch_size", "patience", "seed"]), st.integers(50, 99))
def test_what_differs_is_named_with_both_values(i, name, value):
    other = three_stages(CONFIG)
    before = getattr(other.stages[i].config, name)
    setattr(other.stages[i].config, name, value)
    assert diff_stages(three_stages(CONFIG), other) == {f"stages.{i}.config.{name}": (before, value)}


def spoil(path, value=None):
    "Plain data of a plan with one key changed."
    data = to_dict(three_stages(CONFIG))
    *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    place = data
    for key in keys: place = place[key]
    place[last] = value
    return data


@pytest.mark.parametrize("path, value", [
    ("stages.1.config.lrr", 1), ("stages.2.judge", "fused"), ("stagess", []), ("stages.0.config.epochs", "3"),
    ("stages.1.config.epochs", 2.5), ("stages.0.config.epochs", 0), ("stages.2.config.epochs", -3),
    ("stages.1.config.batch_size", 0), ("stages.1.config.lr_fusion", -1.0),
    ("stages.1.config.lr_fusion", float("nan")),
    ("stages.1.config.freeze.0", "head"), ("stages.2.config.schedule", "step"), ("stages.1.name", "../up"),
    ("stages.1.name", "branches"), ("stages.1.judged", "mine"), ("stages.0.config.curriculum", 0.5),
    ("stages.0", 3), ("stages.1", None), ("stages.1.config", 3), ("stages", []), ("stages", None)])
def test_a_wrong_key_is_named_with_its_file(tmp_path, path, value):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(spoil(path, value)))
    with pytest.raises(MmferError) as e: load_stages(file)
    said = str(e.value)
    assert said.startswith(f"{file}: ") and path in said and "\n" not in said


def test_a_lost_key_is_named(tmp_path):
    data = spoil("stages.1", {"config": {}})
    (tmp_path / "mine.json").write_text(json.dumps(data))
    with pytest.raises(MmferError, match="stages.1.name .*required"): load_stages(tmp_path / "mine.json")


def test_a_file_that_is_no_plan(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "number.json").write_text("3")
    for name in ("broken.json", "number.json", "nothing.json"):
        with pytest.raises(MmferError, match=name) as e: load_stages(tmp_path / name)
        assert "\n" not in str(e.value)


def test_a_stage_is_checked_when_it_is_built():
    with pytest.raises(MmferError, match="judged|2"): Stage("one", CONFIG, "mine")
    with pytest.raises(MmferError, match="stages|0"): StagesConfig([])


def test_other_stages_are_refused(unbroken):
    out, _, _ = unbroken
    def again(plan, **how): return run_stages(build(norm="batch"), plan, Clips(6), Clips(3), out, **how)
    with pytest.raises(MmferError, match="already holds a run"): again(three_stages(CONFIG))
    longer = three_stages(CONFIG)
    longer.stages[2].config.epochs = 9
    with pytest.raises(MmferError, match="stages.2.config.epochs is 2 there and 9 here"):
        again(longer, resume=True)
    with pytest.raises(MmferError, match="stages is .*'fusion'.* there and .*'end_to_end'.* here"):
        again(one_stage(CONFIG), resume=True)
    inside = out / "1_branches"
    with pytest.raises(MmferError, match="without stages"):
        run_stages(build(norm="batch"), three_stages(CONFIG), Clips(), Clips(3), inside, resume=True)
    kept = three_stages(CONFIG)
    kept.stages[0].config.save_every = 1  # changes nothing in the result
    again(kept, resume=True)


def test_a_curriculum_in_the_first_stage_is_refused_before_anything_is_written(tmp_path):
    plan = one_stage(replace(CONFIG, curriculum=0.5))
    with pytest.raises(MmferError, match="stages.0.config.curriculum needs a stage before it"):
        run_stages(build(), plan, Clips(), Clips(3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Rigged(torch.nn.Module):
    "The louder a clip, the surer it is of emotion 0."
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, audio, audio_lengths, video_lengths):
        mean = audio.sum(1, keepdim=True) * self.scale / audio_lengths[:, None]
        return SimpleNamespace(logits=F.pad(mean, (0, 7)))


def loud(level, n=10): return dict(audio=torch.full((n,), level), label=0, clip=f"level {level}")


def test_difficulty_sorts_by_loss():
    data = [loud(level, n) for n, level in enumerate((0.0, 3.0, -2.0, 1.0, 5.0), start=5)]
    model = Rigged().train()
    order = difficulty(model, data, batch_size=2, progress=False)
    assert list(order.index) == [f"level {level}" for level in (5.0, 3.0, 1.0, 0.0, -2.0)] and model.training
    by_hand = torch.tensor([5.0, 3.0, 1.0, 0.0, -2.0])
    expected = torch.log(by_hand.exp() + 7) - by_hand
    assert torch.allclose(torch.tensor(order.to_numpy()), expected.double(), atol=1e-5)


def test_difficulty_of_a_clip_that_is_no_number():
    data = [loud(1.0), loud(float("nan"))]
    with pytest.raises(MmferError, match="level nan"): difficulty(Rigged(), data, progress=False)


def test_a_curriculum_asks_the_stage_before(tmp_path, monkeypatch):
    plan = three_stages(CONFIG)
    asked = {}
    for stage in plan.stages[1:]: stage.config.curriculum = 0.4
    fit = Trainer.fit

    def note(self):
        asked[self.run.path.name] = self.facts["easiest"]
        return fit(self)
    monkeypatch.setattr(Trainer, "fit", note)
    run_stages(build(), plan, Clips(), Clips(3), tmp_path)
    model = MultimodalFER.from_pretrained(tmp_path / "1_branches" / "best")
    with judge_branches(model): order = difficulty(model, Clips(), progress=False)
    written = pd.Series(json.loads((tmp_path / "2_fusion" / "difficulty.json").read_text()))
    pd.testing.assert_series_equal(written, order, check_names=False, rtol=1e-4)
    names = [row["clip"] for row in Clips().rows]
    assert asked["1_branches"] is None and [names[i] for i in asked["2_fusion"]] == list(order.index)
    fused = difficulty(MultimodalFER.from_pretrained(tmp_path / "2_fusion" / "best"), Clips(), progress=False)
    assert [names[i] for i in asked["3_end_to_end"]] == list(fused.index)
