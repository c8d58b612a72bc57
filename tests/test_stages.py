"""Training in stages: frozen parts stand still, each stage starts from the best of the one before, a broken run goes on as if nothing had been."""
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
from mmfer.stages import (THREE_STAGES, Recipe, Stage, branches_vote, difficulty, join_votes, load_recipe, one_stage, run_stages,
                          save_recipe, three_stages)
from mmfer.trainer import RECIPES, TrainConfig, Trainer

CONFIG = replace(RECIPES["tiny"], epochs=5, batch_size=2)  # 2, 1 and 2 epochs


class Clips(torch.utils.data.Dataset):
    "Made-up clips in memory; pulls the plug when the `stop`-th clip is read."
    def __init__(self, n=5, stop=None):
        g = torch.Generator().manual_seed(n)
        self.items = [dict(audio=0.1 * torch.randn(8_000, generator=g), label=i % 8, clip=f"clip-{n}-{i}",
                           video=torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=g)) for i in range(n)]
        self.rows, self.reads, self.stop = [dict(clip=x["clip"], label=x["label"]) for x in self.items], 0, stop

    def __len__(self): return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        if self.reads == self.stop: raise KeyboardInterrupt
        return dict(self.items[i])


def build(**classifier):
    seed_everything(0)
    config = preset_config("tiny")
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
    "A whole run: its folder and the weights before it. BatchNorm in the classifier, as there is in the audio branch."
    out, model = tmp_path_factory.mktemp("unbroken"), build(norm="batch")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    return out, start, run_stages(model, three_stages(CONFIG), Clips(6), Clips(3), out)


def test_frozen_parts_stand_still_with_their_batchnorm(unbroken):
    out, start, _ = unbroken
    one, two, three = (weights(out / f / "best") for f in ("1_branches", "2_fusion", "3_end_to_end"))
    assert any("running_mean" in k for k in one if k.startswith("classifier")) and any("running_mean" in k for k in one if k.startswith("audio"))
    assert parts_that_moved(start, one) == {"audio", "visual"}
    assert parts_that_moved(one, two) == {"fusion", "classifier"}
    assert parts_that_moved(two, three) == {"audio", "visual", "fusion", "classifier"}


def test_the_folder_of_a_run(unbroken):
    out, _, model = unbroken
    assert {p.name for p in out.iterdir()} >= {"1_branches", "2_fusion", "3_end_to_end", "best", "recipe.json", "training_history.json"}
    assert load_recipe(out / "recipe.json") == three_stages(CONFIG)
    rows = json.loads((out / "training_history.json").read_text())
    assert [(r["stage"], r["epoch"]) for r in rows] == [("branches", 0), ("branches", 1), ("fusion", 0), ("end_to_end", 0), ("end_to_end", 1)]
    best = MultimodalFER.from_pretrained(out / "best").state_dict()
    last = weights(out / "3_end_to_end" / "best")
    assert all(torch.equal(v, best[k]) and torch.equal(v, last[k]) for k, v in model.state_dict().items())
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_each_stage_starts_from_the_best_of_the_one_before(tmp_path, monkeypatch):
    recipe, train_stage = three_stages(CONFIG), stages._train_stage
    for rate in ("lr_branches", "lr_fusion", "lr_classifier"): setattr(recipe.stages[2].config, rate, 0.0)

    def stop_before_the_end(model, before, stage, *rest):
        if stage.name == "end_to_end": raise KeyboardInterrupt
        return train_stage(model, before, stage, *rest)
    monkeypatch.setattr(stages, "_train_stage", stop_before_the_end)
    with pytest.raises(KeyboardInterrupt): run_stages(build(), recipe, Clips(), Clips(3), tmp_path)
    monkeypatch.undo()

    mark = weights(tmp_path / "2_fusion" / "best")
    mark["classifier.mlp.2.bias"] = torch.arange(8.0)
    save_file(mark, tmp_path / "2_fusion" / "best" / "model.safetensors")
    model = run_stages(build(), recipe, Clips(), Clips(3), tmp_path, resume=True)
    assert model.state_dict()["classifier.mlp.2.bias"].tolist() == list(range(8))


@pytest.mark.parametrize("stop", [12, 12 + 3, 12 + 6 + 5])  # the last clip of stage 1; within stages 2 and 3
def test_a_broken_run_ends_as_the_unbroken_one(tmp_path, unbroken, stop):
    out, _, model = unbroken
    recipe = three_stages(CONFIG)
    for stage in recipe.stages: stage.config.save_batches = 1
    with pytest.raises(KeyboardInterrupt): run_stages(build(norm="batch"), recipe, Clips(6, stop), Clips(3), tmp_path)
    again = run_stages(build(norm="batch"), recipe, Clips(6), Clips(3), tmp_path, resume=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert without_times(tmp_path / "training_history.json") == without_times(out / "training_history.json")


def test_a_finished_run_reads_no_clip_again(unbroken):
    out, _, model = unbroken
    data = Clips(6)
    again = run_stages(build(norm="batch"), three_stages(CONFIG), data, Clips(3), out, resume=True)
    assert data.reads == 0 and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_spoilt_best_model_ends_in_one_sentence(tmp_path, unbroken):
    shutil.copytree(unbroken[0], tmp_path / "run")
    file = tmp_path / "run" / "2_fusion" / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MmferError, match="2_fusion/best/model.safetensors cannot be loaded"):
        run_stages(build(norm="batch"), three_stages(CONFIG), Clips(6), Clips(3), tmp_path / "run", resume=True)


def test_what_comes_in_frozen_stays_frozen(tmp_path):
    model = build()
    model.visual.vision.requires_grad_(False)
    before = {k: v.clone() for k, v in model.visual.vision.state_dict().items()}
    run_stages(model, three_stages(CONFIG), Clips(), Clips(3), tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.visual.vision.state_dict().items())
    assert not any(p.requires_grad for p in model.visual.vision.parameters())
    assert all(p.requires_grad for p in model.fusion.parameters())


@pytest.mark.parametrize("system", ["audio_only", "visual_only", "late"])
def test_systems_that_lack_a_part(tmp_path, system):
    model = run_stages(MultimodalFER.from_preset("tiny", system), three_stages(CONFIG), Clips(), Clips(3), tmp_path)
    assert model.config.fusion.kind == system and (tmp_path / "best" / "config.json").is_file()


def test_the_fused_vote_teaches_the_branches_nothing():
    model, batch = build().eval(), stages.collate([Clips()[i] for i in range(3)])
    with branches_vote(model): out = model(**stages.model_inputs(batch))
    assert torch.equal(out.logits, join_votes(out)) and not out.logits.requires_grad and out.audio_logits.requires_grad
    assert torch.allclose(out.probabilities.sum(1), torch.ones(3))
    assert model(**stages.model_inputs(batch)).logits.requires_grad, "the block is over, but the branches still vote"


def test_a_branch_without_a_modality_has_no_vote():
    a, v = torch.randn(2, 2, 8)
    out = FEROutput(audio_logits=a, visual_logits=v, audio_present=torch.tensor([True, False]), visual_present=torch.tensor([True, True]))
    joint = join_votes(out)
    assert torch.allclose(joint[0], (a.log_softmax(-1) + v.log_softmax(-1))[0] / 2)
    assert torch.allclose(joint[1], v.log_softmax(-1)[1])
    alone = join_votes(FEROutput(audio_logits=a, audio_present=torch.tensor([True, True])))
    assert torch.allclose(alone, a.log_softmax(-1))


@pytest.mark.parametrize("recipe", [*THREE_STAGES.values(), one_stage(CONFIG)])
def test_json_round_trip(tmp_path, recipe):
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json") == recipe


@given(st.integers(3, 100))
def test_three_stages_take_as_many_epochs_as_one(epochs):
    each = [s.config.epochs for s in three_stages(TrainConfig(epochs=epochs)).stages]
    assert sum(each) == epochs and min(each) >= 1 and abs(each[0] - each[2]) <= 1


@pytest.mark.parametrize("epochs", [-1, 0, 1, 2])
def test_three_stages_need_three_epochs(epochs):
    with pytest.raises(MmferError, match=f"cannot share {epochs} epochs"): three_stages(TrainConfig(epochs=epochs))


def spoil(path, value=None):
    "Plain data of a recipe with one key changed."
    data = to_dict(three_stages(CONFIG))
    *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    place = data
    for key in keys: place = place[key]
    place[last] = value
    return data


@pytest.mark.parametrize("path, value, message", [
    ("stages.1.config.lrr", 1, "stages.1.config.lrr is unknown"), ("stages.2.vot", "fused", "stages.2.vot is unknown"),
    ("stagess", [], "key stagess is unknown"), ("stages.0.config.epochs", "3", "stages.0.config.epochs cannot be '3'"),
    ("stages.1.config.epochs", 2.5, "stages.1.config.epochs cannot be 2.5"), ("stages.1.config.freeze", ["head"], "freeze names 'head'"),
    ("stages.1.name", "branches", "stages.1.name 'branches' is taken"), ("stages.1.name", "../up", "is no plain word"),
    ("stages.1.vote", "mine", "vote 'mine'"), ("stages.0.config.curriculum", 0.5, "stages.0.config.curriculum"),
    ("stages.2.config.schedule", "step", "stages.2.config: schedule 'step'"), ("stages.1", {"config": {}}, "stages.1.name is missing"),
    ("stages.0.config.epochs", 0, "stages.0.config.epochs cannot be 0"), ("stages.2.config.epochs", -3, "stages.2.config.epochs cannot be -3"),
    ("stages.1.config.batch_size", 0, "stages.1.config.batch_size cannot be 0"),
    ("stages.1.config.lr_fusion", -1.0, "stages.1.config.lr_fusion cannot be -1.0"),
    ("stages.1.config.lr_fusion", float("nan"), "stages.1.config.lr_fusion cannot be nan"),
    ("stages", [3], "stages.0 is 3: write it as an object"), ("stages.1", None, "stages.1 is None"), ("stages.1.config", 3, "stages.1.config is 3"),
    ("stages", [], "no stages"), ("stages", None, "recipe.json")])
def test_a_wrong_key_is_named_by_its_path(tmp_path, path, value, message):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(spoil(path, value)))
    with pytest.raises(MmferError, match="recipe.json") as e: load_recipe(file)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_recipe_that_is_no_json(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    (tmp_path / "number.json").write_text("3")
    for words in ("recipe.json", "nothing.json", "number.json .* the recipe is 3"):
        with pytest.raises(MmferError, match=words): load_recipe(tmp_path / words.split()[0])


def test_another_recipe_is_refused(unbroken):
    out, _, _ = unbroken
    again = lambda recipe, **how: run_stages(build(norm="batch"), recipe, Clips(6), Clips(3), out, **how)
    with pytest.raises(MmferError, match="already holds a run"): again(three_stages(CONFIG))
    longer = three_stages(CONFIG)
    longer.stages[2].config.epochs = 9
    with pytest.raises(MmferError, match="stages.2.config.epochs is 2 there and 9 here"): again(longer, resume=True)
    with pytest.raises(MmferError, match="stages is .*'fusion'.* there and .*'end_to_end'.* here"): again(one_stage(CONFIG), resume=True)
    with pytest.raises(MmferError, match="without stages"):
        run_stages(build(norm="batch"), three_stages(CONFIG), Clips(), Clips(3), out / "1_branches", resume=True)
    workers = three_stages(CONFIG)
    workers.stages[0].config.save_every = 1  # changes nothing in the result
    again(workers, resume=True)


class Rigged(torch.nn.Module):
    "The louder a clip, the surer it is of emotion 0."
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, audio, audio_lengths, video_lengths):
        return SimpleNamespace(logits=F.pad(audio.sum(1, keepdim=True) * self.scale / audio_lengths[:, None], (0, 7)))


def loud(level, n=10): return dict(audio=torch.full((n,), level), label=0, clip=f"level {level}")


def test_difficulty_sorts_by_loss():
    data = [loud(level, n) for n, level in enumerate((0.0, 3.0, -2.0, 1.0, 5.0), start=5)]
    model = Rigged().train()
    order = difficulty(model, data, batch_size=2, progress=False)
    assert list(order.index) == ["level 5.0", "level 3.0", "level 1.0", "level 0.0", "level -2.0"] and model.training
    by_hand = torch.tensor([5.0, 3.0, 1.0, 0.0, -2.0])
    expected = torch.log(by_hand.exp() + 7) - by_hand
    assert torch.allclose(torch.tensor(order.to_numpy()), expected.double(), atol=1e-5)


def test_difficulty_of_a_clip_that_is_no_number():
    with pytest.raises(MmferError, match="level nan"): difficulty(Rigged(), [loud(1.0), loud(float("nan"))], progress=False)


def test_a_curriculum_asks_the_stage_before(tmp_path, monkeypatch):
    recipe, asked = three_stages(CONFIG), {}
    for stage in recipe.stages[1:]: stage.config.curriculum = 0.4
    fit = Trainer.fit

    def note(self):
        asked[self.out.name] = self.facts["easiest"]
        return fit(self)
    monkeypatch.setattr(Trainer, "fit", note)
    run_stages(build(), recipe, Clips(), Clips(3), tmp_path)
    model = MultimodalFER.from_pretrained(tmp_path / "1_branches" / "best")
    with branches_vote(model): order = difficulty(model, Clips(), progress=False)
    written = pd.Series(json.loads((tmp_path / "2_fusion" / "difficulty.json").read_text()))
    pd.testing.assert_series_equal(written, order, check_names=False, rtol=1e-4)
    names = [row["clip"] for row in Clips().rows]
    assert asked["1_branches"] is None and [names[i] for i in asked["2_fusion"]] == list(order.index)
    fused = difficulty(MultimodalFER.from_pretrained(tmp_path / "2_fusion" / "best"), Clips(), progress=False)
    assert [names[i] for i in asked["3_end_to_end"]] == list(fused.index)
