"""Errors: which clips are shown, that they can be played, what a map of features claims."""
import io
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from mmfer.classifier import POOLINGS, Classifier, ClassifierConfig
from mmfer.core import MmferError
from mmfer.errors import (
    browse_confusion, clip_film, clips_of_cell, confident_mistakes, describe_answers, fused_features,
    hardest_clips, neighbour_shares, play_clips, plot_clips, plot_feature_map)
from mmfer.media import SAMPLE_RATE
from mmfer.processor import FaceClip

EMOTIONS = ("calm", "happy", "sad")


def table(n, seed=0):
    "Results of `n` clips, labels and answers at random."
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), n)
    facts = pd.DataFrame(dict(clip=[f"c{i}" for i in range(n)], label=rng.integers(0, 3, n),
                              prediction=p.argmax(1), speaker=rng.choice(["01", "02"], n)))
    return facts.join(pd.DataFrame(p, columns=[f"p_{e}" for e in EMOTIONS]))


def make_clip(side=64, seconds=1.0, frames=True, audio=True):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (16, side, side, 3), np.uint8) if frames else None
    sound = rng.normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32) if audio else None
    return FaceClip("c0.mp4", sound, pictures, (np.arange(16) + 0.5) / 16 * seconds, seconds)


def dataset_of(results, clip):
    "Reads the same clip for every name."
    names = results["clip"]
    corpus = SimpleNamespace(table=pd.DataFrame(dict(clip=names, path=[f"{name}.mp4" for name in names])))
    return SimpleNamespace(corpus=corpus, read=lambda path: clip)


# Which clips


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_every_clip_is_in_exactly_one_cell(n, seed):
    results = table(n, seed)
    cells = [clips_of_cell(results, true, answer) for true in EMOTIONS for answer in EMOTIONS]
    assert sorted(name for cell in cells for name in cell["clip"]) == sorted(results["clip"])
    for cell in cells: assert cell["confidence"].is_monotonic_decreasing


def test_the_hardest_have_the_highest_loss_and_mistakes_are_wrong():
    results = table(50)
    of_truth = [row[f"p_{EMOTIONS[row['label']]}"] for row in results.to_dict("records")]
    assert hardest_clips(results, 5).index.tolist() == np.argsort(of_truth)[:5].tolist()
    wrong = confident_mistakes(results, 50)
    assert set(wrong.index) == set(results.index[results.label != results.prediction])
    assert wrong["confidence"].is_monotonic_decreasing


def test_a_probability_of_zero_has_a_finite_loss():
    results = table(1).assign(label=0, p_calm=0.0, p_happy=1.0, p_sad=0.0)
    assert np.isfinite(describe_answers(results)["loss"]).all()


def test_an_unknown_emotion_is_told():
    with pytest.raises(MmferError, match="emotion 'bored' is unknown: choose one of calm, happy, sad"):
        clips_of_cell(table(3), "calm", "bored")


# See and hear them


@pytest.mark.parametrize("side, seconds, frames, audio", [
    (64, 1.0, True, True), (65, 3.3, True, True), (224, 2.0, True, True), (64, 1.5, True, False),
    (64, 1.5, False, True)])
def test_a_film_is_as_long_as_its_clip_and_no_wider_than_a_thumbnail(side, seconds, frames, audio):
    film = clip_film(make_clip(side, seconds, frames, audio))
    with av.open(io.BytesIO(film)) as box:
        pictures = [frame.to_ndarray(format="rgb24") for frame in box.decode(video=0)]
        assert len(pictures) == (16 if frames else 1) and pictures[0].shape[0] <= 128
        assert (np.max(pictures) > 100) == frames
    with av.open(io.BytesIO(film)) as box:
        assert box.duration / av.time_base == pytest.approx(seconds, abs=0.1)
        sound = np.concatenate([frame.to_ndarray()[0] for frame in box.decode(audio=0)])
        assert (np.abs(sound).max() > 0.05) == audio


def test_the_table_plays_each_clip_and_lets_nobody_write_html():
    results = describe_answers(table(3)).assign(speaker="<script>")
    shown = play_clips(results, dataset_of(results, make_clip())).data
    assert shown.count("<video") == shown.count("data:video/mp4;base64,") == shown.count("<img") == 3
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_a_clip_that_the_dataset_lacks_is_told():
    results = describe_answers(table(3))
    lacking = dataset_of(results[:2], make_clip())
    for show in (play_clips, plot_clips):
        with pytest.raises(MmferError, match="clip c2 is not in the dataset: pass the dataset"):
            show(results, lacking)


@pytest.mark.parametrize("lacks", ["frames", "audio"])
def test_a_picture_of_clips_that_lack_a_modality(lacks):
    results = describe_answers(table(2))
    figure = plot_clips(results, dataset_of(results, make_clip(**{lacks: False})))
    titles = [ax.get_title() for ax in figure.axes[:2]]
    for title, row in zip(titles, results.to_dict("records")):
        assert row["true"] in title and row["answer"] in title


# The widget


def cells_of(browser):
    "The buttons of the matrix, by the words under the mouse."
    grid, _ = browser.children
    return {cell.tooltip: cell for cell in grid.children if hasattr(cell, "click")}


def test_a_click_shows_the_clips_of_that_cell():
    results = table(30)
    browser = browse_confusion(results, dataset_of(results, make_clip()), n=2)
    cells = cells_of(browser)
    assert len(cells) == 9
    for true in EMOTIONS:
        for answer in EMOTIONS:
            inside = clips_of_cell(results, true, answer)
            cell = cells[f"true {true}, answered {answer}"]
            assert cell.description == str(len(inside)) and cell.disabled == (len(inside) == 0)
            cell.click()
            shown = browser.children[1].value
            assert f"true {true}, answered {answer}" in shown
            assert shown.count("<video") == min(2, len(inside))
            for name in inside["clip"][:2]: assert f"{name}<br>" in shown


def test_it_opens_with_the_most_frequent_mistake():
    results = table(40)
    wrong = describe_answers(results)[lambda t: t.label != t.prediction]
    true, answer = wrong.groupby(["true", "answer"]).size().idxmax()
    shown = browse_confusion(results, dataset_of(results, make_clip())).children[1].value
    assert f"true {true}, answered {answer}" in shown


def test_without_a_mistake_it_opens_all_the_same():
    results = table(10).assign(label=lambda t: t.prediction)
    assert "<video" in browse_confusion(results, dataset_of(results, make_clip())).children[1].value


# The map


class Fused(nn.Module):
    "Hands its input on as fused features."
    def __init__(self, pooling, late=False):
        super().__init__()
        config = ClassifierConfig(in_dim=6, hidden=[4], n_emotions=3, pooling=pooling)
        self.classifier = None if late else Classifier(config)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, audio): return SimpleNamespace(fused_features=audio)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_fused_features_are_what_the_classifier_decides_by(pooling):
    model = Fused(pooling)
    if pooling == "attention": nn.init.normal_(model.classifier.pool.query)
    x = torch.randn(5, 8, 6)
    batches = [dict(audio=x[:3], clip=["a", "b", "c"]), dict(audio=x[3:], clip=["d", "e"])]
    features = fused_features(model, batches, progress=False)
    assert features.index.tolist() == list("abcde")
    with torch.no_grad():
        logits = model.eval().classifier.mlp(torch.tensor(features.to_numpy()))
        torch.testing.assert_close(logits, model.classifier(x)[0])


def test_late_fusion_has_no_fused_features():
    with pytest.raises(MmferError, match="late fusion joins answers"):
        fused_features(Fused("mean", late=True), [])


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_neighbours_of_far_groups_share_the_group_and_nothing_else(groups, k, seed):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), 8)
    features = pd.DataFrame(rng.normal(size=(len(group), 4)) + 100 * group[:, None])
    facts = pd.DataFrame(dict(group=group, other=rng.permutation(group), all_the_same="x"))
    found = neighbour_shares(features, facts, k)
    pairs = facts["group"].to_numpy()[:, None] == facts["group"].to_numpy()
    chance = (pairs.sum() - len(group)) / (len(group) * (len(group) - 1))
    assert found.loc["group", "same"] == 1 and found.loc["all_the_same"].eq(1).all()
    assert found.loc["group", "chance"] == pytest.approx(chance)
    assert found.loc["other", "chance"] == pytest.approx(chance)


def test_neighbours_of_noise_are_chance():
    rng = np.random.default_rng(0)
    facts = pd.DataFrame(dict(speaker=rng.integers(0, 4, 600)))
    found = neighbour_shares(pd.DataFrame(rng.normal(size=(600, 3))), facts).loc["speaker"]
    assert found["same"] == pytest.approx(found["chance"], abs=0.04)


def test_facts_are_matched_by_name_not_by_place():
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), [f"c{i}" for i in range(20)])
    facts = pd.DataFrame(dict(speaker=np.arange(20) % 3), features.index)
    shuffled = facts.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(neighbour_shares(features, facts), neighbour_shares(features, shuffled))


def test_a_map_has_a_panel_per_fact_each_value_once_and_its_share_of_the_variance():
    rng = np.random.default_rng(0)
    features = pd.DataFrame(rng.normal(size=(40, 5)) * (9, 3, 1, 1, 1), [f"c{i}" for i in range(40)])
    facts = pd.DataFrame(dict(speaker=np.arange(40) % 20, gender=["m", "f"] * 20), features.index)
    axes = plot_feature_map(features, facts).axes
    assert [ax.get_title() for ax in axes] == ["by speaker", "by gender"]
    for ax, column in zip(axes, facts):
        looks = {(str(c.get_facecolor()), str(c.get_paths()[0].vertices)) for c in ax.collections}
        assert len(ax.collections) == len(looks) == facts[column].nunique(), "each has a look of its own"
        assert sum(len(c.get_offsets()) for c in ax.collections) == 40
    shares = PCA(2).fit(features).explained_variance_ratio_
    assert f"{shares[0]:.0%}" in axes[0].get_xlabel() and f"{shares[1]:.0%}" in axes[0].get_ylabel()


def test_a_clip_without_facts_is_told():
    features = pd.DataFrame(np.eye(3), list("abc"))
    with pytest.raises(MmferError, match="clip c is not among the facts"):
        plot_feature_map(features, pd.DataFrame(dict(speaker=[1, 2]), list("ab")))
