"""Losses by hand, missing modalities, and mixing that keeps lengths and shares."""
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmfer.core import MmferError
from mmfer.losses import MultimodalLoss, alignment_loss, class_weights, cutmix, draw_mix, mixup, soften

LN3 = math.log(3)
LOSS = {p: -math.log(p) for p in (1 / 4, 1 / 2, 3 / 4)}  # surprise of a truth that was given this probability


def say(**changes):
    "Two clips, two classes: fused gives class 1 three quarters, audio one half, visual one quarter."
    votes = torch.tensor([[0., LN3], [0., LN3]])
    out = dict(logits=votes, audio_logits=0 * votes, visual_logits=-votes,
               audio_features=torch.eye(2)[:, None], visual_features=torch.eye(2)[:, None])
    return SimpleNamespace(**out | changes)


def value(x): return round(torch.as_tensor(x).item(), 5)


TRUTH = torch.tensor([1, 1])


def test_parts_and_total_by_hand():
    loss = MultimodalLoss(label_smoothing=0.0)(say(), TRUTH)
    assert set(loss) == {"total", "fused", "audio", "visual"}
    assert [value(loss[k]) for k in ("fused", "audio", "visual")] == [value(LOSS[p]) for p in (3 / 4, 1 / 2, 1 / 4)]
    assert value(loss["total"]) == value(LOSS[3 / 4] + 0.3 * LOSS[1 / 2] + 0.3 * LOSS[1 / 4])


def test_smoothing_by_hand():
    loss = MultimodalLoss(label_smoothing=0.2)(say(), TRUTH)
    assert value(loss["fused"]) == value(0.9 * LOSS[3 / 4] + 0.1 * LOSS[1 / 4])


def test_class_weights_by_hand():
    loss = MultimodalLoss(label_smoothing=0.0, class_weights=torch.tensor([3., 1.]))(say(), torch.tensor([0, 1]))
    assert value(loss["fused"]) == value((3 * LOSS[1 / 4] + 1 * LOSS[3 / 4]) / 4)


def test_soft_labels_by_hand():
    soft = torch.tensor([[0.5, 0.5], [0., 1.]])
    loss = MultimodalLoss(label_smoothing=0.0)(say(), soft)
    assert value(loss["fused"]) == value((0.5 * LOSS[1 / 4] + 0.5 * LOSS[3 / 4] + LOSS[3 / 4]) / 2)


def test_one_hot_labels_equal_whole_numbers():
    hard, soft = (MultimodalLoss()(say(), y)["total"] for y in (TRUTH, torch.eye(2)[TRUTH]))
    assert_close(hard, soft)


def test_shares_weigh_the_parts():
    loss = MultimodalLoss(label_smoothing=0.0, audio=2.0, visual=0.0)(say(), TRUTH)
    assert value(loss["total"]) == value(LOSS[3 / 4] + 2 * LOSS[1 / 2])
    assert "visual" not in loss


@pytest.mark.parametrize("gone", [{"audio_logits": None}, {"audio_features": None},
                                  {"audio_present": torch.tensor([False, False])}])
def test_an_absent_modality_is_left_out(gone):
    loss = MultimodalLoss(label_smoothing=0.0)(say(**gone), TRUTH)
    assert set(loss) == {"total", "fused", "visual"}
    assert value(loss["total"]) == value(LOSS[3 / 4] + 0.3 * LOSS[1 / 4])


def test_a_clip_without_sound_does_not_count_in_the_audio_part():
    votes = torch.tensor([[0., LN3], [float("nan"), float("nan")]], requires_grad=True)
    loss = MultimodalLoss(label_smoothing=0.0)(say(audio_logits=votes, audio_present=torch.tensor([True, False])), TRUTH)
    assert value(loss["audio"]) == value(LOSS[3 / 4])
    loss["total"].backward()
    assert votes.grad.isfinite().all() and (votes.grad[1] == 0).all()


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
    loss = MultimodalLoss(alignment=0.5)(say(), TRUTH)
    without = MultimodalLoss()(say(), TRUTH)
    assert value(loss["alignment"]) == value(math.log(1 + math.exp(-1 / 0.07)))
    assert value(loss["total"]) == value(without["total"] + 0.5 * loss["alignment"])


def test_alignment_needs_two_clips_with_both_modalities():
    one = say(visual_present=torch.tensor([True, False]))
    assert "alignment" not in MultimodalLoss(alignment=0.5)(one, TRUTH)
    assert "alignment" not in MultimodalLoss(alignment=0.5)(say(visual_features=None), TRUTH)


def test_two_widths_are_an_error_or_are_projected():
    wide = say(visual_features=torch.randn(2, 8, 3))
    with pytest.raises(MmferError, match="project both"): MultimodalLoss(alignment=0.1)(wide, TRUTH)
    criterion = MultimodalLoss(alignment=0.1, dims=(2, 3))
    criterion(wide, TRUTH)["total"].backward()
    assert [p.grad.abs().sum() > 0 for p in criterion.parameters()] == [True, True]


# class weights

@given(st.lists(st.integers(0, 7), min_size=1))
def test_every_class_that_is_there_has_the_same_say(labels):
    weights = class_weights(labels)
    say = torch.zeros(8).index_add(0, torch.tensor(labels), weights[labels])
    there = sorted(set(labels))
    assert_close(say[there], torch.full((len(there),), len(labels) / len(there)))
    assert (weights[[k for k in range(8) if k not in there]] == 0).all()


# mixing

def batch(audio=(6, 4, 0), video=(2, 0, 2), garbage=0.0):
    torch.manual_seed(0)
    sound = torch.stack([torch.cat([torch.rand(n), torch.full((6 - n,), garbage)]) for n in audio])
    pictures = torch.randint(256, (len(video), 2, 3, 16, 16), dtype=torch.uint8)
    return dict(audio=sound, audio_lengths=torch.tensor(audio), video=pictures, video_lengths=torch.tensor(video), clip=["a", "b", "c"])


def real(mixed): return [row[:n] for row, n in zip(mixed["audio"], mixed["audio_lengths"])]


LABELS = torch.tensor([0, 3, 3])


@pytest.mark.parametrize("mix", (mixup, cutmix))
@settings(deadline=None)
@given(seed=st.integers(0, 9999), alpha=st.sampled_from((0.2, 1.0, 5.0)))
def test_mixing_keeps_shares_lengths_and_types(mix, seed, alpha):
    draw = lambda: torch.Generator().manual_seed(seed)
    before = batch()
    mixed, soft = mix(before, LABELS, alpha, draw())
    partner = draw_mix(3, alpha, draw())[1]
    assert_close(soft.sum(1), torch.ones(3))
    assert (soft >= 0).all() and (soft[:, [1, 2, 4, 5, 6, 7]] == 0).all()
    for key in ("audio_lengths", "video_lengths"):
        for i, j in enumerate(partner): assert mixed[key][i] == (before[key][i] if before[key][j] else 0)
    assert mixed["video"].dtype == torch.uint8 and before["video"].equal(batch()["video"])
    assert mixed["clip"] == before["clip"]


@pytest.mark.parametrize("mix", (mixup, cutmix))
def test_garbage_behind_the_length_changes_nothing(mix):
    for seed in range(5):
        clean, dirty = (mix(batch(garbage=g), LABELS, 1.0, torch.Generator().manual_seed(seed))[0] for g in (0.0, 1e9))
        for a, b in zip(real(clean), real(dirty)): assert torch.equal(a, b)


@pytest.mark.parametrize("mix", (mixup, cutmix))
def test_the_same_generator_mixes_the_same_way(mix):
    runs = [mix(batch(), LABELS, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert runs[0][1].equal(runs[1][1]) and runs[0][0]["video"].equal(runs[1][0]["video"])
    assert not runs[0][1].equal(runs[2][1])


def test_the_label_tells_the_area_that_was_pasted():
    plain = dict(audio=None, video=torch.stack([torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)]), video_lengths=torch.tensor([2, 2]))
    for seed in range(20):
        mixed, soft = cutmix(plain, torch.tensor([0, 1]), 1.0, torch.Generator().manual_seed(seed))
        assert_close(soft[:, 1], mixed["video"].mean((1, 2, 3, 4)))
        assert torch.equal(mixed["video"][:, 0], mixed["video"][:, 1])  # the same box in every picture


def test_soft_labels_can_be_mixed_again():
    _, once = mixup(batch(), LABELS, 1.0, torch.Generator().manual_seed(1))
    _, twice = mixup(batch(), once, 1.0, torch.Generator().manual_seed(1))
    assert_close(twice.sum(1), torch.ones(3))
    assert torch.equal(soften(once), once)


def test_cutmix_needs_pictures():
    with pytest.raises(MmferError, match="use mixup"): cutmix(batch() | {"video": None}, LABELS)
    mixed, _ = mixup(batch() | {"video": None}, LABELS)
    assert mixed["video"] is None
