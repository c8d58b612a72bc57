"""Losses by hand, missing modalities, and weights that take effect."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.testing import assert_close

from mmfer.core import MmferError
from mmfer.losses import MultimodalLoss, alignment_loss, class_weights

LN3 = math.log(3)
LOSS = {p: -math.log(p) for p in (1 / 4, 1 / 2, 3 / 4)}  # surprise of a truth that was given this probability


def answer(**changes):
    "Two clips, two classes: fused gives class 1 three quarters, audio one half, visual one quarter."
    logits = torch.tensor([[0., LN3], [0., LN3]])
    out = dict(logits=logits, audio_logits=0 * logits, visual_logits=-logits,
               audio_features=torch.eye(2)[:, None], visual_features=torch.eye(2)[:, None])
    return SimpleNamespace(**out | changes)


def value(x): return round(torch.as_tensor(x).item(), 5)


TRUTH = torch.tensor([1, 1])


def test_parts_and_total_by_hand():
    loss = MultimodalLoss(label_smoothing=0.0)(answer(), TRUTH)
    assert set(loss) == {"total", "fused", "audio", "visual"}
    for name, p in (("fused", 3 / 4), ("audio", 1 / 2), ("visual", 1 / 4)):
        assert value(loss[name]) == value(LOSS[p])
    assert value(loss["total"]) == value(LOSS[3 / 4] + 0.3 * LOSS[1 / 2] + 0.3 * LOSS[1 / 4])


def test_smoothing_by_hand():
    loss = MultimodalLoss(label_smoothing=0.2)(answer(), TRUTH)
    assert value(loss["fused"]) == value(0.9 * LOSS[3 / 4] + 0.1 * LOSS[1 / 4])


def test_class_weights_by_hand():
    loss_of = MultimodalLoss(label_smoothing=0.0, class_weights=torch.tensor([3., 1.]))
    loss = loss_of(answer(), torch.tensor([0, 1]))
    assert value(loss["fused"]) == value((3 * LOSS[1 / 4] + 1 * LOSS[3 / 4]) / 4)


def test_soft_labels_by_hand():
    soft = torch.tensor([[0.5, 0.5], [0., 1.]])
    loss = MultimodalLoss(label_smoothing=0.0)(answer(), soft)
    assert value(loss["fused"]) == value((0.5 * LOSS[1 / 4] + 0.5 * LOSS[3 / 4] + LOSS[3 / 4]) / 2)


def test_one_hot_labels_equal_whole_numbers():
    hard, soft = (MultimodalLoss()(answer(), y)["total"] for y in (TRUTH, torch.eye(2)[TRUTH]))
    assert_close(hard, soft)


@given(audio=st.floats(0.01, 5), visual=st.floats(0.01, 5), alignment=st.floats(0.01, 5))
def test_each_part_counts_with_its_weight(audio, visual, alignment):
    loss_of = MultimodalLoss(label_smoothing=0.0, audio=audio, visual=visual, alignment=alignment)
    loss = loss_of(answer(), TRUTH)
    parts = audio * LOSS[1 / 2] + visual * LOSS[1 / 4] + alignment * math.log(1 + math.exp(-1 / 0.07))
    assert loss["total"].item() == pytest.approx(LOSS[3 / 4] + parts, rel=1e-5)


def test_a_weight_of_zero_leaves_the_part_out():
    loss = MultimodalLoss(label_smoothing=0.0, audio=2.0, visual=0.0)(answer(), TRUTH)
    assert set(loss) == {"total", "fused", "audio"}
    assert value(loss["total"]) == value(LOSS[3 / 4] + 2 * LOSS[1 / 2])


def test_every_head_has_a_gradient_by_default():
    names = ("logits", "audio_logits", "visual_logits")
    logits = {name: torch.zeros(2, 2, requires_grad=True) for name in names}
    MultimodalLoss()(answer(**logits), TRUTH)["total"].backward()
    fused, audio, visual = (x.grad.abs().sum().item() for x in logits.values())
    assert (audio, visual) == pytest.approx((0.3 * fused, 0.3 * fused))


def test_smoothing_and_class_weights_hold_for_the_heads_of_the_branches():
    weights = torch.tensor([3., 1.])
    loss = MultimodalLoss(label_smoothing=0.2, class_weights=weights)(answer(), torch.tensor([0, 1]))
    for name, p in (("audio", 1 / 2), ("visual", 3 / 4)):  # the probability of class 0
        logits = torch.tensor([[math.log(p), math.log(1 - p)]] * 2)
        target = torch.tensor([0, 1])
        wanted = torch.nn.functional.cross_entropy(logits, target, weight=weights, label_smoothing=0.2)
        assert_close(loss[name], wanted)


@pytest.mark.parametrize("gone", [{"audio_logits": None}, {"audio_features": None},
                                  {"audio_present": torch.tensor([False, False])}])
def test_an_absent_modality_is_left_out(gone):
    loss = MultimodalLoss(label_smoothing=0.0)(answer(**gone), TRUTH)
    assert set(loss) == {"total", "fused", "visual"}
    assert value(loss["total"]) == value(LOSS[3 / 4] + 0.3 * LOSS[1 / 4])


def test_a_clip_without_sound_does_not_count_in_the_audio_part():
    logits = torch.tensor([[0., LN3], [float("nan"), float("nan")]], requires_grad=True)
    one = answer(audio_logits=logits, audio_present=torch.tensor([True, False]))
    loss = MultimodalLoss(label_smoothing=0.0)(one, TRUTH)
    assert value(loss["audio"]) == value(LOSS[3 / 4])
    loss["total"].backward()
    assert logits.grad.isfinite().all() and (logits.grad[1] == 0).all()


# alignment

def test_alignment_of_two_clips_by_hand():
    a, v = torch.tensor([[1., 0.], [0., 2.]]), torch.tensor([[7., 0.], [0., 1.]])
    assert value(alignment_loss(a, v, 1 / LN3)) == value(LOSS[3 / 4])
    assert value(alignment_loss(a, v.flip(0), 1 / LN3)) == value(LOSS[1 / 4])
    assert value(alignment_loss(a, torch.ones(2, 2))) == value(math.log(2))


def test_alignment_is_symmetric():
    torch.manual_seed(0)
    a, v = torch.randn(5, 7), torch.randn(5, 7)
    assert_close(alignment_loss(a, v), alignment_loss(v, a))


def test_alignment_is_one_part_of_the_total():
    loss = MultimodalLoss(alignment=0.5)(answer(), TRUTH)
    without = MultimodalLoss()(answer(), TRUTH)
    assert value(loss["alignment"]) == value(math.log(1 + math.exp(-1 / 0.07)))
    assert value(loss["total"]) == value(without["total"] + 0.5 * loss["alignment"])


def test_alignment_compares_the_means_of_the_segments():
    torch.manual_seed(0)
    a, v = torch.randn(2, 2, 8, 3)
    loss = MultimodalLoss(alignment=0.5)(answer(audio_features=a, visual_features=v), TRUTH)
    assert_close(loss["alignment"], alignment_loss(a.mean(1), v.mean(1)))


def test_alignment_needs_two_clips_with_both_modalities():
    one = answer(visual_present=torch.tensor([True, False]))
    assert "alignment" not in MultimodalLoss(alignment=0.5)(one, TRUTH)
    assert "alignment" not in MultimodalLoss(alignment=0.5)(answer(visual_features=None), TRUTH)


def test_a_last_batch_of_one_clip_has_all_parts_but_alignment():
    logits = torch.tensor([[0., LN3]])
    features = torch.randn(1, 8, 3, requires_grad=True)
    one = answer(logits=logits, audio_logits=0 * logits, visual_logits=-logits,
                 audio_features=features, visual_features=features)
    loss = MultimodalLoss(label_smoothing=0.0, alignment=0.5)(one, torch.tensor([1]))
    assert set(loss) == {"total", "fused", "audio", "visual"}
    assert value(loss["total"]) == value(LOSS[3 / 4] + 0.3 * LOSS[1 / 2] + 0.3 * LOSS[1 / 4])
    alone = alignment_loss(features[:, 0], features[:, 1])
    alone.backward()
    assert alone.item() == 0 and (features.grad == 0).all()


def test_two_widths_are_an_error_or_are_projected():
    wide = answer(visual_features=torch.randn(2, 8, 3))
    with pytest.raises(MmferError, match="project both"): MultimodalLoss(alignment=0.1)(wide, TRUTH)
    criterion = MultimodalLoss(alignment=0.1, dims=(2, 3))
    criterion(wide, TRUTH)["total"].backward()
    assert [p.grad.abs().sum() > 0 for p in criterion.parameters()] == [True, True]


# class weights

labels_of = st.integers(1, 12).flatmap(
    lambda k: st.tuples(st.lists(st.integers(0, k - 1), min_size=1, max_size=50), st.just(k)))


@given(labels_of)
def test_every_class_that_is_there_counts_equally(drawn):
    labels, n_classes = drawn
    weights = class_weights(labels, n_classes)
    per_class = torch.zeros(n_classes).index_add(0, torch.tensor(labels), weights[labels])
    there = sorted(set(labels))
    assert weights.shape == (n_classes,)
    assert_close(per_class[there], torch.full((len(there),), len(labels) / len(there)))
    assert (weights[[k for k in range(n_classes) if k not in there]] == 1).all()


@given(labels_of, st.randoms(use_true_random=False))
def test_renaming_the_classes_renames_the_weights(drawn, random):
    labels, n_classes = drawn
    order = random.sample(range(n_classes), n_classes)
    renamed = class_weights([order[label] for label in labels], n_classes)
    assert_close(renamed[order], class_weights(labels, n_classes))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_class_weights_are_those_of_scikit_learn(kind):
    labels = [0, 2, 2, 2, 1, 1]
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(kind(labels), 3).tolist() == pytest.approx(wanted.tolist())


def test_a_batch_of_a_class_without_training_clips_has_a_loss():
    "As in a validation set: the sum of its weights must not be 0."
    loss_of = MultimodalLoss(label_smoothing=0.0, class_weights=class_weights([0, 0, 0], 2))
    assert value(loss_of(answer(), TRUTH)["total"]) == value(MultimodalLoss(0.0)(answer(), TRUTH)["total"])


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_a_label_that_is_no_class_is_refused(labels):
    with pytest.raises(MmferError, match="do not fit 3 classes"): class_weights(labels, 3)
