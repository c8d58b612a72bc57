"""Training: the same seed gives the same run, partial groups count, the first step is small, bad losses stop it."""
import json
import math
import multiprocessing
import socket
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.utils.data import Subset

from mmfer.core import MmferError, seed_everything
from mmfer.datasets import ClipDataset, collate
from mmfer.losses import class_weights
from mmfer.model import MultimodalFER
from mmfer.trainer import (
    RECIPES, Trainer, TrainSet, augment_clip, clip_labels, mix_batch, parameter_groups, rate_at, rate_with_restarts, require_possible,
    training_mode)

RECIPE = replace(RECIPES["tiny"], epochs=2, batch_size=2, warmup_epochs=0.5)


class Clips(torch.utils.data.Dataset):
    "Made-up clips in memory: five of them, so that the last batch is smaller."
    def __init__(self, n=5, broken=None):
        g = torch.Generator().manual_seed(0)
        self.items = [dict(audio=0.1 * torch.randn(8_000, generator=g), label=i % 8, clip=f"clip-{i}",
                           video=torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=g)) for i in range(n)]
        if broken is not None: self.items[broken]["audio"][100] = float("nan")

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return dict(self.items[i])


def without_times(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in history]


def run(out, data=None, **changes):
    seed_everything(0)
    model = MultimodalFER.from_preset("tiny")
    trainer = Trainer(model, replace(RECIPE, **changes), data or Clips(), Clips(3), out)
    trainer.fit()
    return trainer, model


def test_same_seed_same_weights(tmp_path):
    (a, first), (b, second) = run(tmp_path / "a"), run(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(first.state_dict().values(), second.state_dict().values()))
    assert without_times(a.history) == without_times(b.history)
    _, other = run(tmp_path / "c", seed=1)
    assert not all(torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters()))


@pytest.mark.parametrize("accumulation, updates", [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_the_last_partial_group_is_an_update(tmp_path, accumulation, updates):
    trainer, _ = run(tmp_path, accumulation=accumulation, epochs=1)
    assert trainer.step == updates == math.ceil(math.ceil(5 / 2) / accumulation)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_first_step_runs_at_the_warmup_rate(tmp_path):
    seed_everything(0)
    trainer = Trainer(MultimodalFER.from_preset("tiny"), replace(RECIPE, warmup_epochs=1.0), Clips(), Clips(3), tmp_path)
    rates = {g["name"]: g["lr"] for g in trainer.optimizer.param_groups}
    assert rates["fusion"] == pytest.approx(RECIPE.lr_fusion / 4)  # three updates of warmup
    assert rate_at(0, 3, 6) == 0.25 and rate_at(3, 3, 6) == 1.0


def test_a_loss_that_is_no_number_stops_with_the_clips_name(tmp_path):
    with pytest.raises(MmferError, match="clip-3"): run(tmp_path, data=Clips(broken=3))


def test_frozen_parts_do_not_move(tmp_path):
    seed_everything(0)
    model = MultimodalFER.from_preset("tiny")
    model.visual.requires_grad_(False)
    before = {k: v.clone() for k, v in model.visual.named_parameters()}
    Trainer(model, replace(RECIPE, epochs=1), Clips(), Clips(3), tmp_path).fit()
    assert all(torch.equal(v, before[k]) for k, v in model.visual.named_parameters())
    assert sum(len(g["params"]) for g in parameter_groups(model, RECIPE)) == sum(p.requires_grad for p in model.parameters())


def test_best_is_the_best_epoch_and_the_history_is_on_disk(tmp_path):
    trainer, _ = run(tmp_path, epochs=3)
    rows = json.loads((tmp_path / "training_history.json").read_text())
    assert rows == trainer.history and [r["epoch"] for r in rows] == [0, 1, 2]
    best = max(rows, key=lambda r: (r["val_uar"], -r["val_loss"]))
    assert [r for r in rows if r["best"]][-1] == best
    for name in ("best", "last"): MultimodalFER.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("schedule", ["cosine", "restarts", "plateau"])
def test_every_schedule_starts_small(schedule, tmp_path):
    trainer = Trainer(MultimodalFER.from_preset("tiny"), replace(RECIPE, warmup_epochs=1.0, schedule=schedule), Clips(), Clips(3), tmp_path)
    rates = {g["name"]: g["lr"] for g in trainer.optimizer.param_groups}
    assert rates["branches"] == pytest.approx(RECIPE.lr_branches / 4) and rates["classifier"] == pytest.approx(RECIPE.lr_classifier / 4)


def test_restarts_end_at_the_lowest_rate_and_start_again():
    shares = [rate_with_restarts(s, 5, 100, floor=0.01) for s in range(5 + 100 + 200 + 1)]
    assert shares[5] == shares[105] == shares[305] == 1.0
    assert 0.01 < shares[104] < 0.011 and 0.01 < shares[304] < shares[104]
    assert all(a > b for a, b in zip(shares[105:305], shares[106:305]))


def test_a_plateau_halves_the_rate_of_every_group(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "validate", lambda self: dict(val_loss=1.0, val_war=0.5, val_uar=0.5))
    trainer, _ = run(tmp_path, data=Clips(2), schedule="plateau", warmup_epochs=1.0, epochs=9, lr_fusion=1e-3, freeze=["visual"])
    rates = [row["lr"] / RECIPE.lr_branches for row in trainer.history]
    assert rates == pytest.approx([1 / 2] + [1.0] * 6 + [0.5] * 2)  # the first value counts as a gain, then six without one
    assert trainer.optimizer.param_groups[1]["lr"] == pytest.approx(5e-4)


def test_it_stops_when_nothing_is_gained(tmp_path, monkeypatch):
    values = iter([0.2, 0.5, 0.5005, 0.4, 0.9])
    monkeypatch.setattr(Trainer, "validate", lambda self: dict(val_loss=1.0, val_war=0.5, val_uar=next(values)))
    trainer, _ = run(tmp_path, data=Clips(2), epochs=5, patience=2)
    assert [row["val_uar"] for row in trainer.history] == [0.2, 0.5, 0.5005, 0.4]


def test_a_frozen_part_keeps_its_running_averages_and_drops_nothing(tmp_path):
    seed_everything(0)
    model = MultimodalFER.from_preset("tiny")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = Trainer(model, replace(RECIPE, epochs=1, freeze=["audio", "classifier"]), Clips(), Clips(3), tmp_path)
    trainer.fit()
    same = {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()}
    assert all(same[k] for k in same if k.startswith(("audio.", "classifier.")))
    assert not any(v for k, v in same.items() if k.startswith("fusion.") and k.endswith("proj.weight"))
    training_mode(model, trainer.frozen)
    assert not any(m.training for part in (model.audio, model.classifier) for m in part.modules()) and model.fusion.training
    with pytest.raises(MmferError, match="'nose', which is no part"): run(tmp_path / "b", freeze=["nose"])


def test_all_frozen_is_refused(tmp_path):
    with pytest.raises(MmferError, match="every part is frozen"): run(tmp_path, freeze=["audio", "visual", "fusion", "classifier"])


def test_labels_are_read_without_decoding():
    table = pd.DataFrame(dict(path=["a.mp4", "b.mp4", "c.mp4"], label=[3, 1, 3], clip=["a", "b", "c"]))  # none of them exists
    assert clip_labels(Subset(ClipDataset(table), [2, 1])).to_dict() == {"c": 3, "b": 1}
    assert clip_labels(Clips(3)).tolist() == [0, 1, 2]


def test_class_weights_come_from_the_training_labels(tmp_path):
    data = Subset(Clips(9), [0, 8, 1])  # clip 8 has label 0 again
    trainer = Trainer(MultimodalFER.from_preset("tiny"), replace(RECIPE, class_weights=True), data, Clips(3), tmp_path)
    assert torch.equal(trainer.objective.loss.class_weights, class_weights([0, 0, 1]))


def test_mixup_blends_tokens_as_it_blends_pictures():
    pictures = collate([Clips(4)[i] for i in range(4)]) | dict(video=torch.rand(4, 2, 5, 3, 7))
    tokens = pictures | dict(video=None, video_tokens=pictures["video"].flatten(3))
    results = []
    for batch in (pictures, tokens):
        torch.manual_seed(0)
        results.append(mix_batch(batch, 0.4))
    (a, labels), (b, others) = results
    assert torch.equal(labels, others) and torch.equal(a["video"].flatten(3), b["video_tokens"]) and b["video"] is None
    assert not torch.equal(a["video"], pictures["video"]) and torch.equal(a["audio"], b["audio"])


def test_augmentation_hangs_on_seed_epoch_and_clip_alone():
    torch.manual_seed(0)
    data, before = TrainSet(Clips(3), augment=True, seed=0), torch.get_rng_state()
    a, b, other = data[1, 4], data[1, 5], TrainSet(Clips(3), augment=True, seed=1)[1, 4]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(data[1, 4]["video"], a["video"]) and torch.equal(data[1, 4]["audio"], a["audio"])
    assert not torch.equal(a["video"], b["video"]) and not torch.equal(a["video"], other["video"])


def test_the_mask_is_cropped_and_flipped_with_the_pictures():
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    video = torch.where(mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 255, 0).expand(4, 3, 64, 64).to(torch.uint8)
    for seed in range(8):
        torch.manual_seed(seed)
        item = augment_clip(dict(video=video, roi_mask=mask.flatten(1), label=0, clip="half"))
        bright = torch.nn.functional.adaptive_avg_pool2d(item["video"].float().mean(1), 8).flatten(1) > 100
        assert (bright == item["roi_mask"]).float().mean() > 0.87  # but for the column where the edge falls


def test_a_curriculum_begins_with_the_easiest_clips(tmp_path):
    seen = []

    class Watch(Trainer):
        def _train_step(self, batch):
            seen.append((len(self.history), batch["clip"]))
            return super()._train_step(batch)

    loss = pd.Series({f"clip-{i}": float(9 - i) for i in range(8)})
    Watch(MultimodalFER.from_preset("tiny"), replace(RECIPE, epochs=4, curriculum=0.5), Clips(8), Clips(3), tmp_path, difficulty=loss).fit()
    epochs = [{c for e, clips in seen if e == epoch for c in clips} for epoch in range(4)]
    assert epochs[0] == {"clip-4", "clip-5", "clip-6", "clip-7"} and epochs[0] < epochs[1] and list(map(len, epochs)) == [4, 6, 8, 8]
    with pytest.raises(MmferError, match="curriculum needs the difficulty"): run(tmp_path / "b", curriculum=0.5)
    with pytest.raises(MmferError, match="difficulty of clip-0 is not known"):
        Trainer(MultimodalFER.from_preset("tiny"), replace(RECIPE, curriculum=0.5), Clips(8), Clips(3), tmp_path / "c", difficulty=loss[1:])


def test_gradient_checkpointing_changes_nothing_but_the_memory(tmp_path):
    (a, one), (b, two) = run(tmp_path / "a", epochs=1), run(tmp_path / "b", epochs=1, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in two.modules())
    for p, q in zip(one.parameters(), two.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_vision_tower_is_compiled_when_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    _, model = run(tmp_path, data=Clips(2), epochs=1, compile=True)
    assert compiled == [model.visual.vision]


def test_tensorboard_holds_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    trainer, _ = run(tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "logs" / "mmfer")).Reload()
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx([row["train_loss"] for row in trainer.history])
    assert [e.step for e in events.Scalars("val_uar")] == [1, 2]


def test_trackers_that_are_not_there_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfer.trainer.find_spec", lambda name: None)
    with pytest.raises(MmferError, match="tracker wandb is not installed"): run(tmp_path, trackers=["wandb"])
    with pytest.raises(MmferError, match="tracker 'paper' is unknown"): run(tmp_path, trackers=["paper"])


@pytest.mark.parametrize("changes, advice", [
    (dict(batch_size=4), "try batch_size=2 with accumulation=2"), (dict(batch_size=1), "try gradient_checkpointing=True"),
    (dict(batch_size=1, gradient_checkpointing=True), "try shorter clips")])
def test_a_full_memory_ends_with_the_next_thing_to_try(changes, advice, tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA page of text.")
    monkeypatch.setattr("mmfer.trainer.MultimodalLoss.forward", full)
    with pytest.raises(MmferError, match=f"the memory of the device is full: {advice}") as e: run(tmp_path, **changes)
    assert "\n" not in str(e.value)


def test_time_spent_waiting_for_clips(tmp_path):
    class Slow(Clips):
        def __getitem__(self, i):
            time.sleep(0.2)
            return super().__getitem__(i)

    waits = {name: run(tmp_path / name, data=data, epochs=1, batch_size=5)[0].history[0]["data_wait"] for name, data in
             dict(slow=Slow(), fast=Clips()).items()}
    assert 0 <= waits["fast"] < 0.2 < 0.5 < waits["slow"] < 1


def test_workers_change_nothing(tmp_path):
    alone, helped = (run(tmp_path / str(n), workers=n, augment=True, mixup=0.3)[0] for n in (0, 1))
    assert without_times(alone.history) == without_times(helped.history)


def test_another_precision_in_the_same_process(tmp_path):
    for precision in ("no", "bf16"):
        trainer, _ = run(tmp_path / precision, precision=precision, epochs=1)
        assert trainer.accelerator.mixed_precision == precision and math.isfinite(trainer.history[0]["train_loss"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one(tmp_path):
    """Two gloo processes with batches of two: the losses of one process with batches of four. Only the first one writes, no clip is judged
    twice (three of them, two processes), and a run of two processes resumes exactly."""
    import two_processes
    port, context = free_port(), multiprocessing.get_context("fork")
    children = [context.Process(target=two_processes.job, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    for child in children: child.start()
    alone = two_processes.train(tmp_path / "alone", 4)
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0, 0]
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first["whole"] == first["resumed"] and second["whole"]["weights"] == first["whole"]["weights"]
    for row, other in zip(first["plain"]["history"], alone["history"], strict=True): assert row == pytest.approx(other, rel=1e-5)


def test_a_frozen_tower_is_read_from_the_cache(tmp_path):
    histories = []
    for cache in (None, tmp_path / "cache"):
        seed_everything(0)
        model = MultimodalFER.from_preset("tiny")
        model.visual.freeze()
        trainer = Trainer(model, replace(RECIPE, mixup=0.4), Clips(), Clips(3), tmp_path / f"run-{cache is None}", cache=cache)
        histories.append(without_times(trainer.fit()))
        assert ("video_tokens" in trainer.val_loader.dataset[0]) == (cache is not None)
    for a, b in zip(*histories, strict=True): assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.01)
    changed = Trainer(model, replace(RECIPE, augment=True), Clips(), Clips(3), tmp_path / "changed", cache=tmp_path / "cache")
    assert "video" in changed.val_loader.dataset[0]  # changed pictures cannot come from a cache


@pytest.mark.parametrize("system, part", [("audio_only", "visual"), ("visual_only", "audio"), ("late", "classifier")])
def test_a_part_that_a_system_does_not_have_may_be_frozen(system, part, tmp_path):
    seed_everything(0)
    trainer = Trainer(MultimodalFER.from_preset("tiny", system), replace(RECIPE, epochs=1, freeze=[part]), Clips(2), Clips(3), tmp_path)
    assert trainer.frozen == [] and math.isfinite(trainer.fit()[0]["train_loss"])


def test_settings_that_cannot_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MmferError, match="schedule 'spiral' is unknown: choose one of cosine"): run(tmp_path, schedule="spiral")
    with pytest.raises(MmferError, match="fp16 needs a GPU"): run(tmp_path, precision="fp16")


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("batch_size", 0), ("accumulation", -1), ("lr_branches", -1e-5), ("lr_classifier", math.inf), ("weight_decay", -0.1),
    ("warmup_epochs", math.nan), ("max_grad_norm", -1.0), ("save_batches", -1)])
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(MmferError, match=f"^{name} cannot be {value}: give [01] or more$"): require_possible(replace(RECIPE, **{name: value}))


def test_numbers_at_the_edge_are_taken():
    require_possible(replace(RECIPE, epochs=1, batch_size=1, accumulation=1, lr_fusion=0.0, weight_decay=0.0, warmup_epochs=0.0))


def test_two_trainers_in_one_process_keep_their_accumulation(tmp_path):
    made = [Trainer(MultimodalFER.from_preset("tiny"), replace(RECIPE, epochs=1, accumulation=n), Clips(), Clips(3), tmp_path / str(n)) for n in (2, 1)]
    for trainer in made: trainer.fit()
    assert [trainer.step for trainer in made] == [2, 3]  # 5 clips are 3 batches


def test_a_folder_that_another_trainer_took_meanwhile_is_refused(tmp_path):
    first, second = (Trainer(MultimodalFER.from_preset("tiny"), replace(RECIPE, epochs=1), Clips(), Clips(3), tmp_path) for _ in range(2))
    first.fit()
    with pytest.raises(MmferError, match="already holds a run"): second.fit()


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(tmp_path, monkeypatch):
    seed_everything(0)
    model = MultimodalFER.from_preset("tiny")
    trainer = Trainer(model, RECIPE, Clips(), Clips(3), tmp_path)
    next(model.classifier.parameters()).register_hook(lambda g: g * float("inf"))
    before = {k: v.clone() for k, v in model.named_parameters()}
    with pytest.raises(MmferError, match="the gradient became (nan|inf)"): trainer.fit()
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
