"""What would make a picture of attention lie: padding, gates, places, covers, a wrong mode."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmfer import explain as ex
from mmfer.core import MmferError, seed_everything, segment_mask
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.faces import middle_square
from mmfer.media import Clip
from mmfer.model import MultimodalFER
from mmfer.processor import FaceClip, Processor

few = settings(max_examples=50, deadline=None)


processor = Processor(image_size=64, grid=8, crop_size=64, faces="none")


def make_clip(seconds=2.0, frames=16, seed=0):
    rng = np.random.default_rng(seed)
    audio = rng.normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
    pictures = rng.integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
    times = (np.arange(frames) + 0.5) / frames * seconds
    return FaceClip(Path("made-up.mp4"), audio, pictures, times, seconds, track=middle_square(pictures))


def even_explanation(patches, frames, sound=None, segments=np.full(8, 1 / 8)):
    return ex.Explanation(2.0, pd.Series(1 / 8, RAVDESS_EMOTIONS), segments, sound, frames, patches)


class Planted(nn.Module):
    "Decides by the loudness of one window only; reports attention on another segment if told to lie."
    def __init__(self, window=(0.5, 0.75), reported=2):
        super().__init__()
        self.config = SimpleNamespace(emotions=RAVDESS_EMOTIONS)
        self.weight = nn.Parameter(torch.ones(1))
        self.window = window
        self.reported = reported

    def forward(self, audio, audio_lengths, **others):
        a, b = (round(w * 16_000) for w in self.window)
        logits = torch.zeros(len(audio), 8)
        logits[:, 4] = 5 * audio[:, a:b].abs().mean(1) * self.weight
        temporal = torch.zeros(len(audio), 8).index_fill(1, torch.tensor([self.reported]), 1.0)
        within = segment_mask(torch.tensor([40] * len(audio)), 44).float()
        audio_attention = within / within.sum(-1, keepdim=True)
        return SimpleNamespace(logits=logits, temporal_attention=temporal, audio_attention=audio_attention,
                               visual_scores=None, visual_kept=None, fusion_attention=None)


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    return MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS)


@few
@given(st.integers(1, 50), st.floats(0.5, 6), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_shares_add_up_to_the_window(n, length, ends):
    start, end = sorted(e * length for e in ends)
    inside = ex.share_inside(n, length, start, end)
    assert inside.sum() * length / n == pytest.approx(end - start, abs=1e-9)
    assert inside.min() >= 0 and inside.max() <= 1 + 1e-9


@few
@given(st.integers(1, 60))
def test_even_shares_are_a_distribution_in_each_segment(n):
    assert ex.even_shares(n, 8).sum(1) == pytest.approx(np.ones(8))


@few
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda w: abs(w[0] - w[1]) > 0.01))
def test_a_model_without_preference_hits_by_chance(window):
    start, end = sorted(window)
    sound = ex.even_shares(25, 8).mean(0)
    frames = ex.even_shares(16, 8).mean(0)
    e = even_explanation(np.full((16, 8, 8), 1 / 64), frames, sound)
    hits = ex.cue_hit(e, dict(start=2 * start, end=2 * end, box=[start, 0.1, end, 0.6]))
    for h in hits.values(): assert h["inside"] == pytest.approx(h["chance"])
    assert hits["patches"]["chance"] == pytest.approx((end - start) * 0.5)


def test_a_model_that_looks_at_the_cue_hits_fully():
    patches = np.zeros((16, 8, 8))
    patches[:, 2:4, 4:6] = 0.25
    e = even_explanation(patches, frames=np.eye(16)[5], segments=np.eye(8)[2])
    hits = ex.cue_hit(e, dict(start=0.5, end=0.75, box=[0.5, 0.25, 0.75, 0.5]))  # x 4 to 5, y 2 to 3
    assert [hits[k]["inside"] for k in ("segments", "frames", "patches")] == pytest.approx([1, 1, 1])
    assert hits["patches"]["chance"] == pytest.approx(1 / 16) and "sound" not in hits


@pytest.mark.parametrize("seconds, frames", [(2.0, 16), (1.37, 12), (0.3, 5)])
def test_maps_are_distributions(model, seconds, frames):
    e = ex.explain(model, processor, make_clip(seconds, frames))
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
    assert np.unravel_index(weight.argmax(), weight.shape) == (1, 2)
    assert weight[2, 1] == pytest.approx(1 / (1 + np.exp(5)), rel=1e-4)


def gates_in_use(model, clip):
    "What `ROICompressor` really multiplied each kept patch with, from its input and output; their places."
    seen = {}
    def note(_, given, made): seen.update(tokens=given[0], made=made)
    hook = model.visual.roi.register_forward_hook(note)
    with torch.inference_mode(): model.eval()(**processor(clip))
    hook.remove()
    patches, _, kept = seen["made"]
    before = seen["tokens"].gather(1, kept[..., None].expand(-1, -1, seen["tokens"].shape[-1]))
    after = patches[:, :kept.shape[1]]
    return ((after * before).sum(-1) / before.square().sum(-1)).numpy(), kept.numpy()


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_the_gates_that_are_drawn_are_those_that_the_model_uses(spread):
    seed_everything(1)
    model = MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS)
    with torch.no_grad(): model.visual.roi.scorer[-1].weight.mul_(spread)
    clip = make_clip()
    gates, kept = gates_in_use(model, clip)
    drawn = ex.explain(model, processor, clip).patches.reshape(len(kept), -1)
    assert np.take_along_axis(drawn, kept, 1) * kept.shape[1] == pytest.approx(gates, abs=1e-3)
    if spread > 1: assert gates.max() > 3 and gates.min() < 0.1, "the test needs gates that differ"


def test_padded_sound_frames_are_cut_off():
    assert len(ex.explain(Planted(), processor, make_clip()).sound) == 40


def test_occlusion_finds_the_window_that_decides_whatever_attention_says():
    clip = make_clip()
    clip.audio[8_000:12_000] *= 8
    for reported in (2, 6):  # the decisive segment is 2; segment 6 is a lie
        e = ex.explain(Planted(reported=reported), processor, clip)
        o = ex.occlude(Planted(reported=reported), processor, clip, share=1 / 8, progress=False)
        assert e.segments.argmax() == reported and e.emotion == "angry"
        assert o["sound"].argmax() == 2 and o["sound"].max() > 0.5
        assert o["sound"].drop(2).abs().max() < 1e-5 and o["pictures"].abs().max() == 0
        assert (ex.agreement(e, o)["sound"] > 0.5) == (reported == 2)


def test_batches_of_windows_get_the_answers_of_single_windows(model, monkeypatch):
    together = ex.occlude(model, processor, make_clip(), progress=False)
    monkeypatch.setattr(ex, "_BATCH", 1)
    alone = ex.occlude(model, processor, make_clip(), progress=False)
    assert together.shape == (8, 5) and together["both"].abs().max() > 1e-4
    pd.testing.assert_frame_equal(together, alone, atol=1e-5)


def test_windows_are_asked_in_batches(model, monkeypatch):
    sizes = []
    note = model.register_forward_pre_hook(lambda _, args, inputs: sizes.append(len(inputs["audio"])),
                                           with_kwargs=True)
    ex.occlude(model, processor, make_clip(), progress=False)
    note.remove()
    assert sum(sizes) == 1 + 3 * 8 and len(sizes) <= 4


def test_the_face_of_a_clip_as_filmed_is_looked_for_once(model, monkeypatch):
    crop = make_clip()
    filmed = Clip(crop.path, crop.audio, crop.frames, crop.times, crop.duration)
    found = []
    track = Processor.crop

    def count(self, clip):
        found.append(isinstance(clip, FaceClip))
        return track(self, clip)
    monkeypatch.setattr(Processor, "crop", count)
    o = ex.occlude(model, processor, filmed, progress=False)
    assert found.count(False) == 1
    pd.testing.assert_frame_equal(o, ex.occlude(model, processor, crop, progress=False))


@pytest.mark.filterwarnings("error")
def test_agreement_is_nan_where_a_side_ranks_nothing():
    clip = make_clip()
    e = ex.explain(Planted(), processor, clip)
    o = ex.occlude(Planted(), processor, clip, share=1 / 8, progress=False)
    assert np.isnan(ex.agreement(e, o.assign(sound=0.25))["sound"])
    even = replace(e, sound=np.full(40, 1 / 40))
    assert np.isnan(ex.agreement(even, o)["sound"]) and not np.isnan(ex.agreement(e, o)["sound"])


def test_covers_touch_only_their_window():
    clip = make_clip()
    sound = ex.mask_sound(clip, 0.5, 1.0)
    pictures = ex.mask_pictures(clip, 0.5, 1.0)
    outside = np.r_[0:8_000, 16_000:32_000]
    assert np.array_equal(sound.audio[outside], clip.audio[outside]) and sound.audio.dtype == np.float32
    assert not np.isclose(sound.audio[8_000:16_000], clip.audio[8_000:16_000]).all()
    assert sound.audio[8_000:16_000].std() == pytest.approx(clip.audio.std(), rel=0.1)  # as loud as the clip
    changed = (pictures.frames != clip.frames).any((1, 2, 3))
    assert changed.tolist() == [4 <= t < 8 for t in range(16)]
    assert np.array_equal(pictures.audio, clip.audio) and np.array_equal(sound.frames, clip.frames)


def test_covering_every_picture_is_refused():
    with pytest.raises(MmferError, match="outside"): ex.mask_pictures(make_clip(), 0, 2.0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(model, training):
    model.train(training)
    first = ex.explain(model, processor, make_clip())
    second = ex.explain(model, processor, make_clip())
    assert model.training == training and first.probabilities.equals(second.probabilities)


def test_mode_is_put_back_after_an_error(model):
    model.train()
    with pytest.raises(MmferError): ex.explain(model, replace(processor, image_size=32), make_clip())
    assert model.training


@pytest.mark.parametrize("missing", ["audio", "frames"])
def test_a_missing_modality_is_left_out(model, missing):
    gone = dict(audio=None) if missing == "audio" else dict(frames=None, track=None)
    clip = replace(make_clip(), **gone)
    e = ex.explain(model, processor, clip)
    o = ex.occlude(model, processor, clip, windows=3, progress=False)
    gone = "sound" if missing == "audio" else "pictures"
    assert (e.sound is None) == (missing == "audio") and (e.patches is None) == (missing == "frames")
    assert gone not in o and "both" not in o and len(o) == 3
    assert gone not in ex.agreement(e, o)
    assert ex.plot_explanation(e, clip).get_suptitle().startswith("made-up: ")
    assert len(ex.plot_occlusion(o).axes) == 1


def test_late_fusion_says_what_to_use():
    late = MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS, "late")
    with pytest.raises(MmferError, match="occlude"): ex.explain(late, processor, make_clip())
    assert np.isfinite(ex.occlude(late, processor, make_clip(), windows=2, progress=False).to_numpy()).all()


def test_a_clip_as_filmed_goes_through_the_same_crop(model):
    crop = make_clip()
    wide = np.pad(crop.frames, ((0, 0), (0, 0), (20, 20), (0, 0)))  # the middle square is the crop
    filmed = Clip(crop.path, crop.audio, wide, crop.times, crop.duration)
    of_file = ex.explain(model, processor, filmed)
    of_crop = ex.explain(model, processor, crop)
    assert np.array_equal(of_file.patches, of_crop.patches)
    assert of_file.probabilities.equals(of_crop.probabilities)


def test_names_and_their_number_are_those_of_the_model():
    seed_everything(0)
    three = MultimodalFER.from_preset("tiny", ("shy", "bold", "bored"))
    e = ex.explain(three, processor, make_clip())
    assert list(e.probabilities.index) == ["shy", "bold", "bored"]
    with torch.inference_mode(): answer = three.eval()(**processor(make_clip())).logits.argmax()
    assert e.emotion == ("shy", "bold", "bored")[answer]
    assert f"the model says {e.emotion}" in ex.plot_explanation(e, make_clip()).get_suptitle()


def test_outline_of_one_patch_is_its_four_sides():
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    corners = {p for line in ex._outline(mask, 0, 4) for p in line}
    assert len(ex._outline(mask, 0, 4)) == 4 and corners == {(2, 0.75), (3, 0.75), (2, 0.5), (3, 0.5)}


def test_pictures_leave_no_open_figure(model):
    before = plt.get_fignums()
    truth = dict(start=0.5, end=1.0, box=[0.2, 0.2, 0.8, 0.8])
    ex.plot_explanation(ex.explain(model, processor, make_clip()), make_clip(), truth)
    assert plt.get_fignums() == before
