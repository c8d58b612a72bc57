"""What needs a GPU. `make gpu` runs it, or `pytest -m gpu` on a machine that has one.

With the variable MMFER_TRY_OUT it runs on a CPU as far as it can, which shows that the tests themselves work.
"""
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmfer.cache import encode_clip, use_cache
from mmfer.core import seed_everything, this_machine
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.evaluate import predict, probabilities_of
from mmfer.explain import explain
from mmfer.faces import middle_square
from mmfer.features import FeatureConfig, fold_sets, load_features, toy_features, train_ensemble
from mmfer.fusion import SYSTEMS
from mmfer.model import MultimodalFER
from mmfer.processor import FaceClip, Processor, collate
from mmfer.runs import rng_state, set_rng_state
from mmfer.stages import run_stages, three_stages
from mmfer.trainer import RECIPES, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
HERE = this_machine().device
without_gpu = pytest.mark.skipif(HERE == "cpu" and not os.environ.get("MMFER_TRY_OUT"), reason="needs a GPU")
pytestmark = [pytest.mark.gpu, without_gpu]
HALF = {"fp16": 0.02, "bf16": 0.05}  # how far a probability may lie from that of float32
RECIPE = replace(RECIPES["tiny"], epochs=2, batch_size=4, accumulation=2, mixup=0.2)


def require_possible(precision):
    if HERE == "cpu" and precision == "fp16": pytest.skip("a CPU does not train in fp16")
    has_bf16 = HERE == "cpu" or this_machine().precision == "bf16"
    if precision == "bf16" and not has_bf16: pytest.skip("this GPU has no units for bf16")


class Clips(torch.utils.data.Dataset):
    "Made-up clips."
    def __init__(self, n=10, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.items = [self.made_up(f"{seed}-{i}", i % 8, g) for i in range(n)]

    def made_up(self, name, label, g):
        audio = 0.1 * torch.randn(12_000, generator=g)
        video = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=g)
        mask = torch.rand(6, 64, generator=g) > 0.5
        return dict(audio=audio, video=video, roi_mask=mask, label=label, clip=name)

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return dict(self.items[i])


def tiny(system="lfm2", seed=0):
    seed_everything(seed)
    return MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS, system, weights="none")


def frozen_tower():
    model = tiny()
    model.visual.freeze()
    return model


def weights_of(model): return {name: w.float().cpu().clone() for name, w in model.state_dict().items()}


def farthest(a, b): return max((a[name] - b[name]).abs().max().item() for name in a)


def train(out, recipe=RECIPE, model=None, **settings):
    trainer = Trainer(model or tiny(), recipe, Clips(), Clips(4, seed=1), out, **settings)
    return trainer, trainer.fit()


# Training


@pytest.mark.parametrize("precision", ("no", *HALF))
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_learns_in_every_precision(tmp_path, system, precision):
    require_possible(precision)
    model = tiny(system)
    before = weights_of(model)
    trainer, history = train(tmp_path, replace(RECIPE, precision=precision), model)
    assert trainer.accelerator.device.type == HERE
    assert np.isfinite([[row["train_loss"], row["val_loss"]] for row in history]).all()
    after = weights_of(model)
    assert all(torch.isfinite(w).all() for w in after.values()) and farthest(before, after) > 1e-4


def test_half_precision_learns_what_float32_learns(tmp_path):
    precision = this_machine().precision if HERE == "cuda" else "bf16"
    losses = {}
    for name in ("no", precision):
        _, history = train(tmp_path / name, replace(RECIPE, epochs=4, precision=name))
        losses[name] = history[-1]["train_loss"]
    assert losses[precision] == pytest.approx(losses["no"], rel=0.1)


def test_a_resumed_training_draws_the_same_random_numbers(tmp_path):
    whole, rows = train(tmp_path / "whole")
    stopped = Trainer(tiny(), RECIPE, Clips(), Clips(4, seed=1), tmp_path / "stopped")
    with stopped._guarded(): stopped.run_epoch()
    resumed, again = train(tmp_path / "stopped", model=tiny(seed=9), resume=True)
    distance = farthest(weights_of(whole.model), weights_of(resumed.model))
    other, _ = train(tmp_path / "other", replace(RECIPE, seed=1))
    assert distance < 0.1 * farthest(weights_of(whole.model), weights_of(other.model))
    assert again[-1]["train_loss"] == pytest.approx(rows[-1]["train_loss"], rel=1e-3)


def test_the_random_numbers_of_the_device_come_back():
    device = torch.device(HERE)
    state = rng_state(device)
    first = torch.rand(5, device=device)
    assert not torch.equal(first, torch.rand(5, device=device))
    set_rng_state(state, device)
    assert torch.equal(first, torch.rand(5, device=device))


@pytest.mark.parametrize("change", (dict(compile=True), dict(gradient_checkpointing=True)))
def test_a_switch_for_speed_or_memory_does_not_change_the_training(tmp_path, change):
    recipe = replace(RECIPE, epochs=1)
    _, plain = train(tmp_path / "plain", recipe)
    _, switched = train(tmp_path / "switched", replace(recipe, **change))
    assert switched[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], rel=0.02)


def test_a_training_from_cached_tokens(tmp_path):
    _, plain = train(tmp_path / "plain", model=frozen_tower())
    _, cached = train(tmp_path / "cached", model=frozen_tower(), cache=tmp_path / "cache")
    assert cached[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=0.02)


def test_three_stages(tmp_path):
    recipe = replace(RECIPE, epochs=5, precision=this_machine().precision)
    model = tiny()
    run_stages(model, three_stages(recipe), Clips(), Clips(4, seed=1), tmp_path)
    answers = predict(model, DataLoader(Clips(4), 2, collate_fn=collate), progress=False)
    assert np.isfinite(probabilities_of(answers)).all()


# Answers


@pytest.mark.parametrize("precision", ("no", *HALF))
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_gpu_answers_as_a_cpu_does(system, precision):
    require_possible(precision)
    model = tiny(system)
    loader = DataLoader(Clips(), 4, collate_fn=collate)
    here = predict(model, loader, HERE, precision, progress=False)
    cpu = predict(model, loader, "cpu", progress=False)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert here["clip"].tolist() == cpu["clip"].tolist()
    assert np.abs(probabilities_of(here) - probabilities_of(cpu)).max() < HALF.get(precision, 1e-3)


def film():
    item = Clips(1)[0]
    pictures = item["video"].permute(0, 2, 3, 1).numpy()
    return FaceClip(Path("film.mp4"), item["audio"].numpy(), pictures, np.linspace(0, 0.7, 6), 0.75,
                    track=middle_square(pictures))


def test_explanations_on_a_gpu_are_those_of_a_cpu(monkeypatch):
    model = tiny().eval()
    processor = Processor.for_model(model.config, faces="none")
    here = explain(model, processor, film())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = explain(model, processor, film())
    np.testing.assert_allclose(here.probabilities, cpu.probabilities, atol=0.05)
    np.testing.assert_allclose(here.segments, cpu.segments, atol=0.05)
    np.testing.assert_allclose(here.shares, cpu.shares, atol=0.1)
    assert [*here.maps] == [*cpu.maps]
    for method, expected in cpu.maps.items():
        for part in ("sound", "frames", "place"):
            values = getattr(expected, part)
            found = getattr(here.maps[method], part)
            np.testing.assert_allclose(found, values, atol=0.1 + 0.1 * np.abs(values).max())


def test_tokens_from_a_gpu_are_those_of_a_cpu(tmp_path):
    model = frozen_tower()
    item = Clips(1)[0]
    cpu = encode_clip(model.visual, item).astype(np.float32)
    model.to(HERE)
    here = encode_clip(model.visual, item).astype(np.float32)
    assert np.abs(here - cpu).max() < 0.02 * np.abs(cpu).max()
    loader = DataLoader(use_cache(model.visual, Clips(), tmp_path, progress=False), 4, collate_fn=collate)
    on_pictures = predict(model, DataLoader(Clips(), 4, collate_fn=collate), progress=False)
    on_tokens = predict(model, loader, progress=False)
    assert np.abs(probabilities_of(on_tokens) - probabilities_of(on_pictures)).max() < 0.05


def test_an_ensemble_on_features_learns_on_a_gpu(tmp_path):
    features = load_features(toy_features(tmp_path / "toy.npz"))
    train, test = fold_sets(features, features.folds("single")[0])
    config = FeatureConfig(width=32, ffn=64, members=1, average=0.9, epochs=15, batch_size=32, dropout=0.1,
                           audio_dropout=0.1, visual_dropout=0.1, mixup=0.2, weight_decay=0.01)
    seed_everything(0)
    ensemble = train_ensemble("early", train.to(HERE), config)
    clips = test.to(HERE)
    with torch.inference_mode(): right = ensemble(clips.audio, clips.visual).argmax(1) == clips.label
    assert right.float().mean() > 0.65  # one modality alone reaches 0.5


# Memory


@pytest.mark.skipif(HERE == "cpu", reason="memory can be capped on a GPU only")
def test_a_step_of_full_fits_into_12_gb():
    from full_12gb import Settings, measure
    measured = measure(Settings(steps=2))
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 < measured["peak_gb"] <= 12 and measured["clips_per_second"] > 0
