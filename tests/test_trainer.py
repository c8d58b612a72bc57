"""Training: the same seed gives the same run, partial groups count, the first step is small, bad losses stop it."""
import json
import math
from dataclasses import replace

import pytest
import torch

from mmfer.core import MmferError, seed_everything
from mmfer.model import MultimodalFER
from mmfer.trainer import RECIPES, Trainer, parameter_groups, rate_at

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


def run(out, data=None, **changes):
    seed_everything(0)
    model = MultimodalFER.from_preset("tiny")
    trainer = Trainer(model, replace(RECIPE, **changes), data or Clips(), Clips(3), out)
    trainer.fit()
    return trainer, model


def test_same_seed_same_weights(tmp_path):
    (a, first), (b, second) = run(tmp_path / "a"), run(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(first.state_dict().values(), second.state_dict().values()))
    for rows in (a.history, b.history): [row.pop("seconds") for row in rows]
    assert a.history == b.history
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
