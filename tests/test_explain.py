"""What would make a picture of attention lie: padding, wrong places, wrong covers, a model left in the wrong mode."""
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmfer import explain as ex
from mmfer.core import MmferError, seed_everything, segment_mask
from mmfer.media import Clip
from mmfer.model import MultimodalFER


few = settings(max_examples=50, deadline=None)


def make_clip(seconds=2.0, frames=16, seed=0):
    rng = np.random.default_rng(seed)
    audio = rng.normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
    pictures = rng.integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
    return Clip(Path("made-up.mp4"), audio, pictures, (np.arange(frames) + 0.5) / frames * seconds, seconds)


class Planted(nn.Module):
    "Decides by the loudness of one window only; reports attention on another segment if told to lie."
    def __init__(self, window=(0.5, 0.75), reported=2):
        super().__init__()
        self.weight, self.window, self.reported = nn.Parameter(torch.ones(1)), window, reported

    def forward(self, audio, audio_lengths, **others):
        a, b = (round(w * 16_000) for w in self.window)
        logits = torch.zeros(1, 8)
        logits[:, 4] = 5 * audio[:, a:b].abs().mean() * self.weight
        temporal = torch.zeros(1, 8).index_fill(1, torch.tensor([self.reported]), 1.0)
        within = segment_mask(torch.tensor([40]), 44).float()
        return SimpleNamespace(logits=logits, temporal_attention=temporal, audio_attention=within / within.sum(-1, keepdim=True),
                               visual_scores=None, visual_kept=None, fusion_attention=None)


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    return MultimodalFER.from_preset("tiny")


@few
@given(st.integers(1, 50), st.floats(0.5, 6), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_overlaps_add_up_to_the_window(n, length, ends):
    start, end = sorted(e * length for e in ends)
    inside = ex.overlap(n, length, start, end)
    assert inside.sum() * length / n == pytest.approx(end - start, abs=1e-9) and inside.min() >= 0 and inside.max() <= 1 + 1e-9


@few
@given(st.integers(1, 60))
def test_even_shares_are_a_distribution_in_each_segment(n):
    assert ex.even_shares(n, 8).sum(1) == pytest.approx(np.ones(8))


@few
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda w: abs(w[0] - w[1]) > 0.01))
def test_a_model_without_preference_hits_by_chance(window):
    start, end = sorted(window)
    e = ex.Explanation(2.0, np.full(8, 1 / 8), np.full(8, 1 / 8), ex.even_shares(25, 8).mean(0), ex.even_shares(16, 8).mean(0), np.full((16, 8, 8), 1 / 64))
    hits = ex.cue_hit(e, dict(start=2 * start, end=2 * end, box=[start, 0.1, end, 0.6]))
    for h in hits.values(): assert h["inside"] == pytest.approx(h["chance"])
    assert hits["patches"]["chance"] == pytest.approx((end - start) * 0.5)


def test_a_model_that_looks_at_the_cue_hits_fully():
    patches = np.zeros((16, 8, 8))
    patches[:, 2:4, 4:6] = 0.25
    frames = np.eye(16)[5]
    e = ex.Explanation(2.0, np.full(8, 1 / 8), np.eye(8)[2], None, frames, patches)
    hits = ex.cue_hit(e, dict(start=0.5, end=0.75, box=[0.5, 0.25, 0.75, 0.5]))  # x 4 to 5, y 2 to 3
    assert [hits[k]["inside"] for k in ("segments", "frames", "patches")] == pytest.approx([1, 1, 1])
    assert hits["patches"]["chance"] == pytest.approx(1 / 16) and "sound" not in hits


@pytest.mark.parametrize("seconds, frames", [(2.0, 16), (1.37, 12), (0.3, 5)])
def test_maps_are_distributions(model, seconds, frames):
    e = ex.explain(model, make_clip(seconds, frames))
    assert e.segments.sum() == pytest.approx(1, abs=1e-4) and e.sound.sum() == pytest.approx(1, abs=1e-4)
    assert e.frames.sum() == pytest.approx(1, abs=1e-4) and len(e.frames) == frames
    assert e.patches.sum((1, 2)) == pytest.approx(np.ones(frames), abs=1e-4)
    assert ((e.patches > 0).sum((1, 2)) == model.config.visual.top_k).all()
    assert e.sound[-1] > 0 and e.fusion.sum(1) == pytest.approx(np.ones(16), abs=1e-3)


def test_patch_weight_stands_at_the_place_of_the_patch():
    scores = torch.zeros(1, 1, 16)
    scores[0, 0, 6] = 5.0  # row 1, column 2 of 4 x 4
    out = SimpleNamespace(visual_scores=scores, visual_kept=torch.tensor([[[6, 9]]]))
    weight = ex._patch_weight(out)[0]
    assert np.unravel_index(weight.argmax(), weight.shape) == (1, 2) and weight[2, 1] == pytest.approx(0.5 / (0.5 + 1 / (1 + np.exp(-5))), rel=1e-4)


def test_padded_sound_frames_are_cut_off():
    assert len(ex.explain(Planted(), make_clip()).sound) == 40


def test_occlusion_finds_the_window_that_decides_whatever_attention_says():
    clip = make_clip()
    clip.audio[8_000:12_000] *= 8
    for reported in (2, 6):  # the decisive segment is 2; segment 6 is a lie
        e, o = ex.explain(Planted(reported=reported), clip), ex.occlude(Planted(reported=reported), clip, share=1 / 8, progress=False)
        assert e.segments.argmax() == reported and e.emotion == "angry"
        assert o["sound"].argmax() == 2 and o["sound"].max() > 0.5
        assert o["sound"].drop(2).abs().max() < 1e-5 and o["pictures"].abs().max() == 0
        assert (ex.agreement(e, o)["sound"] > 0.5) == (reported == 2)


def test_covers_touch_only_their_window():
    clip = make_clip()
    sound, pictures = ex.mask_sound(clip, 0.5, 1.0), ex.mask_pictures(clip, 0.5, 1.0)
    outside = np.r_[0:8_000, 16_000:32_000]
    assert np.array_equal(sound.audio[outside], clip.audio[outside]) and sound.audio.dtype == np.float32
    assert not np.isclose(sound.audio[8_000:16_000], clip.audio[8_000:16_000]).all()
    assert sound.audio[8_000:16_000].std() == pytest.approx(clip.audio.std(), rel=0.1)  # as loud as the clip, never silence
    changed = (pictures.frames != clip.frames).any((1, 2, 3))
    assert changed.tolist() == [4 <= t < 8 for t in range(16)]
    assert np.array_equal(pictures.audio, clip.audio) and np.array_equal(sound.frames, clip.frames)


def test_covering_every_picture_is_refused():
    with pytest.raises(MmferError, match="outside"): ex.mask_pictures(make_clip(), 0, 2.0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(model, training):
    model.train(training)
    first, second = ex.explain(model, make_clip()), ex.explain(model, make_clip())
    assert model.training == training and np.array_equal(first.probabilities, second.probabilities)


def test_mode_is_put_back_after_an_error(model):
    model.train()
    with pytest.raises(MmferError): ex.explain(model, Clip(Path("wrong.mp4"), None, np.zeros((4, 32, 32, 3), np.uint8), np.arange(4.0), 4.0))
    assert model.training


@pytest.mark.parametrize("missing", ["audio", "frames"])
def test_a_missing_modality_is_left_out(model, missing):
    clip = make_clip()
    setattr(clip, missing, None)
    e, o = ex.explain(model, clip), ex.occlude(model, clip, windows=3, progress=False)
    gone = "sound" if missing == "audio" else "pictures"
    assert (e.sound is None) == (missing == "audio") and (e.patches is None) == (missing == "frames")
    assert gone not in o and "both" not in o and len(o) == 3
    assert gone not in ex.agreement(e, o)
    assert ex.plot_explanation(e, clip).get_suptitle().startswith("made-up.mp4")
    assert len(ex.plot_occlusion(o).axes) == 1


def test_late_fusion_says_what_to_use():
    late = MultimodalFER.from_preset("tiny", "late")
    with pytest.raises(MmferError, match="occlude"): ex.explain(late, make_clip())
    assert np.isfinite(ex.occlude(late, make_clip(), windows=2, progress=False).to_numpy()).all()


def test_outline_of_one_patch_is_its_four_sides():
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    corners = {p for line in ex._outline(mask, 0, 4) for p in line}
    assert len(ex._outline(mask, 0, 4)) == 4 and corners == {(2, 0.75), (3, 0.75), (2, 0.5), (3, 0.5)}


def test_pictures_leave_no_open_figure(model):
    before = plt.get_fignums()
    ex.plot_explanation(ex.explain(model, make_clip()), make_clip(), dict(start=0.5, end=1.0, box=[0.2, 0.2, 0.8, 0.8]))
    assert plt.get_fignums() == before
