"""Comparisons: nothing of the test actors reaches training, a stopped one goes on, and the figures are what they say."""
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmfer import ablations
from mmfer.ablations import (
    BASELINES, SYSTEM_KINDS, Committee, FeatureCorpus, MediaCorpus, Recipe, Result, as_markdown, compare, comparison_table, feature_model, fold_parts, load_features, paired_difference, plan_systems, read_results, summarise_metric, toy_features, train_on_features)
from mmfer.core import MmferError, seed_everything
from mmfer.corpus import make_splits
from mmfer.evaluate import BOOTSTRAPPED, bootstrap_interval
from mmfer.fusion import FusionConfig, Lfm2Backbone, lfm2_config
from mmfer.toy import make_toy

ROOT = Path(__file__).resolve().parent.parent
QUICK = Recipe(width=16, ffn=32, epochs=1, batch_size=64, members=1)
LEARN = Recipe(width=32, ffn=64, members=1, average=0.9, epochs=15, batch_size=32, dropout=0.1, audio_dropout=0.1, visual_dropout=0.1, mixup=0.2, weight_decay=0.01)
TRAINED = [name for name in SYSTEM_KINDS if name != "lfm2_full"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_features(tmp_path_factory.mktemp("features") / "toy.npz")


@pytest.fixture(scope="module")
def first(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return compare(toy, out, recipe=QUICK, seeds=2), out


def rewrite(path, to, **changes):
    with np.load(path) as f: data = {k: f[k] for k in f.files} | changes
    np.savez(to, **{k: v for k, v in data.items() if v is not None})
    return to


# --- nothing leaks

def trained_weights(features, split, system):
    train, _ = fold_parts(features, split)
    seed_everything(0)
    model = feature_model(system, (train.audio.shape[2], train.visual.shape[2]), QUICK)
    return train_on_features(model, train, QUICK).state_dict()


def spoiled(features, actors):
    rows, other = np.isin(features.actor, actors), {k: v.copy() for k, v in vars(features).items()}
    other["label"][rows], other["audio"][rows], other["visual"][rows] = 3, 1e4, -1e4
    return dataclasses.replace(features, **other)


@pytest.mark.parametrize("system", TRAINED)
def test_test_actors_cannot_reach_training(toy, system):
    features = load_features(toy)
    split = make_splits(features.actor, "hicmae", n_val=0)[1]
    before = trained_weights(features, split, system)
    after = trained_weights(spoiled(features, split.test), split, system)
    assert all(torch.equal(before[k], after[k]) for k in before)
    touched = trained_weights(spoiled(features, split.train[:1]), split, system)
    assert any(not torch.equal(before[k], touched[k]) for k in before)


@pytest.mark.parametrize("system", ["logistic_regression", "attention"])
def test_test_labels_do_not_change_the_votes(toy, tmp_path, system):
    split = make_splits(load_features(toy).actor, "hicmae", n_val=0)[0]
    emotion, actor = (np.load(toy)[k] for k in ("emotion", "actor"))
    other = rewrite(toy, tmp_path / "other.npz", emotion=np.where(np.isin(actor, split.test), 1, emotion))
    votes = [FeatureCorpus(path, QUICK).run(system, split, 0)[0] for path in (toy, other)]
    assert votes[0].tolist() == votes[1].tolist()


def test_trainer_is_given_training_and_validation_clips_only(tmp_path, monkeypatch):
    make_toy(tmp_path / "toy", actors=4, clips_per_actor=8, progress=False)
    corpus, seen = MediaCorpus(tmp_path / "toy"), {}

    class Stop(Exception): pass

    class Watch:
        def __init__(self, model, recipe, train, val, folder): seen.update(train=train, val=val)
        def fit(self): raise Stop

    monkeypatch.setattr(ablations, "Trainer", Watch)
    split = corpus.splits("hicmae")[0]
    with pytest.raises(Stop): corpus.run("early", split, 0)
    for part in ("train", "val"):
        assert sorted(set(corpus.table.actor.iloc[list(seen[part].indices)])) == getattr(split, part)


def test_statistics_are_those_of_the_training_clips(toy):
    features = load_features(toy)
    split = make_splits(features.actor, "hicmae", n_val=0)[0]
    train, test = fold_parts(features, split)
    rows = np.isin(features.actor, split.train)
    clips, others = features.audio[rows].mean(1), features.audio[~rows]
    calm = others.mean(1, keepdims=True) + 0.25 * (others - others.mean(1, keepdims=True))
    expected = (calm - clips.mean(0)) / clips.std(0)
    assert_close(test.audio, torch.from_numpy(expected.clip(-4, 4)), rtol=0, atol=1e-4)
    assert_close(train.audio.mean((0, 1)), torch.zeros(16), rtol=0, atol=0.05)
    assert train.audio.abs().max() <= 4


# --- folds, systems, schema

def test_folds_of_twenty_actors():
    splits = make_splits(range(1, 21), "hicmae", n_val=0)
    assert [s.test for s in splits] == [list(range(i, i + 4)) for i in range(1, 21, 4)]
    assert all(not s.val and sorted(s.train + s.test) == list(range(1, 21)) for s in splits)


def test_compare_json_has_the_agreed_form(first):
    report, out = first
    assert json.loads((out / "compare.json").read_text()) == report
    assert list(report["systems"]) == [*TRAINED, *BASELINES]
    assert report["skipped"].keys() == {"lfm2_full"} and "weights" in report["skipped"]["lfm2_full"]
    for s in report["systems"].values():
        assert s.keys() == {"war", "uar", "f1_macro", "parameters", "seconds"}
        for m in BOOTSTRAPPED:
            assert s[m].keys() == {"mean", "sd", "ci", "folds"} and len(s[m]["folds"]) == 3
            assert s[m]["mean"] == pytest.approx(np.mean(s[m]["folds"]))
            assert s[m]["ci"][0] <= s[m]["ci"][1]
    assert (out / "compare.png").stat().st_size > 5000
    assert (out / "compare.md").read_text() == as_markdown(comparison_table(report))


def test_baselines_always_stand_beside(toy, tmp_path):
    assert list(compare(toy, tmp_path, systems=("late",), folds="single", recipe=QUICK)["systems"]) == ["late", *BASELINES]


def test_unknown_system_is_refused():
    with pytest.raises(MmferError, match="'middle' does not exist"): plan_systems(("early", "middle"))


def test_lfm2_full_takes_its_layers_from_the_weights(toy, tmp_path):
    torch.manual_seed(0)
    backbone = Lfm2Backbone(lfm2_config(FusionConfig(d_model=32, layers=6, heads=4, kv_heads=2, ffn=64)))
    backbone.save_pretrained(tmp_path / "lfm2")
    with pytest.warns(UserWarning, match="LFM Open License"):
        report = compare(toy, tmp_path / "out", systems=("lfm2_full",), folds="single", recipe=QUICK, lfm2=tmp_path / "lfm2")
    assert "lfm2_full" in report["systems"] and not report["skipped"]
    with pytest.warns(UserWarning): model = feature_model("lfm2_full", (16, 32), QUICK, lfm2=tmp_path / "lfm2")
    train, _ = fold_parts(load_features(toy), make_splits(range(1, 7), n_val=0)[0])
    after = train_on_features(model, train, QUICK).fusion.backbone.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in backbone.state_dict().items())


# --- going on after a stop

SCRIPT = """
import sys
from mmfer.ablations import Recipe, compare
compare(sys.argv[1], sys.argv[2], recipe=Recipe(width=16, ffn=32, epochs=1, batch_size=64, members=1), seeds=2)
"""


def test_a_killed_comparison_goes_on(first, toy, tmp_path):
    report, done = first
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, toy, out], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while len(list(out.glob("jobs/*.json"))) < 5 and process.poll() is None and time.monotonic() < limit: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in out.glob("jobs/*.json")}
    assert 5 <= len(before) < len(list(done.glob("jobs/*.json"))) and not (out / "compare.json").exists()
    resumed = compare(toy, out, recipe=QUICK, seeds=2)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    without_time = lambda r: {name: {k: v for k, v in s.items() if k != "seconds"} for name, s in r["systems"].items()}
    assert without_time(resumed) == without_time(report)


def test_more_seeds_reuse_the_first(toy, tmp_path, monkeypatch):
    compare(toy, tmp_path, systems=("late",), folds="single", recipe=QUICK)
    ran = []
    real = ablations.run_job
    monkeypatch.setattr(ablations, "run_job", lambda c, s, system, fold, seed: ran.append((system, seed)) or real(c, s, system, fold, seed))
    compare(toy, tmp_path, systems=("late",), folds="single", recipe=QUICK, seeds=2)
    assert ran == [(name, 1) for name in ("late", *BASELINES)]


def test_a_committee_is_the_mean_of_different_members(toy):
    split = make_splits(load_features(toy).actor, "hicmae", n_val=0)[0]
    _, test = fold_parts(load_features(toy), split)
    members = [feature_model("early", (16, 32), QUICK).eval() for _ in range(3)]
    votes = [m(test.audio, test.visual).logits.softmax(-1) for m in members]
    assert not torch.allclose(votes[0], votes[1])
    assert_close(Committee(members)(test.audio, test.visual), sum(votes) / 3)
    sizes = [FeatureCorpus(toy, dataclasses.replace(QUICK, members=n)).run("early", split, 0)[1] for n in (1, 2)]
    assert sizes[1] == 2 * sizes[0]


def test_other_epochs_on_clips_are_refused(tmp_path):
    ablations._require_same(tmp_path, dict(kind="media", epochs=None, lfm2=None))
    with pytest.raises(MmferError, match="another epochs"): ablations._require_same(tmp_path, dict(kind="media", epochs=5, lfm2=None))
    ablations._require_same(tmp_path, dict(kind="media", epochs=None, lfm2="weights"))
    with pytest.raises(MmferError, match="another lfm2"): ablations._require_same(tmp_path, dict(kind="media", epochs=None, lfm2="others"))


@pytest.mark.parametrize("change, named", [(dict(epochs=2), "recipe"), (dict(folds="single"), "folds")])
def test_another_comparison_is_refused(first, toy, change, named):
    _, out = first
    with pytest.raises(MmferError, match=f"another {named}"): compare(toy, out, **dict(recipe=QUICK) | change)


def test_other_features_are_refused(first, toy, tmp_path):
    other = rewrite(toy, tmp_path / "other.npz", audio=np.load(toy)["audio"] + 1)
    with pytest.raises(MmferError, match="another data"): compare(other, first[1], recipe=QUICK)


# --- figures

def results(seeds=2, right=0.7):
    rng = np.random.default_rng(0)
    def one(fold, seed):
        actor, label = np.repeat([2 * fold + 1, 2 * fold + 2], 40), rng.integers(0, 8, 80)
        guess = np.where(rng.random(80) < right, label, rng.integers(0, 8, 80))
        return Result("x", fold, seed, [f"{fold}-{i}" for i in range(80)], actor.tolist(), label.tolist(), guess.tolist(), 1, 1.0)
    return [one(fold, seed) for fold in range(3) for seed in range(seeds)]


def test_interval_is_that_of_the_evaluation_chapter():
    runs = results(seeds=1)
    joined = [np.concatenate([getattr(r, k) for r in runs]) for k in ("label", "prediction", "actor")]
    assert summarise_metric(runs, "uar")["ci"] == pytest.approx(bootstrap_interval(*joined, "uar"))


def test_one_training_has_no_deviation_and_one_actor_no_interval():
    one = results(seeds=1)[0]
    assert summarise_metric([one], "war")["sd"] is None
    alone = dataclasses.replace(one, actor=[1] * 80)
    assert summarise_metric([alone], "war")["ci"] is None


def test_a_system_does_not_differ_from_itself():
    assert paired_difference(results(), results(), "war") == (0.0, [0.0, 0.0])


def test_other_clips_are_no_pair():
    with pytest.raises(MmferError, match="same clips"): paired_difference(results(), results()[:-1], "war")


def test_paired_difference_sees_a_better_system():
    difference, (low, high) = paired_difference(results(right=0.9), results(right=0.4), "war")
    assert 0.2 < low < difference < high


def test_fusions_pass_single_modalities(toy, tmp_path):
    systems = compare(toy, tmp_path, folds="single", recipe=LEARN, systems=("audio_only", "visual_only", "early", "attention", "lfm2_lightweight"))["systems"]
    single = max(systems[name]["uar"]["mean"] for name in ("audio_only", "visual_only"))
    for name in ("early", "attention", "lfm2_lightweight"): assert systems[name]["uar"]["mean"] >= single + 0.2, name


# --- faults

@pytest.mark.parametrize("changes, message", [
    (dict(audio=None), "no array 'audio'"),
    (dict(audio=np.zeros((360, 16))), "do not fit"),
    (dict(visual=np.zeros((359, 8, 16))), "do not fit"),
    (dict(emotion=np.zeros(360, int)), "not from 1 to 8"),
    (dict(actor=np.ones(5, int)), "different lengths"),
    (dict(clip=["same"] * 360), "twice"),
    (dict(visual=np.full((360, 16), np.nan)), "clip-0000 are not finite")])
def test_bad_features_are_refused(toy, tmp_path, changes, message):
    with pytest.raises(MmferError, match=message): load_features(rewrite(toy, tmp_path / "bad.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_unreadable_file_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(MmferError, match="x.npz is not a readable"): load_features(tmp_path / "x.npz")


def test_missing_data_is_refused(tmp_path):
    with pytest.raises(MmferError, match="nothing.npz does not exist"): compare(tmp_path / "nothing.npz", tmp_path / "out")


def test_visual_features_of_a_clip_are_repeated(toy, tmp_path):
    flat = rewrite(toy, tmp_path / "flat.npz", visual=np.load(toy)["visual"][:, 0])
    visual = load_features(flat).visual
    assert visual.shape == (360, 8, 16) and (visual == visual[:, :1]).all()


# --- from clips

def test_compare_on_clips(tmp_path):
    make_toy(tmp_path / "toy", actors=3, clips_per_actor=8, progress=False)
    report = compare(tmp_path / "toy", tmp_path / "out", systems=("early",), folds="single", epochs=1)
    assert report["kind"] == "media" and list(report["systems"]) == ["early", *BASELINES]
    assert [len(r.clip) for r in read_results(tmp_path / "out")["early"]] == [8]


# --- kept results

def kept(name): return json.loads((ROOT / "benchmarks" / "results" / f"compare_{name}" / "compare.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["toy", "ravdess"])
def test_chapter_shows_the_kept_results(name):
    chapter = json.loads((ROOT / "nbs" / "24_ablations.ipynb").read_text(encoding="utf-8"))
    prose = "\n".join("".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "markdown")
    assert as_markdown(comparison_table(kept(name))).strip() in prose


def test_kept_toy_results_reach_the_goal():
    systems = kept("toy")["systems"]
    single = max(systems[name]["uar"]["mean"] for name in ("audio_only", "visual_only"))
    for name in ("early", "late", "attention", "lfm2_lightweight"): assert systems[name]["uar"]["mean"] >= single + 0.2, name


def test_kept_results_are_those_of_the_features(shared_data):
    before, corpus = kept("ravdess"), FeatureCorpus(shared_data / "ravdess_features" / "ravdess_actors01-20.npz")
    assert {k: before[k] for k in corpus.settings()} == corpus.settings()
    splits = corpus.splits("hicmae")
    assert before["folds"] == [s.test for s in splits]
    votes = [corpus.run("logistic_regression", s, 0)[0] for s in splits]
    war = [float(np.mean(v == corpus.test_clips(s)["label"])) for v, s in zip(votes, splits)]
    assert war == pytest.approx(before["systems"]["logistic_regression"]["war"]["folds"], abs=0.005)
