"""Training: the same seed gives the same run, every setting takes effect, the right epoch is kept."""
import json
import math
import multiprocessing
import socket
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Subset

from mmfer import trainer as trainer_module
from mmfer.augment import clip_seed, mix_batch
from mmfer.core import MmferError, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS, Corpus
from mmfer.fusion import SYSTEMS
from mmfer.losses import class_weights
from mmfer.model import MultimodalFER, preset_config
from mmfer.processor import ClipDataset, Processor, collate, model_inputs
from mmfer.runs import load_run
from mmfer.toy import make_toy
from mmfer.trainer import (
    RECIPES, ClipOrder, TrainConfig, Trainer, Updater, best_row, clip_labels, epochs_without_gain,
    frozen_as, frozen_modules, make_accelerator, make_loss, make_schedule, parameter_groups, training_mode,
    weights_plan, with_min_updates)
from mmfer.weights import Origin

RECIPE = replace(RECIPES["tiny"], epochs=2, batch_size=2, warmup_epochs=0.5)
TIMES = ("seconds", "data_wait")


class Clips(torch.utils.data.Dataset):
    "Made-up clips in memory: five of them, so that the last batch is smaller."
    def __init__(self, n=5, broken=None):
        g = torch.Generator().manual_seed(0)
        self.items = [self.made_up(i, g) for i in range(n)]
        if broken is not None: self.items[broken]["audio"][100] = float("nan")

    def made_up(self, i, g):
        audio = 0.1 * torch.randn(8_000, generator=g)
        video = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=g)
        return dict(audio=audio, label=i % 8, clip=f"clip-{i}", video=video)

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return dict(self.items[i])


def tiny(seed=0, system="lfm2"):
    seed_everything(seed)
    return MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS, system)


def loaded(*parts, system="lfm2"):
    "A tiny model that believes that these parts come from a checkpoint."
    model = tiny(system=system)
    note = dict(source="a checkpoint", revision="1", layers=2, held=3, licence="none", megabytes=1.5)
    model.config.origins = [Origin(part=part, **note) for part in parts]
    return model


def build(out, data=None, kind=Trainer, model=None, val=None, **changes):
    "A trainer that has not begun."
    model = tiny() if model is None else model
    return kind(model, replace(RECIPE, **changes), data or Clips(), val or Clips(3), out)


def run(out, *args, **changes):
    trainer = build(out, *args, **changes)
    trainer.fit()
    return trainer


def without_times(history):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def copy_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# the same run

def test_same_seed_same_weights(tmp_path):
    first = run(tmp_path / "a")
    second = run(tmp_path / "b")
    assert same(first.model.state_dict(), second.model.state_dict())
    assert without_times(first.progress.history) == without_times(second.progress.history)
    other = run(tmp_path / "c", seed=1)
    assert not same(first.model.state_dict(), other.model.state_dict())


def test_it_is_the_plain_loop(tmp_path):
    "Accumulation, clipping, warmup, cosine, smoothing and the losses of the branches, by hand."
    rates = dict(lr_branches=1e-3, lr_fusion=2e-3, lr_classifier=3e-3)
    trainer = run(tmp_path, accumulation=2, max_grad_norm=0.5, warmup_epochs=1.0, **rates)
    model = tiny()
    clips = Clips()
    rates = {model.audio: 1e-3, model.visual: 1e-3, model.fusion: 2e-3, model.classifier: 3e-3}
    groups = [dict(params=part.parameters()) for part in rates]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    loss = make_loss(model, RECIPE)
    share = iter([1 / 3, 2 / 3, 1.0, 0.5])  # two updates of warmup; then half a cosine, begun and half done
    seed_everything(0)
    for epoch in range(2):
        model.train()
        order = torch.randperm(5, generator=torch.Generator().manual_seed(clip_seed(0, epoch))).tolist()
        for group in ([order[:2], order[2:4]], [order[4:]]):
            now = next(share)
            for g, rate in zip(optimizer.param_groups, rates.values()): g["lr"] = rate * now
            for part in group:
                batch = collate([clips[i] for i in part])
                (loss(model(**model_inputs(batch)), batch["labels"])["total"] / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_workers_change_nothing(tmp_path):
    changes = dict(augment=["audio", "video"], mixup=0.3)
    histories = [run(tmp_path / str(n), workers=n, **changes).progress.history for n in (0, 1)]
    assert without_times(histories[0]) == without_times(histories[1])


@pytest.mark.parametrize("changes", [
    dict(augment=["audio", "video"]), dict(mixup=0.4), dict(label_smoothing=0.0), dict(max_grad_norm=0.1)])
def test_what_changes_the_training_changes_its_loss(changes, tmp_path):
    plain = run(tmp_path / "plain").progress.history
    changed = run(tmp_path / "changed", **changes).progress.history
    assert changed[1]["train_loss"] != plain[1]["train_loss"]


# batches

@given(clips=st.integers(1, 40), batch_size=st.integers(1, 9), processes=st.integers(1, 4),
       epoch=st.integers(0, 5), curriculum=st.floats(0.1, 1))
def test_the_processes_share_the_clips_of_an_epoch(clips, batch_size, processes, epoch, curriculum):
    config = TrainConfig(epochs=6, batch_size=batch_size, curriculum=curriculum)
    easiest = list(reversed(range(clips)))
    orders = [ClipOrder(clips, config, easiest, process, processes) for process in range(processes)]
    for order in orders: order.epoch = epoch
    shares = [list(order) for order in orders]
    each = orders[0].batches_in(epoch)
    assert {*map(len, shares)} == {*map(len, orders)} == {each}
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
    seen = [clip for share in shares for batch in share for clip, _ in batch]
    count = orders[0].clips_in(epoch)
    assert sorted(set(seen)) == sorted(easiest[:count])
    assert len(seen) - count == -count % processes  # only what makes the shares equal is seen twice
    assert {e for share in shares for batch in share for _, e in batch} == {epoch}


@given(clips=st.integers(1, 30), batch_size=st.integers(1, 5), processes=st.integers(1, 3), data=st.data())
def test_a_second_start_gets_the_batches_that_are_left(clips, batch_size, processes, data):
    order = ClipOrder(clips, TrainConfig(batch_size=batch_size), process=processes - 1, processes=processes)
    whole = list(order)
    order.start = data.draw(st.integers(0, len(whole)))
    assert list(order) == whole[order.start:] and len(order) == len(whole) - order.start


@given(seed=st.integers(0, 2**32 - 2), clips=st.integers(20, 40))
def test_neighbouring_seeds_share_no_order(seed, clips):
    orders = [ClipOrder(clips, TrainConfig(seed=s)) for s in (seed, seed + 1)]
    seen = set()
    for epoch in range(6):
        for order in orders:
            order.epoch = epoch
            seen.add(tuple(clip for batch in order for clip, _ in batch))
    assert len(seen) == 12


@pytest.mark.parametrize("accumulation, updates", [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_the_last_partial_group_is_an_update(tmp_path, accumulation, updates):
    trainer = run(tmp_path, accumulation=accumulation, epochs=1)
    assert trainer.progress.step == updates == math.ceil(math.ceil(5 / 2) / accumulation)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_a_curriculum_begins_with_the_easiest_clips(tmp_path):
    seen = []

    class Watch(Trainer):
        def train_step(self, batch):
            seen.append((self.progress.epoch, batch["clip"]))
            return super().train_step(batch)

    loss = pd.Series({f"clip-{i}": float(9 - i) for i in range(8)})
    recipe = replace(RECIPE, epochs=4, curriculum=0.5)
    Watch(tiny(), recipe, Clips(8), Clips(3), tmp_path, difficulty=loss).fit()
    epochs = [{c for e, clips in seen if e == epoch for c in clips} for epoch in range(4)]
    assert epochs[0] == {"clip-4", "clip-5", "clip-6", "clip-7"} and epochs[0] < epochs[1]
    assert list(map(len, epochs)) == [4, 6, 8, 8]
    with pytest.raises(MmferError, match="a curriculum needs the difficulty"):
        run(tmp_path / "b", curriculum=0.5)
    with pytest.raises(MmferError, match="difficulty of clip-0 is not known"):
        Trainer(tiny(), recipe, Clips(8), Clips(3), tmp_path / "c", difficulty=loss[1:])


def test_time_spent_waiting_for_clips(tmp_path):
    class Slow(Clips):
        def __getitem__(self, i):
            time.sleep(0.2)
            return super().__getitem__(i)

    fast = run(tmp_path / "fast", epochs=1, batch_size=5).progress.history[0]
    slow = run(tmp_path / "slow", Slow(), epochs=1, batch_size=5).progress.history[0]
    assert 0 <= fast["data_wait"] < 0.2 < 0.5 < slow["data_wait"] < 1


@given(clips=st.integers(1, 2000), batch_size=st.integers(1, 32), accumulation=st.integers(1, 4))
def test_enough_updates(clips, batch_size, accumulation):
    config = TrainConfig(epochs=3, batch_size=batch_size, accumulation=accumulation)
    per_epoch = math.ceil(math.ceil(clips / batch_size) / accumulation)
    epochs = with_min_updates(config, clips, updates=100).epochs
    assert epochs * per_epoch >= 100 and epochs >= 3
    assert epochs == 3 or (epochs - 1) * per_epoch < 100


# rates and updates

def rates_of(config, per_epoch, total, rate=1.0):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    schedule = make_schedule(optimizer, config, per_epoch, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@given(warmup=st.integers(0, 12), more=st.integers(1, 60))
def test_cosine_with_warmup(warmup, more):
    rates = rates_of(TrainConfig(schedule="cosine", warmup_epochs=float(warmup)), 1, warmup + more)
    wanted = [(s + 1) / (warmup + 1) for s in range(warmup)]
    wanted += [0.5 * (1 + math.cos(math.pi * s / more)) for s in range(more)]
    assert rates == pytest.approx(wanted, abs=1e-6)


@given(warmup=st.integers(0, 5), per_epoch=st.integers(1, 3))
def test_restarts_fall_twice_as_long_each_time(warmup, per_epoch):
    config = TrainConfig(schedule="restarts", warmup_epochs=float(warmup))
    rates = rates_of(config, per_epoch, (warmup + 31) * per_epoch, rate=1e-4)[warmup * per_epoch:]
    for start, length in ((0, 10 * per_epoch), (10 * per_epoch, 20 * per_epoch)):
        wanted = [1e-6 + 0.99e-4 * 0.5 * (1 + math.cos(math.pi * s / length)) for s in range(length)]
        assert rates[start:start + length] == pytest.approx(wanted, rel=1e-5)
    assert rates[30 * per_epoch] == pytest.approx(1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "restarts", "plateau"])
def test_a_rate_of_0_stays_0(schedule):
    assert rates_of(TrainConfig(schedule=schedule, warmup_epochs=2.0), 1, 20, rate=0.0) == [0.0] * 20


@pytest.mark.parametrize("schedule", ["cosine", "restarts", "plateau"])
def test_every_schedule_starts_small(schedule, tmp_path):
    trainer = build(tmp_path, warmup_epochs=1.0, schedule=schedule)
    full = dict(branches=RECIPE.lr_branches, fusion=RECIPE.lr_fusion, classifier=RECIPE.lr_classifier)
    quarter = {name: rate / 4 for name, rate in full.items()}
    assert trainer.updater.rates == pytest.approx(quarter)  # three updates of warmup


def test_the_first_update_is_made_at_the_first_rate(tmp_path):
    trainer = build(tmp_path, warmup_epochs=1.0, weight_decay=0.0, lr_classifier=1e-3)
    before = [p.detach().clone() for p in trainer.model.classifier.parameters()]
    trainer.train_step(next(trainer.batches.rest(trainer.progress)))
    moved = max((p - old).abs().max().item() for p, old in zip(trainer.model.classifier.parameters(), before))
    assert moved == pytest.approx(1e-3 / 4, rel=0.01)  # AdamW's first step is as long as its rate


def test_each_part_has_its_own_rate(tmp_path):
    rates = dict(lr_branches=1e-4, lr_fusion=2e-4, lr_classifier=3e-4)
    trainer = build(tmp_path, warmup_epochs=0.0, alignment_loss=0.1, **rates)
    model = trainer.model
    wanted = {id(p): 1e-4 for part in (model.audio, model.visual) for p in part.parameters()}
    wanted |= {id(p): 2e-4 for part in (model.fusion, trainer.objective.loss) for p in part.parameters()}
    wanted |= {id(p): 3e-4 for p in model.classifier.parameters()}
    assert {id(p): g["lr"] for g in trainer.updater.optimizer.param_groups for p in g["params"]} == wanted
    assert len(list(trainer.objective.loss.parameters())) == 2  # a projection for each branch


def updater_of(weight, out, **changes):
    config = TrainConfig(warmup_epochs=0.0, **changes)
    groups = [dict(params=[weight], lr=0.1, name="all")]
    return Updater(groups, config, per_epoch=10, total=10, accelerator=make_accelerator(config, out))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_weight_decay_takes_effect(decay, tmp_path):
    weight = nn.Parameter(torch.ones(()))
    updater = updater_of(weight, tmp_path, weight_decay=decay)
    updater.add(0.0 * weight, ["no clip"], complete=True)  # no gradient: what moves the weight is decay alone
    assert weight.item() == pytest.approx(1 - 0.1 * decay)


@pytest.mark.parametrize("longest, length", [(0.5, 0.5), (100.0, 3.0), (0.0, 3.0)])  # 0: never
def test_long_gradients_are_shortened(longest, length, tmp_path):
    weight = nn.Parameter(torch.ones(()))
    updater = updater_of(weight, tmp_path, max_grad_norm=longest)
    updater.add(3 * weight, ["no clip"], complete=True)
    seen = updater.optimizer.state_dict()["state"][0]["exp_avg"].item()  # a tenth of the first gradient
    assert 10 * seen == pytest.approx(length, rel=1e-4)


def test_a_plateau_halves_the_rate_of_every_group(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", lambda self: dict(val_loss=1.0, val_war=0.5, val_uar=0.5))
    changes = dict(schedule="plateau", warmup_epochs=1.0, epochs=9, lr_fusion=1e-3, freeze=["visual"])
    trainer = run(tmp_path, Clips(2), **changes)
    rates = [row["lr"] / RECIPE.lr_branches for row in trainer.progress.history]
    assert rates == pytest.approx([1 / 2] + [1.0] * 6 + [0.5] * 2)  # the first value is a gain, six are none
    assert trainer.updater.rates["fusion"] == pytest.approx(5e-4)


def test_two_trainers_in_one_process_keep_their_accumulation(tmp_path):
    made = [build(tmp_path / str(n), epochs=1, accumulation=n) for n in (2, 1)]
    for trainer in made: trainer.fit()
    assert [trainer.progress.step for trainer in made] == [2, 3]  # 5 clips are 3 batches


# losses

def test_the_losses_have_the_weights_of_the_recipe(tmp_path):
    recipe = TrainConfig(audio_loss=0.7, visual_loss=0.2, alignment_loss=0.4, label_smoothing=0.3)
    loss = make_loss(tiny(), recipe)
    assert loss.weights == dict(fused=1.0, audio=0.7, visual=0.2, alignment=0.4)
    assert loss.label_smoothing == 0.3
    row = run(tmp_path, Clips(4), epochs=1, audio_loss=0.7, visual_loss=0.2).progress.history[0]
    total = row["train_fused"] + 0.7 * row["train_audio"] + 0.2 * row["train_visual"]
    assert row["train_loss"] == pytest.approx(total, rel=1e-5)


def heads(model):
    "The weights of each branch's own head, by branch."
    named = {name: getattr(model, name).named_parameters() for name in ("audio", "visual")}
    return {name: {k: p.detach() for k, p in weights if "head" in k} for name, weights in named.items()}


@pytest.mark.parametrize("taught, other", [("audio", "visual"), ("visual", "audio")])
def test_the_loss_of_a_branch_teaches_the_head_of_that_branch(taught, other, tmp_path):
    changes = {f"{taught}_loss": 1.0, f"{other}_loss": 0.0}
    after = heads(run(tmp_path, weight_decay=0.0, **changes).model)
    before = heads(tiny())
    assert after[taught] and not any(torch.equal(p, before[taught][k]) for k, p in after[taught].items())
    assert after[other] and same(after[other], before[other])


def test_class_weights_come_from_the_training_labels(tmp_path):
    data = Subset(Clips(9), [0, 8, 1])  # clip 8 has label 0 again
    trainer = build(tmp_path, data, class_weights=True)
    assert torch.equal(trainer.objective.loss.class_weights, class_weights([0, 0, 1], 8))
    assert build(tmp_path, data).objective.loss.class_weights is None


def test_mixup_reaches_the_loss(tmp_path):
    labels = {}

    class Watch(Trainer):
        def train_step(self, batch):
            seen = labels[self.config.mixup]
            self.objective.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
            return super().train_step(batch)

    for alpha in (0.0, 1.0):
        labels[alpha] = []
        run(tmp_path / str(alpha), Clips(4), Watch, epochs=1, batch_size=4, mixup=alpha)
    assert labels[0.0][0].shape == (4,) and labels[1.0][0].shape == (4, 8)
    batch = collate([Clips(4)[i] for i in range(4)])
    mixed = [mix_batch(batch, 1.0, 8)[1].max(1).values for _ in range(8)]
    assert min(m.min() for m in mixed) < 0.99  # some labels are shared
    assert labels[1.0][0].sum(1).tolist() == pytest.approx([1.0] * 4)


def test_a_loss_that_is_no_number_stops_with_the_clips_name(tmp_path):
    with pytest.raises(MmferError, match="the loss became nan with the clips .*clip-3"):
        run(tmp_path, Clips(broken=3))
    with pytest.raises(MmferError, match="the validation loss became nan with the clips .*clip-2"):
        run(tmp_path / "val", val=Clips(3, broken=2))


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(tmp_path):
    trainer = build(tmp_path)
    next(trainer.model.classifier.parameters()).register_hook(lambda g: g * float("inf"))
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    with pytest.raises(MmferError, match="the gradient became (nan|inf) with the clips clip-"): trainer.fit()
    assert same(dict(trainer.model.named_parameters()), before)


# loaded weights and frozen parts

def test_loaded_and_fresh_weights_have_their_own_rates(tmp_path):
    names = ("branches", "branches_loaded", "fusion", "fusion_loaded", "classifier")
    rates = {f"lr_{name}": rate for name, rate in zip(names, (1e-4, 2e-4, 3e-4, 4e-4, 5e-4))}
    model = loaded("audio", "vision", "fusion")
    trainer = build(tmp_path, model=model, warmup_epochs=0.0, alignment_loss=0.1, **rates)
    modules = {1e-4: (model.audio, model.visual), 2e-4: (model.audio.encoder, model.visual.vision),
               3e-4: (model.fusion, trainer.objective.loss), 4e-4: (model.fusion.backbone,),
               5e-4: (model.classifier,)}
    wanted = {id(p): rate for rate, parts in modules.items() for part in parts for p in part.parameters()}
    assert {id(p): g["lr"] for g in trainer.updater.optimizer.param_groups for p in g["params"]} == wanted
    fresh = (model.visual.roi.scorer[1].weight, model.audio.head.linear.weight)
    assert [wanted[id(p)] for p in fresh] == [1e-4] * 2


def test_loaded_parts_are_frozen_where_they_are(tmp_path):
    model = loaded("audio", "fusion")
    before = copy_of(model)
    run(tmp_path, model=model, epochs=1, freeze=["loaded"])
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith(("audio.encoder.", "fusion.backbone.")) for k in moved)
    assert {"audio.head.linear.weight", "visual.roi.scorer.1.weight", "classifier.mlp.2.weight"} <= moved
    assert list(frozen_modules(model)) == ["audio.encoder", "fusion.backbone"]
    training_mode(model)
    assert not any(m.training for m in model.audio.encoder.modules()) and model.audio.head.training


@pytest.mark.parametrize("changes", [
    {}, dict(gradient_checkpointing=True), dict(freeze=["loaded"]), dict(freeze=["audio"])])
def test_batch_norm_of_a_loaded_or_frozen_encoder_keeps_its_statistics(changes, tmp_path):
    model = loaded("audio")
    before = copy_of(model)
    run(tmp_path, model=model, epochs=1, **changes)
    after = model.state_dict()
    averages = [k for k in before if "running" in k or "num_batches" in k]
    assert len(averages) == 6 and all(torch.equal(after[k], before[k]) for k in averages)
    weight = "audio.encoder.layers.0.norm_out.weight"
    assert torch.equal(after[weight], before[weight]) == ("freeze" in changes)


def test_thawed_blocks_of_the_vision_tower_learn_and_no_others():
    model = loaded("audio", "vision")
    model.visual.freeze()
    with frozen_as(model, TrainConfig(freeze=["loaded"], thaw_vision=1)):
        still = {k.removeprefix("visual.vision.") for k in frozen_modules(model) if k.startswith("visual.")}
        assert still == {"embeddings", "encoder.layers.0"}
        groups = parameter_groups(model, TrainConfig())
        assert [g["name"] for g in groups] == ["branches", "branches_loaded", "fusion", "classifier"]
    assert not any(p.requires_grad for p in model.visual.vision.parameters())
    assert all(p.requires_grad for p in model.audio.parameters())


def test_more_blocks_than_the_tower_has_are_refused(tmp_path):
    with pytest.raises(MmferError, match="the tower has 2 blocks"): build(tmp_path, thaw_vision=3)
    build(tmp_path, model=tiny(system="audio_only"), thaw_vision=3)  # there is no tower


def test_the_plan_says_what_becomes_of_each_part(tmp_path):
    model = loaded("audio", "vision")
    model.visual.freeze()
    plan = weights_plan(model, TrainConfig(lr_branches_loaded=3e-5, lr_fusion=2e-4)).set_index("part")
    assert plan.state.to_dict() == {
        "audio": "trained", "vision": "frozen", "fusion": "random", "the rest": "random"}
    rates = {"audio": "3e-05", "vision": "", "fusion": "0.0002", "the rest": "0.0001, 0.0002, 0.0003"}
    assert plan.rate.to_dict() == rates
    assert plan.source.to_dict() == {
        "audio": "a checkpoint", "vision": "a checkpoint", "fusion": "random", "the rest": "random"}
    assert all(p.requires_grad for p in model.audio.parameters())
    trainer = run(tmp_path, Clips(2), model=model, epochs=1, freeze=["loaded"])
    rows = json.loads((tmp_path / "weights.json").read_text())
    assert rows == weights_plan(trainer.model, trainer.config).to_dict("records")
    assert [row["state"] for row in rows] == ["frozen", "frozen", "random", "random"]


@pytest.mark.parametrize("name", ["lightweight", "full"])
def test_the_recipes_use_what_the_design_names(name):
    recipe = RECIPES[name]
    assert (recipe.mixup, recipe.patience, recipe.min_delta, recipe.label_smoothing) == (0.2, 15, 0.001, 0.1)
    assert (recipe.lr_branches_loaded, recipe.lr_fusion_loaded, recipe.lr_classifier) == (1e-5, 5e-5, 1e-4)
    assert recipe.warmup_epochs == 5 and recipe.batch_size * recipe.accumulation == 16
    assert "audio" in recipe.augment and ("video" in recipe.augment) == (name == "full")


def test_a_frozen_part_keeps_its_running_averages_and_drops_nothing(tmp_path):
    model = tiny()
    before = copy_of(model)
    trainer = run(tmp_path, model=model, epochs=1, freeze=["audio", "classifier"])
    kept = {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()}
    assert all(kept[k] for k in kept if k.startswith(("audio.", "classifier.")))
    assert not any(v for k, v in kept.items() if k.startswith("fusion.") and k.endswith("proj.weight"))
    training_mode(trainer.objective)
    assert not any(m.training for part in (model.audio, model.classifier) for m in part.modules())
    assert model.fusion.training


def test_what_was_frozen_before_stays_frozen(tmp_path):
    model = tiny()
    model.visual.requires_grad_(False)
    before = {k: v.clone() for k, v in model.visual.named_parameters()}
    trainer = run(tmp_path, model=model, epochs=1)
    assert same(dict(model.visual.named_parameters()), before)
    trained = sum(len(g["params"]) for g in parameter_groups(model, RECIPE))
    assert trained == sum(p.requires_grad for p in model.parameters())
    assert list(frozen_modules(trainer.model)) == ["visual"]


def test_all_frozen_is_refused(tmp_path):
    with pytest.raises(MmferError, match="every part is frozen"):
        run(tmp_path, freeze=["audio", "visual", "fusion", "classifier"])


@pytest.mark.parametrize("system, part", [
    ("audio_only", "visual"), ("visual_only", "audio"), ("late", "classifier")])
def test_a_part_that_a_system_does_not_have_may_be_frozen(system, part, tmp_path):
    trainer = run(tmp_path, Clips(2), model=tiny(system=system), epochs=1, freeze=[part])
    assert not frozen_modules(trainer.model) and math.isfinite(trainer.progress.history[0]["train_loss"])


# the best epoch

class Judged(Trainer):
    "A trainer that is told how good its epochs are, and remembers their weights."
    figures = ()

    def validate(self):
        uar, loss = self.figures[self.progress.epoch]
        self.weights = [*getattr(self, "weights", []), copy_of(self.model)]
        return dict(val_loss=loss, val_war=uar, val_uar=uar)


@pytest.mark.parametrize("figures, best", [
    ([(0.5, 1.0), (0.2, 0.5), (0.3, 0.1)], 0),  # not the last one, not the lowest loss
    ([(0.2, 1.0), (0.5, 1.1), (0.4, 0.9)], 1),
    ([(0.5, 1.0), (0.5, 0.8), (0.5, 0.9)], 1),  # among equals the lower loss
    ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 0),  # among those the first
    ([(0.0, 2.0), (0.0, 2.5), (0.1, 3.0)], 2)])
def test_best_is_the_best_epoch(figures, best, tmp_path):
    kind = type("Told", (Judged,), dict(figures=figures))
    trainer = run(tmp_path, Clips(2), kind, epochs=3)
    assert [row["epoch"] for row in trainer.progress.history if row["best"]] == [best]
    for name, epoch in (("best", best), ("last", 2)):
        assert same(MultimodalFER.from_pretrained(tmp_path / name).state_dict(), trainer.weights[epoch])
    assert json.loads((tmp_path / "training_history.json").read_text()) == trainer.progress.history


FIGURES = st.tuples(st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([0.5, 1.0, 1.5]))


@given(st.lists(FIGURES, min_size=1, max_size=8))
def test_no_epoch_is_better_than_the_best_row(figures):
    rows = [dict(epoch=i, val_uar=uar, val_loss=loss) for i, (uar, loss) in enumerate(figures)]
    best = best_row(rows)
    top = [row for row in rows if row["val_uar"] == max(uar for uar, _ in figures)]
    lowest = [row for row in top if row["val_loss"] == min(row["val_loss"] for row in top)]
    assert best is lowest[0]


def test_it_stops_when_nothing_is_gained(tmp_path):
    figures = [(uar, 1.0) for uar in (0.2, 0.5, 0.5005, 0.4, 0.9)]
    trainer = run(tmp_path, Clips(2), type("Told", (Judged,), dict(figures=figures)), epochs=5, patience=2)
    assert [row["val_uar"] for row in trainer.progress.history] == [0.2, 0.5, 0.5005, 0.4]
    assert epochs_without_gain(trainer.progress.history, 0.001) == 2


def test_validation_is_in_evaluation_mode(tmp_path):
    config = preset_config("tiny", RAVDESS_EMOTIONS)
    config.modality_dropout = 0.9
    config.classifier = replace(config.classifier, dropout=0.5)
    model = MultimodalFER(config)
    val = Clips(6)
    trainer = build(tmp_path, model=model, val=val, label_smoothing=0.0, audio_loss=0.0, visual_loss=0.0)
    training_mode(trainer.objective)
    before = copy_of(model)
    found = trainer.validate()
    assert same(model.state_dict(), before)  # BatchNorm has not averaged
    batch = collate([val[i] for i in range(6)])
    with torch.no_grad(): logits = model.eval()(**model_inputs(batch)).logits
    loss = nn.functional.cross_entropy(logits, batch["labels"]).item()
    right = (logits.argmax(1) == batch["labels"]).float().mean().item()
    wanted = dict(val_loss=loss, val_war=right, val_uar=right)  # there is one clip per label
    assert found == pytest.approx(wanted, rel=1e-4)


def test_training_goes_on_in_training_mode_after_a_validation(tmp_path):
    modes = []

    class Watch(Trainer):
        def train_step(self, batch):
            modes.append(self.model.training)
            return super().train_step(batch)

    run(tmp_path, Clips(2), Watch)
    assert modes == [True, True]


# switches

def test_gradient_checkpointing_changes_nothing_but_the_memory(tmp_path):
    plain = run(tmp_path / "a", epochs=1).model
    saving = run(tmp_path / "b", epochs=1, gradient_checkpointing=True).model
    ours = saving.state_dict()
    assert any("running_mean" in name for name in ours)  # averages, which a second pass would move
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


def checkpointed(model):
    return [name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]


def test_switches_do_not_leak_into_the_next_training(tmp_path):
    model = tiny()
    build(tmp_path / "a", model=model, gradient_checkpointing=True, compile=True)
    assert checkpointed(model) and model.visual.vision._compiled_call_impl is not None
    build(tmp_path / "b", model=model)
    assert not checkpointed(model) and model.visual.vision._compiled_call_impl is None


def test_the_vision_tower_is_compiled_when_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    trainer = run(tmp_path, Clips(2), epochs=1, compile=True)
    assert compiled == [trainer.model.visual.vision]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_in_bf16(system, tmp_path):
    trainer = run(tmp_path, Clips(4), model=tiny(system=system), epochs=1, precision="bf16")
    row = trainer.progress.history[0]
    assert trainer.progress.step == 2 and math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"])
    plain = run(tmp_path / "plain", Clips(4), model=tiny(system=system), epochs=1).progress.history[0]
    assert row.keys() == plain.keys() and row["train_loss"] == pytest.approx(plain["train_loss"], abs=0.1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_another_precision_in_the_same_process(tmp_path):
    for precision in ("no", "bf16"):
        trainer = run(tmp_path / precision, precision=precision, epochs=1)
        assert trainer.accelerator.mixed_precision == precision
        assert math.isfinite(trainer.progress.history[0]["train_loss"])


def test_tensorboard_holds_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    trainer = run(tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "logs" / "mmfer")).Reload()
    losses = [row["train_loss"] for row in trainer.progress.history]
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(losses)
    assert [e.step for e in events.Scalars("val_uar")] == [1, 2]


def test_what_a_step_returns_is_in_the_history(tmp_path):
    class Counting(Trainer):
        def train_step(self, batch): return super().train_step(batch) | dict(clips=len(batch["clip"]))

    assert run(tmp_path, kind=Counting, epochs=1).progress.history[0]["train_clips"] == pytest.approx(5 / 3)


def test_whoever_watches_is_told_after_every_epoch(tmp_path):
    told = []
    def tell(history, seconds_left): told.append((len(history), seconds_left, history[-1]["val_uar"]))
    recipe = replace(RECIPE, epochs=3)
    trainer = Trainer(tiny(), recipe, Clips(2), Clips(3), tmp_path, on_epoch=tell)
    rows = trainer.fit()
    assert [epochs for epochs, _, _ in told] == [1, 2, 3]
    assert [uar for _, _, uar in told] == [row["val_uar"] for row in rows]
    seconds = [row["seconds"] for row in rows]
    left = [seconds_left for _, seconds_left, _ in told]
    assert left == pytest.approx([2 * seconds[0], sum(seconds[:2]) / 2, 0])
    Trainer(tiny(), recipe, Clips(2), Clips(3), tmp_path, resume=True, on_epoch=tell).fit()  # a finished run
    assert told[3:] == [(3, 0.0, rows[-1]["val_uar"])]


@pytest.mark.parametrize("keep_last", [True, False])
def test_the_last_model_is_written_when_wanted(keep_last, tmp_path):
    run(tmp_path, Clips(2), epochs=2, keep_last=keep_last)
    assert (tmp_path / "last").exists() == keep_last and (tmp_path / "best" / "model.safetensors").is_file()


def test_a_last_batch_of_one_clip_with_batch_norm(tmp_path):
    config = preset_config("tiny", RAVDESS_EMOTIONS)
    config.classifier = replace(config.classifier, norm="batch")
    seed_everything(0)
    trainer = run(tmp_path, Clips(5), model=MultimodalFER(config), batch_size=4, epochs=1)
    assert trainer.progress.step == 2 and math.isfinite(trainer.progress.history[0]["train_loss"])


# what is refused

def test_what_is_not_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MmferError, match="fp16 needs a GPU"): run(tmp_path, precision="fp16")
    monkeypatch.setattr(trainer_module, "find_spec", lambda name: None)
    with pytest.raises(MmferError, match="tracker wandb is not installed"): run(tmp_path, trackers=["wandb"])


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("batch_size", 0), ("accumulation", -1), ("lr_branches", -1e-5),
    ("lr_classifier", math.inf), ("weight_decay", -0.1), ("warmup_epochs", math.nan), ("max_grad_norm", -1.0),
    ("save_batches", -1), ("seed", -1), ("patience", -1), ("label_smoothing", 1.5), ("curriculum", 2.0),
    ("schedule", "spiral"), ("precision", "fp8"), ("freeze", ["nose"]), ("trackers", ["paper"]),
    ("epochs", "x"), ("workers", 0.5)])
def test_a_setting_that_cannot_be_is_refused(name, value):
    with pytest.raises(MmferError, match=f"^TrainConfig: {name}(.0)? cannot be ") as e:
        replace(RECIPE, **{name: value})
    assert "\n" not in str(e.value)


def test_settings_at_the_edge_are_taken(tmp_path):
    edge = dict(epochs=1, batch_size=1, accumulation=1, lr_fusion=0.0, weight_decay=0.0, warmup_epochs=0.0)
    model = tiny()
    before = [p.detach().clone() for p in model.fusion.parameters()]
    run(tmp_path, Clips(2), model=model, **edge)
    assert all(torch.equal(p, old) for p, old in zip(model.fusion.parameters(), before))  # a rate of 0


@pytest.mark.parametrize("changes, advice", [
    (dict(batch_size=4), "try batch_size=2 with accumulation=2"),
    (dict(batch_size=1), "try gradient_checkpointing=True"),
    (dict(batch_size=1, gradient_checkpointing=True), "try shorter clips")])
def test_a_full_memory_ends_with_the_next_thing_to_try(changes, advice, tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory.\nA page of text.")
    monkeypatch.setattr("mmfer.trainer.MultimodalLoss.forward", full)
    with pytest.raises(MmferError, match=f"the memory of the device is full: {advice}") as e:
        run(tmp_path, **changes)
    assert "\n" not in str(e.value)


def test_a_folder_that_another_trainer_took_meanwhile_is_refused(tmp_path):
    first = build(tmp_path, epochs=1)
    second = build(tmp_path, epochs=1)
    first.fit()
    with pytest.raises(MmferError, match="already holds a run"): second.fit()


# corpora

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder, actors=3, clips_per_actor=8, seconds=1.5, progress=False)
    return Corpus.from_folder(folder)


def test_labels_are_read_without_decoding(corpus):
    data = ClipDataset(corpus, Processor(image_size=64, grid=8, faces="none"))
    data.read = None  # whoever decodes a clip fails
    labels = clip_labels(Subset(data, [2, 1]))
    assert labels.to_dict() == corpus.table.set_index("clip").label.iloc[[2, 1]].to_dict()
    assert clip_labels(Clips(3)).to_dict() == {"clip-0": 0, "clip-1": 1, "clip-2": 2}


def test_the_processor_and_the_speakers_are_saved_with_the_model(corpus, tmp_path):
    model = tiny()
    processor = Processor.for_model(model.config, faces="none", n_frames=4)
    parts = [ClipDataset(corpus.of(speakers), processor) for speakers in (["01", "02"], ["03"])]
    Trainer(model, replace(RECIPE, epochs=1, batch_size=8), *parts, tmp_path).fit()
    for source in (tmp_path, tmp_path / "best", tmp_path / "last"):
        loaded, how, split = load_run(source)
        assert how == processor and split == dict(corpus="toy", train=["01", "02"], val=["03"])
    assert same(loaded.state_dict(), model.cpu().state_dict())


def test_clips_of_another_model_are_refused(corpus, tmp_path):
    model = MultimodalFER.from_preset("tiny", ("happy", "sad"))
    fitting = ClipDataset(corpus, Processor.for_model(model.config, faces="none"))
    with pytest.raises(MmferError, match="emotions neutral, calm, .* and the model has happy, sad: use"):
        Trainer(model, RECIPE, fitting, fitting, tmp_path)
    large = ClipDataset(corpus, Processor(image_size=224, grid=14, faces="none"))
    with pytest.raises(MmferError, match="pictures of 224 pixels"):
        Trainer(tiny(), RECIPE, fitting, large, tmp_path)


def test_a_frozen_tower_is_read_from_the_cache(tmp_path):
    histories = []
    for cache in (None, tmp_path / "cache"):
        model = tiny()
        model.visual.freeze()
        recipe = replace(RECIPE, mixup=0.4)
        trainer = Trainer(model, recipe, Clips(), Clips(3), tmp_path / f"run-{cache is None}", cache=cache)
        histories.append(without_times(trainer.fit()))
        assert ("video_tokens" in trainer.val_loader.dataset[0]) == (cache is not None)
    for a, b in zip(*histories, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.01)
    recipe = replace(RECIPE, augment=["audio", "video"])
    changed = Trainer(model, recipe, Clips(), Clips(3), tmp_path / "changed", cache=tmp_path / "cache")
    assert "video" in changed.val_loader.dataset[0]  # changed pictures cannot come from a cache


# two processes

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one(tmp_path):
    """Two gloo processes with batches of two: the losses of one process with batches of four.

    Only the first one writes, a run of two resumes exactly. Validation sees all clips once, in the batches
    of one process and with the averages that are saved: the figures of one process, to the last bit."""
    import two_processes
    port = free_port()
    context = multiprocessing.get_context("fork")
    jobs = [(rank, port, str(tmp_path)) for rank in (0, 1)]
    children = [context.Process(target=two_processes.job, args=job) for job in jobs]
    for child in children: child.start()
    alone = two_processes.train(tmp_path / "alone", 4)
    grouped = two_processes.train(tmp_path / "grouped-alone", 4, accumulation=2)
    still = two_processes.STILL
    cached = two_processes.train(tmp_path / "cached-alone", 4, cache=tmp_path / "another", **still)
    for child in children: child.join()
    entries = [sorted(p.name for p in (tmp_path / name).rglob("*.npy")) for name in ("cache", "another")]
    assert entries[0] == entries[1] and len(entries[0]) == 8  # three of them are validated, too
    assert [child.exitcode for child in children] == [0, 0]
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first["judged"] == second["judged"] == two_processes.judged_again(tmp_path / "judged")
    assert first["whole"] == first["resumed"] and second["whole"]["weights"] == first["whole"]["weights"]
    for name, one in (("plain", alone), ("grouped", grouped), ("cached", cached)):
        for row, other in zip(first[name]["history"], one["history"], strict=True):
            assert row == pytest.approx(other, rel=1e-5)
