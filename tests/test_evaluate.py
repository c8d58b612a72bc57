"""What would interrupt an evaluation: invariances of the metrics, and faults in what they are given."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn

from mmfer import evaluate as ev
from mmfer.core import EMOTIONS, MmferError

few = settings(max_examples=25, deadline=None)  # scikit-learn is slow on tiny inputs
answers = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 5)), min_size=1, max_size=60)


def random_results(n=160, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 8, n)
    p = rng.dirichlet(np.ones(8), n) * 0.8 + 0.2 * np.eye(8)[labels]
    facts = dict(clip=[f"c{i}" for i in range(n)], label=labels, prediction=p.argmax(1),
                 actor=np.arange(n) % 4 + 1, gender=np.where(np.arange(n) % 2, "female", "male"), intensity=rng.integers(1, 3, n))
    return pd.DataFrame(facts).join(pd.DataFrame(p, columns=ev.P_COLUMNS))


@few
@given(answers, st.randoms())
def test_the_order_of_the_clips_does_not_matter(rows, random):
    before = ev.score(*zip(*[r[:2] for r in rows]), actors=[r[2] for r in rows])
    random.shuffle(rows)
    after = ev.score(*zip(*[r[:2] for r in rows]), actors=[r[2] for r in rows])
    assert {k: pytest.approx(v) if isinstance(v, float) else v for k, v in before.items()} == after


@few
@given(answers)
def test_matrix_metrics_are_the_scores(rows):
    labels, predictions, actors = map(np.array, zip(*rows))
    total, s = ev.actor_matrices(labels, predictions, actors).sum(0), ev.score(labels, predictions)
    assert s["confusion_matrix"] == total.tolist()
    for metric, of_matrix in ev.BOOTSTRAPPED.items(): assert of_matrix(total) == pytest.approx(s[metric])


@few
@given(answers)
def test_absent_classes_are_named_and_do_not_count(rows):
    labels, predictions, _ = map(np.array, zip(*rows))
    s = ev.score(labels, predictions)
    recalls = [v["recall"] for v in s["per_class"].values() if v["n"]]
    assert s["uar"] == pytest.approx(np.mean(recalls))
    assert s["absent_classes"] == [e for e in EMOTIONS if s["per_class"][e]["recall"] is None]
    assert {EMOTIONS[i] for i in labels}.isdisjoint(s["absent_classes"])


def test_copied_clips_do_not_narrow_the_interval_by_actor():
    r = random_results()
    twice = pd.concat([r, r])
    args = lambda t: (t["label"], t["prediction"], t["actor"])
    assert ev.bootstrap_interval(*args(twice)) == pytest.approx(ev.bootstrap_interval(*args(r)))
    clips = lambda t: (t["label"], t["prediction"], np.arange(len(t)))
    assert np.ptp(ev.bootstrap_interval(*clips(twice))) < 0.85 * np.ptp(ev.bootstrap_interval(*clips(r)))  # a copy is not evidence


def test_interval_is_reproducible_and_holds_the_measured_value():
    r = random_results()
    low, high = ev.bootstrap_interval(r["label"], r["prediction"], r["actor"])
    assert (low, high) == ev.bootstrap_interval(r["label"], r["prediction"], r["actor"])
    assert low < ev.score(r["label"], r["prediction"])["uar"] < high


def test_one_actor_has_no_interval():
    s = ev.score([0, 1], [0, 1], actors=[5, 5])
    assert s["intervals"] is None and s["test_actors"] == [5]
    with pytest.raises(MmferError, match="two actors"): ev.bootstrap_interval([0, 1], [0, 1], [5, 5])


def test_fold_table_has_the_folds_their_mean_and_the_interval_of_all_actors():
    r = random_results()
    table = ev.fold_table(r.assign(fold=r["actor"] % 2))
    uars = [ev.score(g["label"], g["prediction"])["uar"] for _, g in r.groupby(r["actor"] % 2)]
    assert list(table.index) == ["0", "1", "mean ± sd", "95 % by actor"]
    assert table["UAR"].iloc[2] == f"{np.mean(uars):.3f} ± {np.std(uars, ddof=1):.3f}"
    low, high = ev.bootstrap_interval(r["label"], r["prediction"], r["actor"], "uar")
    assert table["UAR"].iloc[3] == f"[{low:.3f}, {high:.3f}]"
    assert table["clips"].iloc[:2].tolist() == [80, 80]


def test_ece_against_a_loop_and_in_any_order():
    r = random_results()
    p = r[ev.P_COLUMNS].to_numpy()
    confidence, correct = p.max(1), p.argmax(1) == r["label"]
    parts = np.array_split(np.argsort(confidence), 10)  # 160 clips, no ties: 16 a bin
    by_hand = sum(len(i) * abs(confidence[i].mean() - correct[i].mean()) for i in parts) / len(p)
    assert ev.ece(r["label"], p) == pytest.approx(by_hand)
    order = np.random.default_rng(1).permutation(len(p))
    assert ev.ece(r["label"].to_numpy()[order], p[order]) == pytest.approx(by_hand)


def test_clips_of_one_confidence_share_a_bin():
    p = np.full((20, 8), 0.5 / 7)
    p[:, 3] = 0.5
    labels = [3] * 10 + [0] * 10
    assert ev.ece(labels, p) == pytest.approx(0) and len(ev.reliability(labels, p)) == 1


@pytest.mark.parametrize("true_t", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(true_t):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(8), 20_000)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    assert ev.fit_temperature(labels, ev.apply_temperature(p, 1 / true_t)) == pytest.approx(true_t, rel=0.05)


@few
@given(st.floats(0.1, 10), st.integers(0, 1000))
def test_temperature_keeps_the_answer_and_the_sum(t, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(8, 0.3), 20)
    scaled = ev.apply_temperature(p, t)
    assert np.allclose(scaled.sum(1), 1) and np.allclose(scaled[np.arange(20), p.argmax(1)], scaled.max(1))


def test_temperature_survives_a_probability_of_zero():
    p = np.eye(8)[[0, 1, 2]]
    assert np.isfinite(ev.apply_temperature(p, 2.0)).all() and np.isfinite(ev.fit_temperature([0, 1, 3], p))


class Echo(nn.Module):
    "Logits from the first sound sample; remembers the mode it was called in."
    def __init__(self):
        super().__init__()
        self.weight, self.modes = nn.Parameter(torch.ones(1)), []

    def forward(self, audio, audio_lengths, **others):
        assert not torch.is_grad_enabled() and not others
        self.modes.append(self.training)
        return type("Out", (), dict(logits=torch.nn.functional.one_hot(audio[:, 0].long(), 8) * self.weight * audio[:, :1].exp()))


def batch(values):
    values = torch.tensor(values)
    return dict(audio=values[:, None].float(), audio_lengths=torch.ones(len(values)), video=None, labels=values.long(), clip=[f"c{v:.0f}" for v in values.tolist()])


def test_predict_keeps_order_and_puts_the_mode_back():
    model = Echo().train()
    r = ev.predict(model, [batch([3., 1.]), batch([7.])], progress=False)
    assert r["prediction"].tolist() == r["label"].tolist() == [3, 1, 7]
    assert model.training and model.modes == [False, False]


def test_predict_names_the_clip_that_is_not_finite():
    model = Echo().train()
    model.weight.data.fill_(torch.nan)
    with pytest.raises(MmferError, match="c5"): ev.predict(model, [batch([5.])], progress=False)
    assert model.training


def test_add_facts_names_a_clip_that_the_table_lacks():
    r = random_results()
    with pytest.raises(MmferError, match="c159"): ev.add_facts(r[["clip", "label"]], r[r["clip"] != "c159"])


@pytest.mark.parametrize("labels, predictions, says", [
    ([0, 1], [0], "match"), ([], [], "no clips"), ([1, 8], [1, 1], "0 to 7"), ([0.5], [0], "whole number"), ([[0]], [[0]], "match")])
def test_score_refuses(labels, predictions, says):
    with pytest.raises(MmferError, match=says): ev.score(labels, predictions)


@pytest.mark.parametrize("p", [np.ones((2, 8)), np.full((3, 8), 1 / 8), np.full((2, 7), 1 / 7), np.full((2, 8), np.nan)])
def test_ece_refuses_what_is_no_distribution(p):
    with pytest.raises(MmferError, match="probabilities"): ev.ece([0, 1], p)


def test_majority_follows_the_training_part():
    assert ev.majority_baseline([2, 2, 5], [5, 5, 2, 1])["war"] == 0.25


def test_report_is_json_and_says_what_score_says(tmp_path):
    r = random_results()
    report = ev.save_report(r, tmp_path / "new", validation=random_results(seed=1), train_labels=r["label"])
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text(), parse_constant=pytest.fail) == report
    assert report["uar"] == pytest.approx(metrics.balanced_accuracy_score(r["label"], r["prediction"]))
    assert set(report["by_gender"]) == {"female", "male"} and set(report["by_intensity"]) == {"1", "2"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "predictions.csv"), r)
    assert all((tmp_path / "new" / f).read_bytes()[:4] == b"\x89PNG" for f in ("confusion_matrix.png", "reliability.png"))


def test_report_of_one_actor_has_no_interval_and_is_still_json(tmp_path):
    r = random_results().assign(actor=5, gender="male")
    ev.save_report(r, tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert report["intervals"] is None and report["by_gender"]["male"]["uar_low"] is None
