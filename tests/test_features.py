"""Features: any corpus is read as it stands, no test speaker reaches training, and each part takes effect."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmfer.core import MmferError, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.features import (
    BASELINES, LIMIT, SYSTEM_KINDS, Ensemble, FeatureConfig, FeatureSet, Standardise, _loss, _mixed,
    _optimiser, branch_logits, feature_model, fit_baseline, fold_sets, load_features, toy_features,
    train_ensemble, train_on_features, with_roots)
from mmfer.fusion import FusionConfig, Lfm2Backbone, lfm2_config
from mmfer.model import FEROutput

QUICK = FeatureConfig(width=16, ffn=32, epochs=1, batch_size=64, members=1)
TRAINED = [name for name in SYSTEM_KINDS if name != "lfm2_full"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_features(tmp_path_factory.mktemp("features") / "toy.npz")


@pytest.fixture(scope="module")
def train(toy):
    features = load_features(toy)
    return fold_sets(features, features.folds("hicmae")[0])[0]


def rewrite(path, to, **changes):
    "A copy of a features file with other arrays; None leaves one out."
    with np.load(path) as f: data = {k: f[k] for k in f.files} | changes
    np.savez(to, **{k: v for k, v in data.items() if v is not None})
    return to


# Files


def test_every_number_of_ravdess_means_its_emotion(toy, tmp_path):
    number = np.tile(np.arange(1, 9), 45)
    actor = np.repeat([1, 2, 11, 12, 23, 24], 60)
    old = rewrite(toy, tmp_path / "old.npz", emotion=number, emotions=None, speaker=None, actor=actor)
    features = load_features(old)
    named = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
    assert features.emotions == named and features.name == "RAVDESS"
    assert features.table.emotion.tolist() == [named[n - 1] for n in number]
    assert features.table.label.tolist() == [n - 1 for n in number]
    assert sorted(set(features.table.speaker)) == ["01", "02", "11", "12", "23", "24"]


def test_texts_are_read_as_they_stand(toy, tmp_path):
    emotion = np.resize(["shy", "bored", "proud"], 360)
    speaker = np.repeat(["Ann", "Bob", "7"], 120)
    own = rewrite(toy, tmp_path / "own.npz", emotion=emotion, emotions=None, speaker=speaker)
    features = load_features(own)
    assert features.emotions == ("bored", "proud", "shy") and features.name == "features"
    assert features.table.label.tolist()[:3] == [2, 0, 1]
    assert features.table.speaker.tolist() == speaker.tolist()
    own = rewrite(toy, tmp_path / "own.npz", emotion=emotion, emotions=["shy", "proud", "bored"])
    assert load_features(own).table.label.tolist()[:3] == [0, 2, 1]


def test_toy_numbers_mean_the_emotions_of_ravdess(toy):
    features = load_features(toy)
    assert features.emotions == RAVDESS_EMOTIONS
    assert features.table.groupby("emotion").size().to_dict() == {
        e: 24 if e == "neutral" else 48 for e in RAVDESS_EMOTIONS}


def test_rows_of_table_and_arrays_belong_together(toy):
    "In the toy, clips of one voice group have nearly the same mean, and those of another a different one."
    features = load_features(toy)
    mean = {e: features.audio[features.table.emotion == e].mean((0, 1)) for e in RAVDESS_EMOTIONS}
    within = np.linalg.norm(mean["calm"] - mean["sad"])
    across = np.linalg.norm(mean["calm"] - mean["angry"])
    assert within < 0.5 * across


def test_visual_features_of_a_clip_are_repeated(toy, tmp_path):
    flat = rewrite(toy, tmp_path / "flat.npz", visual=np.load(toy)["visual"][:, 0])
    visual = load_features(flat).visual
    assert visual.shape == (360, 8, 16) and (visual == visual[:, :1]).all()


@pytest.mark.parametrize("changes, message", [
    (dict(audio=None), "no array 'audio'"),
    (dict(speaker=None), "no array 'speaker'"),
    (dict(audio=np.zeros((360, 16))), "do not fit"),
    (dict(visual=np.zeros((359, 8, 16))), "do not fit"),
    (dict(emotion=np.zeros(360, int)), "not from 1 to 8"),
    (dict(emotion=np.full(360, 9)), "not from 1 to 8"),
    (dict(emotion=np.full(360, 1.5)), "not from 1 to 8"),
    (dict(emotions=["calm", "sad"]), "not in its array emotions"),
    (dict(speaker=np.array(["a"] * 5)), "different lengths"),
    (dict(clip=["same"] * 360), "clip same is there twice"),
    (dict(visual=np.full((360, 16), np.nan)), "clip-0000 are not finite")])
def test_bad_features_are_refused(toy, tmp_path, changes, message):
    bad = rewrite(toy, tmp_path / "bad.npz", **changes)
    with pytest.raises(MmferError, match=f"bad.npz.*{message}"): load_features(bad)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_unreadable_file_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(MmferError, match="x.npz cannot be read.*pass a features file"):
        load_features(tmp_path / "x.npz")


def test_folds_of_twenty_actors(tmp_path):
    features = load_features(toy_features(tmp_path / "twenty.npz", speakers=20, dim=2))
    splits = features.folds("hicmae")
    assert [s.test for s in splits] == [[f"{k:02d}" for k in range(i, i + 4)] for i in range(1, 21, 4)]
    assert all(not s.val and sorted(s.train + s.test) == sorted(set(features.table.speaker)) for s in splits)


# Nothing leaks


def trained_weights(features, split, system):
    train, _ = fold_sets(features, split)
    seed_everything(0)
    return train_on_features(feature_model(system, train, QUICK), train, QUICK).state_dict()


def spoiled(features, speakers):
    other = copy.deepcopy(features)
    rows = features.table.speaker.isin(speakers).to_numpy()
    other.table.loc[rows, "label"] = 3
    other.audio[rows] = 1e4
    other.visual[rows] = -1e4
    return other


@pytest.mark.parametrize("system", TRAINED)
def test_test_speakers_cannot_reach_training(toy, system):
    features = load_features(toy)
    split = features.folds("hicmae")[1]
    before = trained_weights(features, split, system)
    after = trained_weights(spoiled(features, split.test), split, system)
    assert all(torch.equal(before[k], after[k]) for k in before)
    touched = trained_weights(spoiled(features, split.train[:1]), split, system)
    assert any(not torch.equal(before[k], touched[k]) for k in before)


def test_statistics_are_those_of_the_training_clips(toy):
    features = load_features(toy)
    split = features.folds("hicmae")[0]
    train, test = fold_sets(features, split)
    rows = features.table.speaker.isin(split.train).to_numpy()
    clips = features.audio[rows].mean(1)
    others = features.audio[~rows]
    middle = others.mean(1, keepdims=True)
    expected = (middle + 0.25 * (others - middle) - clips.mean(0)) / clips.std(0)
    assert_close(test.audio, torch.from_numpy(expected.clip(-4, 4)), rtol=0, atol=1e-4)
    assert_close(train.audio.mean((0, 1)), torch.zeros(16), rtol=0, atol=0.05)
    assert test.label.tolist() == features.table.label[~rows].tolist() and test.n_emotions == 8


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 20), st.integers(1, 5), st.integers(1, 4), st.floats(-50, 50), st.floats(0.5, 20))
def test_standardise_forgets_scale_and_origin(clips, segments, dim, origin, scale):
    x = np.random.default_rng(clips).normal(size=(clips, segments, dim))
    moved = Standardise(origin + scale * x)(origin + scale * x)
    assert np.abs(moved).max() <= LIMIT
    assert np.allclose(moved, Standardise(x)(x), atol=1e-2)


def test_roots_keep_the_sign():
    assert with_roots(np.array([[4.0, -9.0, 0.0]])).tolist() == [[4.0, -9.0, 0.0, 2.0, -3.0, 0.0]]


# Systems and training


@pytest.mark.parametrize("system", TRAINED)
@pytest.mark.parametrize("emotions", [3, 8])
def test_every_system_fits_any_number_of_emotions(system, emotions):
    clips = FeatureSet(torch.randn(5, 4, 6), torch.randn(5, 4, 7), torch.arange(5) % emotions, emotions)
    model = feature_model(system, clips, QUICK)
    assert model.eval()(clips.audio, clips.visual).logits.shape == (5, emotions)
    after = train_on_features(model, clips, QUICK)
    assert after(clips.audio, clips.visual).logits.isfinite().all()


def test_unknown_system_is_refused(train):
    with pytest.raises(MmferError, match="system 'middle' is unknown"): feature_model("middle", train, QUICK)


def test_branches_are_added_in_a_test_only(train):
    nothing = dict(dropout=0.0, audio_dropout=0.0, visual_dropout=0.0, modality_dropout=0.0)
    model = feature_model("early", train, dataclasses.replace(QUICK, **nothing))
    torch.nn.init.normal_(model.audio.head.weight)
    clips = train.audio[:6], train.visual[:6]
    trained = model.train()(*clips)
    tested = model.eval()(*clips)
    assert_close(tested.logits, trained.logits + branch_logits(trained))


def test_a_hidden_branch_has_no_logits():
    out = FEROutput(audio_logits=torch.ones(2, 3), audio_present=torch.tensor([True, False]),
                    visual_logits=torch.full((2, 3), 5.0), visual_present=torch.tensor([True, True]))
    assert branch_logits(out).tolist() == [[6.0] * 3, [5.0] * 3]


def test_modality_dropout_hides_branches_in_training_only(train):
    model = feature_model("early", train, dataclasses.replace(QUICK, modality_dropout=1.0))
    out = model.train()(train.audio[:32], train.visual[:32])
    assert (out.audio_present ^ out.visual_present).all()
    out = model.eval()(train.audio[:32], train.visual[:32])
    assert out.audio_present.all() and out.visual_present.all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.floats(0.1, 4), st.integers(0, 5))
def test_mixup_blends_clips_and_labels_alike(n, alpha, seed):
    torch.manual_seed(seed)
    x = torch.eye(n)[:, None]
    audio, visual, targets = _mixed(x, 2 * x, torch.arange(n), n, alpha)
    assert_close(audio[:, 0], targets)
    assert_close(visual, 2 * audio)
    assert_close(targets.sum(1), torch.ones(n))


def test_each_part_of_the_loss_counts(train):
    seed_everything(0)
    model = feature_model("early", train, QUICK).eval()
    targets = torch.nn.functional.one_hot(train.label, 8).float()

    def loss(**changes):
        return _loss(model, train.audio, train.visual, targets, dataclasses.replace(QUICK, **changes)).item()
    without = loss(branch_loss=0.0, label_smoothing=0.0)
    assert without == pytest.approx(2 * math.log(8), abs=0.3)  # fused, and the sum of the branches
    assert loss(branch_loss=0.5, label_smoothing=0.0) - without == pytest.approx(math.log(8), abs=0.2)


def test_the_rate_rises_then_falls_to_nothing(train):
    model = feature_model("early", train, QUICK)
    optimizer, schedule = _optimiser(model, QUICK, updates=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0] / QUICK.lr)
        optimizer.step()
        schedule.step()
    rise = [(k + 1) / 11 for k in range(10)]
    fall = [(1 + math.cos(math.pi * k / 90)) / 2 for k in range(90)]
    assert rates == pytest.approx(rise + fall)


CHANGES = (
    dict(weight_decay=0.0), dict(mixup=0.1), dict(lr=1e-3), dict(average=0.5), dict(audio_dropout=0.0),
    dict(visual_dropout=0.0), dict(modality_dropout=0.9), dict(branch_loss=0.9), dict(label_smoothing=0.3),
    dict(epochs=2))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_takes_effect(train, change):
    def weights(config):
        seed_everything(0)
        model = train_on_features(feature_model("early", train, config), train, config)
        return model.fusion.projection.out.weight
    assert not torch.equal(weights(QUICK), weights(dataclasses.replace(QUICK, **change)))


def test_what_is_tested_is_the_average_of_the_weights(train):
    seed_everything(0)
    model = feature_model("early", train, QUICK)
    averaged = train_on_features(model, train, QUICK)
    assert not averaged.training
    assert not torch.equal(averaged.audio.head.weight, model.audio.head.weight)


def test_an_ensemble_is_the_mean_of_different_members(train):
    members = [feature_model("early", train, QUICK).eval() for _ in range(3)]
    said = [m(train.audio, train.visual).logits.softmax(-1) for m in members]
    assert not torch.allclose(said[0], said[1])
    assert_close(Ensemble(members)(train.audio, train.visual), sum(said) / 3)
    two = train_ensemble("early", train, dataclasses.replace(QUICK, members=2))
    assert len(two.members) == 2 and not two.training
    assert not torch.equal(*(m.audio.head.weight for m in two.members))


def test_lfm2_full_takes_its_layers_from_the_weights(train, tmp_path):
    torch.manual_seed(0)
    backbone = Lfm2Backbone(lfm2_config(FusionConfig(d_model=32, layers=6, heads=4, kv_heads=2, ffn=64)))
    backbone.save_pretrained(tmp_path / "lfm2")
    with pytest.warns(UserWarning, match="LFM Open License"):
        model = feature_model("lfm2_full", train, QUICK, lfm2=tmp_path / "lfm2")
    after = train_on_features(model, train, QUICK).fusion.backbone.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in backbone.state_dict().items())


# Baselines


def test_majority_says_what_is_most_frequent():
    labels = np.array([2, 1, 2, 0])
    predictions, parameters = fit_baseline("majority", np.zeros((4, 2)), labels, np.zeros((3, 2)))
    assert predictions.tolist() == [2, 2, 2] and parameters == 0


def test_logistic_regression_tells_two_clouds_apart():
    rng = np.random.default_rng(0)
    label = np.arange(80) % 2
    x = rng.normal(size=(80, 3)) + 4 * label[:, None]
    predictions, parameters = fit_baseline("logistic_regression", x[:60], label[:60], x[60:])
    assert (predictions == label[60:]).all() and parameters == 4  # three weights and one offset


def test_unknown_baseline_is_refused():
    with pytest.raises(MmferError, match=f"choose one of {', '.join(BASELINES)}"):
        fit_baseline("oracle", np.zeros((2, 1)), np.zeros(2, int), np.zeros((2, 1)))
