"""What would interrupt an evaluation: invariances of the metrics, and faults in what they are given."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn import metrics
from torch import nn
from torch.utils.data import DataLoader

from mmfer import evaluate as ev
from mmfer.cache import use_cache
from mmfer.core import MmferError
from mmfer.corpus import Corpus
from mmfer.model import MultimodalFER
from mmfer.processor import collate

EMOTIONS = ("joy", "rage", "calm", "grief", "awe")
K = len(EMOTIONS)
few = settings(max_examples=25, deadline=None)  # scikit-learn is slow on tiny inputs


@st.composite
def answers(draw):
    "Labels, predictions and speakers of a test with any number of emotions."
    k = draw(st.integers(2, 9))
    rows = draw(st.lists(st.tuples(*[st.integers(0, k - 1)] * 2, st.integers(1, 5)), min_size=1, max_size=60))
    labels, predictions, speakers = map(np.array, zip(*rows))
    return labels, predictions, speakers, [f"emotion {i}" for i in range(k)]


def random_results(n=160, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n)
    p = rng.dirichlet(np.ones(K), n) * 0.8 + 0.2 * np.eye(K)[labels]
    facts = dict(clip=[f"c{i:03d}" for i in range(n)], label=labels, prediction=p.argmax(1))
    results = pd.DataFrame(facts).join(pd.DataFrame(p, columns=[f"p_{e}" for e in EMOTIONS]))
    gender = np.where(np.arange(n) % 2, "female", "male")
    speaker = [f"s{i}" for i in np.arange(n) % 4 + 1]
    return results.assign(speaker=speaker, gender=gender, intensity=rng.integers(1, 3, n), take=np.arange(n))


def near(s): return {k: pytest.approx(v) if isinstance(v, float) else v for k, v in s.items()}


# scores

@few
@given(answers(), st.randoms(use_true_random=False))
def test_the_order_of_the_clips_does_not_matter(test, random):
    labels, predictions, speakers, emotions = test
    order = random.sample(range(len(labels)), len(labels))
    before = ev.score(labels, predictions, emotions, speakers=speakers)
    after = ev.score(labels[order], predictions[order], emotions, speakers=speakers[order])
    assert near(before) == after


@few
@given(answers(), st.randoms(use_true_random=False))
def test_renumbering_the_emotions_permutes_the_matrix_and_keeps_the_averages(test, random):
    labels, predictions, _, emotions = test
    order = random.sample(range(len(emotions)), len(emotions))  # emotion i gets the number order[i]
    renamed = [emotions[order.index(i)] for i in range(len(emotions))]
    before = ev.score(labels, predictions, emotions)
    after = ev.score(np.array(order)[labels], np.array(order)[predictions], renamed)
    for average in ("war", "uar", "f1_macro", "f1_weighted"):
        assert after[average] == pytest.approx(before[average])
    matrix = np.array(after["confusion_matrix"])
    assert np.array_equal(matrix[np.ix_(order, order)], before["confusion_matrix"])
    assert after["per_class"] == before["per_class"]
    assert set(after["absent_classes"]) == set(before["absent_classes"])


@few
@given(answers())
def test_matrix_metrics_are_the_scores(test):
    labels, predictions, speakers, emotions = test
    matrices = ev.speaker_matrices(labels, predictions, speakers, len(emotions))
    s = ev.score(labels, predictions, emotions)
    assert matrices.shape == (len(set(speakers)), len(emotions), len(emotions))
    assert s["confusion_matrix"] == matrices.sum(0).tolist()
    for metric, of_matrix in ev.BOOTSTRAPPED.items():
        assert of_matrix(matrices.sum(0)) == pytest.approx(s[metric])


@few
@given(answers())
def test_absent_classes_are_named_and_do_not_count(test):
    labels, predictions, _, emotions = test
    s = ev.score(labels, predictions, emotions)
    recalls = [v["recall"] for v in s["per_class"].values() if v["n"]]
    assert s["uar"] == pytest.approx(np.mean(recalls))
    assert s["absent_classes"] == [e for e in emotions if s["per_class"][e]["recall"] is None]
    assert {emotions[i] for i in labels}.isdisjoint(s["absent_classes"])


def test_each_emotion_has_its_own_row():
    "Three clips of joy, one right; one of grief, right; rage is answered and never true."
    s = ev.score([0, 0, 0, 3], [0, 1, 1, 3], EMOTIONS)
    assert s["per_class"]["joy"] == dict(precision=1.0, recall=pytest.approx(1 / 3), f1=0.5, n=3)
    assert s["per_class"]["grief"] == dict(precision=1.0, recall=1.0, f1=1.0, n=1)
    assert s["per_class"]["rage"] == dict(precision=None, recall=None, f1=None, n=0)
    assert s["absent_classes"] == ["rage", "calm", "awe"]
    assert s["war"] == 0.5 and s["uar"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("labels, predictions, says", [
    ([0, 1], [0], "match"), ([], [], "no clips"), ([1, 5], [1, 1], "0 to 4"), ([-1], [0], "0 to 4"),
    ([0.5], [0], "whole number"), ([[0]], [[0]], "match")])
def test_score_refuses(labels, predictions, says):
    with pytest.raises(MmferError, match=says): ev.score(labels, predictions, EMOTIONS)


def test_probabilities_of_another_model_are_refused():
    with pytest.raises(MmferError, match="2 probabilities don't fit 5"):
        ev.score([0, 1], [0, 1], EMOTIONS, np.full((2, 2), 0.5))


def test_majority_follows_the_training_part():
    assert ev.majority_baseline([2, 2, 4], [4, 4, 2, 1], EMOTIONS)["war"] == 0.25


# intervals

def test_an_interval_holds_its_level():
    "Of 100 001 evenly spread values, 95 % lie between 2.5 and 97.5, 90 % between 5 and 95."
    values = np.random.default_rng(0).permutation(np.linspace(0, 100, 100_001))
    assert ev.percentile_interval(values) == pytest.approx((2.5, 97.5))
    assert ev.percentile_interval(values, 0.9) == pytest.approx((5, 95))


@pytest.mark.parametrize("metric", ev.BOOTSTRAPPED)
def test_the_reported_interval_holds_95_percent_of_the_resampled_values(metric):
    r = random_results()
    s = ev.score_results(r)
    low, high = s["intervals"][metric]
    matrices = ev.speaker_matrices(r["label"], r["prediction"], np.arange(160), K)
    by_clip = ev.bootstrap_interval(matrices, metric)
    values = ev.BOOTSTRAPPED[metric](ev.resample_speakers(matrices))
    inside = (values >= by_clip[0]) & (values <= by_clip[1])
    assert inside.mean() == pytest.approx(0.95, abs=0.02)  # a metric has few values on 160 clips
    by_speaker = ev.speaker_matrices(r["label"], r["prediction"], r["speaker"], K)
    assert (low, high) == ev.bootstrap_interval(by_speaker, metric)
    assert low < s[metric] < high


def test_the_interval_is_that_of_the_normal_distribution():
    "A thousand speakers with one clip each, 70 % right: the standard error is known."
    matrices = ev.speaker_matrices([0] * 1000, [0] * 700 + [1] * 300, np.arange(1000), 2)
    error = np.sqrt(0.7 * 0.3 / 1000)
    wanted = (0.7 - 1.96 * error, 0.7 + 1.96 * error)
    assert ev.bootstrap_interval(matrices, "war") == pytest.approx(wanted, abs=0.003)


@given(st.integers(2, 6), st.integers(2, 5), st.integers(0, 99))
def test_resampled_speakers_are_whole(n, k, seed):
    "Each speaker has another power of 11 as number of clips: the sum tells who was drawn how often."
    matrices = np.zeros((n, k, k), int)
    matrices[:, 0, 0] = 11 ** np.arange(n)
    for total in ev.resample_speakers(matrices, 20, seed)[:, 0, 0]:
        times = [total // 11**i % 11 for i in range(n)]
        assert sum(times) == n


def test_several_trainings_are_resampled_with_the_same_speakers():
    r = random_results()
    one = ev.speaker_matrices(r["label"], r["prediction"], r["speaker"], K)
    both = ev.resample_speakers(np.stack([one, 2 * one]), draws=50)
    assert both.shape == (50, 2, K, K)
    assert np.array_equal(both[:, 0], ev.resample_speakers(one, draws=50))
    assert np.array_equal(both[:, 1], 2 * both[:, 0])


def test_copied_clips_do_not_narrow_the_interval_by_speaker():
    r = random_results()
    twice = pd.concat([r, r])

    def interval(results, speakers):
        matrices = ev.speaker_matrices(results["label"], results["prediction"], speakers, K)
        return ev.bootstrap_interval(matrices)

    assert interval(twice, twice["speaker"]) == pytest.approx(interval(r, r["speaker"]))
    assert np.ptp(interval(twice, np.arange(320))) < 0.85 * np.ptp(interval(r, np.arange(160)))


def test_one_speaker_has_no_interval():
    s = ev.score([0, 1], [0, 1], EMOTIONS, speakers=["05", "05"])
    assert s["intervals"] is None and s["test_speakers"] == ["05"]
    with pytest.raises(MmferError, match="two speakers"):
        ev.bootstrap_interval(ev.speaker_matrices([0, 1], [0, 1], ["05", "05"], K))


def test_one_speaker_per_clip_is_required():
    with pytest.raises(MmferError, match="length 1 don't fit 2 clips"):
        ev.speaker_matrices([0, 1], [0, 1], ["05"], K)


def test_an_unknown_metric_is_refused():
    with pytest.raises(MmferError, match="war, uar, f1_macro"):
        ev.bootstrap_interval(np.ones((2, 2, 2)), "auc")


def test_fold_table_has_the_folds_their_mean_and_the_interval_of_all_speakers():
    r = random_results()
    fold = r["speaker"].isin(["s1", "s3"]).astype(int)
    table = ev.fold_table(r.assign(fold=fold))
    uars = [ev.score(g["label"], g["prediction"], EMOTIONS)["uar"] for _, g in r.groupby(fold)]
    assert list(table.index) == ["0", "1", "mean ± sd", "95 % by speaker"]
    assert table["UAR"].iloc[2] == f"{np.mean(uars):.3f} ± {np.std(uars, ddof=1):.3f}"
    low, high = ev.score_results(r)["intervals"]["uar"]
    assert table["UAR"].iloc[3] == f"[{low:.3f}, {high:.3f}]"
    assert table["clips"].tolist() == ["80", "80", "", ""] and table["test speakers"].iloc[0] == "s2, s4"


# calibration

def test_ece_against_a_loop_and_in_any_order():
    r = random_results()
    p = ev.probabilities_of(r)
    confidence = p.max(1)
    correct = p.argmax(1) == r["label"]
    parts = np.array_split(np.argsort(confidence), 10)  # 160 clips, no ties: 16 per bin
    by_hand = sum(len(i) * abs(confidence[i].mean() - correct[i].mean()) for i in parts) / len(p)
    assert ev.ece(r["label"], p) == pytest.approx(by_hand)
    order = np.random.default_rng(1).permutation(len(p))
    assert ev.ece(r["label"].to_numpy()[order], p[order]) == pytest.approx(by_hand)


@few
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 999))
def test_bins_hold_equally_many_clips(bins, per_bin, seed):
    "However the confidences crowd together, as long as no two are the same."
    confidence = 1 - 0.5 * np.random.default_rng(seed).random(bins * per_bin) ** 4
    table = ev.reliability([0] * len(confidence), np.stack([confidence, 1 - confidence], 1), bins)
    assert abs(table["n"] - per_bin).max() <= 1 and table["n"].sum() == bins * per_bin


def test_clips_of_one_confidence_share_a_bin():
    p = np.full((20, K), 0.5 / (K - 1))
    p[:, 3] = 0.5
    labels = [3] * 10 + [0] * 10
    assert ev.ece(labels, p) == pytest.approx(0) and len(ev.reliability(labels, p)) == 1


def test_a_bin_counts_with_its_clips():
    "Fifteen clips of confidence 0.6, all right, and five of 0.9, all wrong: no cut can part equal clips."
    p = np.array([[0.6, 0.4]] * 15 + [[0.9, 0.1]] * 5)
    assert ev.ece([0] * 15 + [1] * 5, p) == pytest.approx((15 * 0.4 + 5 * 0.9) / 20)


@few
@given(st.floats(0.1, 10), st.integers(2, 9), st.integers(0, 1000))
def test_temperature_divides_the_logits(t, k, seed):
    logits = np.random.default_rng(seed).normal(size=(5, k))
    assert np.allclose(ev.apply_temperature(softmax(logits, -1), t), softmax(logits / t, -1))


@pytest.mark.parametrize("true_t", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(true_t):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(K), 20_000)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    assert ev.fit_temperature(labels, ev.apply_temperature(p, 1 / true_t)) == pytest.approx(true_t, rel=0.05)


@few
@given(st.floats(0.1, 10), st.integers(2, 9), st.integers(0, 1000))
def test_temperature_keeps_the_answer_and_the_sum(t, k, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), 20)
    scaled = ev.apply_temperature(p, t)
    assert np.allclose(scaled.sum(1), 1) and np.allclose(scaled[np.arange(20), p.argmax(1)], scaled.max(1))


def test_temperature_survives_a_probability_of_zero():
    p = np.eye(K)[[0, 1, 2]]
    assert np.isfinite(ev.apply_temperature(p, 2.0)).all() and np.isfinite(ev.fit_temperature([0, 1, 3], p))


@pytest.mark.parametrize("p", [
    np.ones((2, K)), np.full((3, K), 1 / K), np.ones((2, 1)), np.full((2, K), np.nan)])
def test_ece_refuses_what_is_no_distribution(p):
    with pytest.raises(MmferError, match="probabilities"): ev.ece([0, 1], p)


# tables

class Echo(nn.Module):
    "Logits from the first sound sample; remembers the mode it was called in."
    config = SimpleNamespace(emotions=EMOTIONS)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.modes = []

    def forward(self, audio, audio_lengths, **others):
        assert not torch.is_grad_enabled() and not others
        self.modes.append(self.training)
        answer = nn.functional.one_hot(audio[:, 0].long(), K)
        return SimpleNamespace(logits=answer * self.weight * audio[:, :1].exp())


def batch(values):
    values = torch.tensor(values)
    return dict(audio=values[:, None].float(), audio_lengths=torch.ones(len(values)), video=None,
                labels=values.long(), clip=[f"c{v:.0f}" for v in values.tolist()])


def test_predict_keeps_order_and_puts_the_mode_back():
    model = Echo().train()
    r = ev.predict(model, [batch([3., 1.]), batch([4.])], progress=False)
    assert r["prediction"].tolist() == r["label"].tolist() == [3, 1, 4]
    assert model.training and model.modes == [False, False]


def test_the_columns_are_the_models_emotions_in_its_order():
    r = ev.predict(Echo(), [batch([0., 1., 2., 3., 4.])], progress=False)
    assert list(r.columns) == ["clip", "label", "prediction", *(f"p_{e}" for e in EMOTIONS)]
    assert ev.emotions_of(r) == EMOTIONS
    for i, emotion in enumerate(EMOTIONS): assert r[f"p_{emotion}"].iloc[1:].idxmax() == max(i, 1)
    assert np.array_equal(ev.probabilities_of(r)[:, 2], r["p_calm"])


def test_predict_names_the_clip_that_is_not_finite():
    model = Echo().train()
    model.weight.data.fill_(torch.nan)
    with pytest.raises(MmferError, match="c4"): ev.predict(model, [batch([4.])], progress=False)
    assert model.training


def test_cached_tokens_are_judged_without_the_tower(tmp_path):
    g = torch.Generator().manual_seed(0)
    def clip(i): return dict(clip=f"c{i}", label=i, audio=0.1 * torch.randn(8000, generator=g),
                             video=torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=g))
    clips = [clip(i) for i in range(5)]
    model = MultimodalFER.from_preset("tiny", EMOTIONS)
    model.visual.vision.requires_grad_(False)
    cached = use_cache(model.visual, clips, tmp_path, progress=False)
    on_pictures = ev.predict(model, DataLoader(clips, 2, collate_fn=collate), progress=False)
    model.visual.vision.register_forward_pre_hook(lambda *_: pytest.fail("the tower runs again"))
    on_tokens = ev.predict(model, DataLoader(cached, 2, collate_fn=collate), progress=False)
    pd.testing.assert_frame_equal(on_tokens, on_pictures, atol=1e-3)


def test_predict_asks_in_the_precision_that_is_wanted():
    class Dtype(Echo):
        def forward(self, audio, **others):
            self.dtype = (self.weight[None] @ self.weight[None].T).dtype
            return super().forward(audio, **others)
    model = Dtype()
    ev.predict(model, [batch([3.])], "cpu", "bf16", progress=False)
    assert model.dtype == torch.bfloat16
    ev.predict(model, [batch([3.])], "cpu", progress=False)
    assert model.dtype == torch.float32


@given(st.lists(st.text("abc_p", min_size=1), min_size=1, unique=True))
def test_any_names_of_emotions_are_read_back(emotions):
    table = pd.DataFrame([[0.0] * len(emotions)], columns=[f"p_{e}" for e in emotions])
    assert ev.emotions_of(table.assign(clip="x", speaker="y")) == tuple(emotions)


def corpus(speakers=("01", "02", "03"), name="mine"):
    rows = [dict(path=f"{s}.mp4", clip=f"clip-{s}", emotion="joy", speaker=s, mood="bad") for s in speakers]
    return Corpus(pd.DataFrame(rows), EMOTIONS, name)


def test_facts_are_joined_by_clip():
    "The speaker stays text; path, emotion and label of the table are no facts of a result."
    results = pd.DataFrame(dict(clip=["clip-02", "clip-01"], label=[0, 0], prediction=[0, 1]))
    joined = ev.add_facts(results, corpus().table)
    assert joined["speaker"].tolist() == ["02", "01"]
    assert list(joined.columns) == ["clip", "label", "prediction", "speaker", "mood"]


def test_add_facts_names_a_clip_that_the_table_lacks():
    r = random_results()
    with pytest.raises(MmferError, match="c159"): ev.add_facts(r[["clip", "label"]], r[r["clip"] != "c159"])


@pytest.mark.parametrize("column", ["prediction", "p_value"])
def test_a_fact_with_the_name_of_a_result_is_refused(column):
    r = random_results()[["clip", "label", "prediction", "p_joy"]]
    table = corpus().table.assign(clip="c000").iloc[:1].assign(**{column: 1})
    with pytest.raises(MmferError, match=f"column {column}"): ev.add_facts(r.iloc[:1], table)


# people whom the model has met

SPLIT = dict(corpus="mine", train=["01"], val=["02"])


def test_speakers_of_training_and_validation_are_taken_out():
    judged, unseen = ev.unseen_clips(corpus(), SPLIT)
    assert judged.speakers == ["03"] and unseen is True


def test_the_same_name_in_another_corpus_is_another_person():
    judged, unseen = ev.unseen_clips(corpus(name="another"), SPLIT)
    assert judged.speakers == ["01", "02", "03"] and unseen is True


def test_nobody_left_is_refused_unless_it_is_wanted():
    with pytest.raises(MmferError, match=r"01, 02.*--seen-ok"): ev.unseen_clips(corpus(("01", "02")), SPLIT)
    judged, unseen = ev.unseen_clips(corpus(("01", "02")), SPLIT, seen_ok=True)
    assert judged.speakers == ["01", "02"] and unseen is False


def test_all_clips_are_judged_when_asked_and_it_is_said():
    judged, unseen = ev.unseen_clips(corpus(), SPLIT, seen_ok=True)
    assert len(judged) == 3 and unseen is False
    assert ev.unseen_clips(corpus(("03",)), SPLIT, seen_ok=True)[1] is True


# reports

def test_report_is_json_and_says_what_score_says(tmp_path):
    r = random_results()
    report = ev.save_report(r, tmp_path / "new", validation=random_results(seed=1), train_labels=r["label"])
    text = (tmp_path / "new" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == report
    assert report["uar"] == pytest.approx(metrics.balanced_accuracy_score(r["label"], r["prediction"]))
    assert report["majority"]["uar"] == pytest.approx(1 / K)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "predictions.csv"), r)
    pictures = [(tmp_path / "new" / f).read_bytes()[:4] for f in ("confusion_matrix.png", "reliability.png")]
    assert pictures == [b"\x89PNG"] * 2


def test_a_report_groups_by_the_facts_that_the_corpus_has(tmp_path):
    "Two genders and two intensities; one room and 160 takes are no groups, and speakers are in the interval."
    report = ev.save_report(random_results().assign(room="a"), tmp_path)
    groups = {k: set(v) for k, v in report.items() if k.startswith("by_")}
    assert groups == dict(by_gender={"female", "male"}, by_intensity={"1", "2"})
    assert {p.name for p in tmp_path.glob("by_*.csv")} == {"by_gender.csv", "by_intensity.csv"}
    women = random_results().query("gender == 'female'")
    right = (women["label"] == women["prediction"]).mean()
    assert report["by_gender"]["female"]["war"] == pytest.approx(right)


def test_the_rows_of_a_report_carry_the_right_emotions(tmp_path):
    "Only joy is answered rightly, so only joy has a recall."
    r = random_results()
    r["prediction"] = np.where(r["label"] == 0, 0, (r["label"] % 4) + 1)
    ev.save_report(r, tmp_path)
    table = pd.read_csv(tmp_path / "per_class.csv", index_col="emotion")
    assert list(table.index) == list(EMOTIONS)
    assert table["recall"].tolist() == [1, 0, 0, 0, 0]
    assert table["n"].tolist() == np.bincount(r["label"]).tolist()


def test_report_of_one_speaker_has_no_interval_and_is_still_json(tmp_path):
    r = random_results().assign(speaker="05")
    ev.save_report(r, tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert report["intervals"] is None and report["by_gender"]["male"]["uar_low"] is None


@pytest.mark.parametrize("k", [2, 3, 12])
def test_the_picture_shows_every_cell_of_any_matrix(k):
    emotions = [f"e{i}" for i in range(k)]
    matrix = np.arange(k * k).reshape(k, k)
    matrix[0] = 0
    counts, percent = ev.plot_confusion(matrix, emotions, "title").axes
    assert [text.get_text() for text in counts.texts] == [str(v) for v in matrix.ravel()]
    assert [label.get_text() for label in counts.get_yticklabels()] == emotions
    assert [label.get_text() for label in counts.get_xticklabels()] == emotions
    assert counts.get_ylabel() == "true" and counts.get_xlabel() == "predicted"
    assert percent.get_yticklabels()[0].get_text() == "e0, absent"
    assert sum(float(text.get_text()) for text in percent.texts[k:2 * k]) == pytest.approx(100, abs=k)


def test_the_comparison_shows_values_intervals_and_chance():
    r = random_results()
    scores = dict(good=ev.score_results(r), lazy=ev.majority_baseline(r["label"], r["label"], EMOTIONS))
    ax, = ev.plot_comparison(scores, ceilings=dict(lazy=0.4)).axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([scores["good"]["uar"], 1 / K])
    low, high = scores["good"]["intervals"]["uar"]
    texts = [text.get_text() for text in ax.texts]
    assert texts == [f"{scores['good']['uar']:.3f}  [{low:.3f}, {high:.3f}]", "0.200"]
    assert "uniform guessing, 1/5" in [line.get_label() for line in ax.lines]


def test_the_reliability_picture_draws_every_model():
    r = random_results()
    p = ev.probabilities_of(r)
    ax, = ev.plot_reliability(r["label"], {f"T = {t}": ev.apply_temperature(p, t) for t in (1, 2, 3, 4)}).axes
    assert len(ax.get_legend().get_texts()) == 5
