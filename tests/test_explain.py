"""What would make an explanation lie: padding, gates, covers that know too much, shares with a rest."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmfer import explain as ex
from mmfer.core import MmferError, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.faces import middle_square
from mmfer.fusion import SYSTEMS
from mmfer.media import Clip
from mmfer.model import FEROutput, MultimodalFER, preset_config
from mmfer.processor import FaceClip, Processor

few = settings(max_examples=40, deadline=None)
processor = Processor(image_size=64, grid=8, crop_size=64, faces="none")
WEIGHTS = {"attention", "rollout"}  # the methods that only share out weights


def make_clip(seconds=2.0, frames=16, seed=0, side=64):
    rng = np.random.default_rng(seed)
    audio = rng.normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
    pictures = rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    times = (np.arange(frames) + 0.5) / frames * seconds
    return FaceClip(Path("made-up.mp4"), audio, pictures, times, seconds, track=middle_square(pictures))


def without(clip, modality):
    return replace(clip, audio=None) if modality == "audio" else replace(clip, frames=None, track=None)


def tiny(system="lfm2", seed=0):
    "Random weights, scores of patches and frames that differ as after a training."
    seed_everything(seed)
    model = MultimodalFER(preset_config("tiny", RAVDESS_EMOTIONS, system)).eval()
    with torch.no_grad():
        if model.visual is not None: model.visual.roi.scorer[-1].weight.mul_(5)
        if model.audio is not None: model.audio.pool.query.normal_(0, 0.1)
        if model.classifier is not None: model.classifier.pool.query.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def model(): return tiny()


@pytest.fixture(scope="module")
def explanation(model): return ex.explain(model, processor, make_clip(), ("attention",))


class Planted(nn.Module):
    "Decides by the loudness of one window, or by the brightness of one place in some pictures."
    def __init__(self, window=None, place=None, pictures=slice(None)):
        super().__init__()
        self.config = SimpleNamespace(emotions=RAVDESS_EMOTIONS)
        self.weight = nn.Parameter(torch.ones(1))
        self.window = window
        self.place = place
        self.pictures = pictures

    def forward(self, audio=None, video=None, output_attentions=False, **others):
        logits = torch.zeros(len(video), 8, device=video.device)
        if self.window:
            a, b = (round(w * 16_000) for w in self.window)
            logits[:, 4] = 5 * audio[:, a:b].abs().mean(1) * self.weight
        if self.place:
            x0, y0, x1, y1 = self.place
            seen = video[:, self.pictures, :, y0:y1, x0:x1].float() / 255
            logits[:, 3] = 5 * seen.mean((1, 2, 3, 4)) * self.weight
        return FEROutput(logits=logits)


# Attention as it is

@few
@given(st.integers(1, 60))
def test_even_shares_are_a_distribution_in_each_segment(n):
    assert ex.even_shares(n, 8).sum(1) == pytest.approx(np.ones(8))


@pytest.mark.parametrize("seconds, frames", [(2.0, 16), (1.37, 12), (0.3, 5)])
@pytest.mark.parametrize("system", ["lfm2", "attention"])
def test_weights_are_shared_out_without_a_rest(system, seconds, frames):
    model = tiny(system)
    e = ex.explain(model, processor, make_clip(seconds, frames), tuple(WEIGHTS))
    assert e.segments.sum() == pytest.approx(1, abs=1e-4)
    attention = e.maps["attention"]
    assert attention.sound.sum() == pytest.approx(1, abs=1e-4)
    assert attention.patches.sum() == pytest.approx(1, abs=1e-4)
    rolled = e.maps["rollout"]
    assert rolled.sound.sum() + rolled.patches.sum() == pytest.approx(1, abs=1e-4)
    assert ((attention.patches > 0).sum((1, 2)) <= model.config.visual.top_k).all()
    for found in (attention, rolled):
        assert found.patches.shape == (frames, 8, 8)
        assert found.frames == pytest.approx(found.patches.sum((1, 2)))
        assert found.place == pytest.approx(found.patches.sum(0))


def gates_in_use(model, clip):
    "What `ROICompressor` really multiplied each kept patch with, from its input and output; their places."
    seen = {}
    def note(_, given, made): seen.update(tokens=given[0], made=made)
    hook = model.visual.roi.register_forward_hook(note)
    with torch.inference_mode(): model.eval()(**processor(clip))
    hook.remove()
    patches, _, kept, _ = seen["made"]
    before = seen["tokens"].gather(1, kept[..., None].expand(-1, -1, seen["tokens"].shape[-1]))
    after = patches[:, :kept.shape[1]]
    return ((after * before).sum(-1) / before.square().sum(-1)).numpy(), kept.numpy()


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_the_gates_that_are_drawn_are_those_that_the_model_uses(spread):
    model = tiny(seed=1)
    with torch.no_grad(): model.visual.roi.scorer[-1].weight.mul_(spread)
    clip = make_clip()
    gates, kept = gates_in_use(model, clip)
    found = ex.explain(model, processor, clip, ("attention",)).maps["attention"]
    drawn = found.patches.reshape(len(kept), -1) / found.frames[:, None]
    assert np.take_along_axis(drawn, kept, 1) * kept.shape[1] == pytest.approx(gates, abs=1e-3)
    if spread > 1: assert gates.max() > 3 and gates.min() < 0.1, "the test needs gates that differ"


def test_padding_has_no_weight(model):
    short = make_clip(1.0)
    alone = processor(short)
    together = processor([short, make_clip(2.0)])
    with torch.inference_mode():
        out = model(**alone, output_attentions=True)
        padded = model(**together, output_attentions=True)
    for method in (ex._attention, ex._rollout):
        a = method(out)
        b = method(padded)  # of the first clip of the batch
        assert len(a.sound) == len(b.sound) == 13
        assert b.sound == pytest.approx(a.sound, abs=1e-4) and b.patches == pytest.approx(a.patches, abs=1e-4)


def test_what_is_explained_is_handed_on_as_the_model_gives_it(model, explanation):
    with torch.inference_mode(): out = model(**processor(make_clip()), output_attentions=True)
    assert explanation.fusion == pytest.approx(out.fusion_attention[0].numpy(), abs=1e-5)
    assert explanation.segments == pytest.approx(out.temporal_attention[0].numpy(), abs=1e-5)
    assert explanation.probabilities.to_numpy() == pytest.approx(out.probabilities[0].numpy(), abs=1e-5)
    assert list(explanation.probabilities.index) == list(RAVDESS_EMOTIONS)
    assert explanation.emotion == RAVDESS_EMOTIONS[out.logits.argmax()]


# Rollout

@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_rollout_mixes_and_loses_nothing(layers, n, seed):
    attention = np.random.default_rng(seed).dirichlet(np.ones(n), (layers, n))
    mixed = ex.rollout(attention)
    assert mixed.sum(1) == pytest.approx(np.ones(n))
    assert (np.diag(mixed) >= 0.5**layers - 1e-9).all()


def test_rollout_applies_the_later_layer_last():
    first = np.eye(3)[[1, 1, 2]]   # token 0 looks at 1
    second = np.eye(3)[[0, 1, 0]]  # token 2 looks at 0
    assert ex.rollout(np.stack([first, second]))[2] == pytest.approx([0.25, 0.25, 0.5])


def test_rollout_sees_where_the_fusion_takes_from():
    "Everything looks at v1: the pictures of the first segment gain."
    fusion = torch.zeros(1, 1, 2, 16, 16)
    fusion[..., 1] = 1
    frames = torch.full((1, 1, 8), 1.0)
    out = FEROutput(temporal_attention=torch.full((1, 8), 1 / 8), fusion_attention=fusion,
                    audio_attention=torch.eye(8)[None], visual_gates=frames.mT,
                    visual_kept=torch.zeros(1, 8, 1, dtype=torch.long), visual_scores=torch.zeros(1, 8, 4))
    found = ex._rollout(out)
    assert found.sound == pytest.approx(np.full(8, 1 / 32))
    assert found.frames == pytest.approx([1 / 32 + 0.5, *[1 / 32] * 7])


# Gradients

def test_gradient_x_attention_is_what_a_small_change_of_the_gates_would_do(model):
    "Against a difference quotient: all gates of one picture, turned up a little."
    clip = make_clip()
    answer = 3
    found = ex._gradient_attention(model, processor, clip, answer)
    moved = []
    for factor in (0.99, 1.01):
        def turn(_, given, made, factor=factor):
            tokens = made[0].clone()
            tokens[5, :model.config.visual.top_k] *= factor
            return tokens, *made[1:]
        hook = model.visual.roi.register_forward_hook(turn)
        with torch.inference_mode(): logits = model.double()(**as_double(processor(clip))).logits
        hook.remove()
        moved.append(logits.log_softmax(-1)[0, answer].item())
    model.float()
    assert found.frames[5] == pytest.approx((moved[1] - moved[0]) / 0.02, rel=0.02, abs=1e-4)


def as_double(inputs): return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("method", ["_gradient_attention", "_integrated_gradients"])
def test_gradients_leave_nothing_behind(model, method):
    model.train()
    model.requires_grad_(False)
    found = getattr(ex, method)(model, processor, make_clip(), 0)
    assert np.abs(found.sound).max() > 0 and np.abs(found.frames).max() > 0
    assert model.training and not any(w.requires_grad or w.grad is not None for w in model.parameters())
    assert not any(m._forward_hooks for m in (model.audio.front, model.visual.roi, model.visual.roi.scorer))
    model.requires_grad_(True).eval()


@pytest.mark.parametrize("system", SYSTEMS)
def test_integrated_gradients_are_complete(system):
    model = tiny(system)
    clip = make_clip(1.0, 6)
    with ex._gradients(model) as device:
        usual, given, log_probability = ex._way(model, processor(clip, device=device), 2)
        difference = (log_probability(*given.values()) - log_probability(*usual.values())).item()
    found = ex._integrated_gradients(model, processor, clip, 2)
    parts = [x.sum() for x in (found.sound, found.patches) if x is not None]
    assert len(parts) == (1 if "only" in system else 2)
    assert sum(parts) == pytest.approx(difference, abs=0.01 + 0.02 * abs(difference))
    assert abs(difference) > 0.01, "the test needs a difference"


def test_a_steep_way_is_walked_in_smaller_parts():
    model = tiny()
    with torch.no_grad(): model.classifier.mlp[-1].weight.mul_(100)
    clip = make_clip(1.0, 6)
    gaps = []
    with ex._gradients(model) as device:
        usual, given, f = ex._way(model, processor(clip, device=device), 2)
        ends = [tuple(end.values()) for end in (usual, given)]
        difference = (f(*ends[1]) - f(*ends[0])).item()
        for halvings in (0, 6):
            found = ex._walk(f, *ends, halvings)
            gaps.append(abs(sum(x.sum().item() for x in found) - difference))
    assert gaps[0] > 0.1 > gaps[1], gaps


def test_the_way_ends_at_the_clip_itself(model):
    clip = make_clip()
    with ex._gradients(model) as device:
        inputs = processor(clip, device=device)
        _, given, log_probability = ex._way(model, inputs, 2)
        end = log_probability(*given.values()).item()
        assert end == pytest.approx(model(**inputs).logits.log_softmax(-1)[0, 2].item(), abs=1e-4)


def test_without_holding_the_patches_completeness_is_lost(monkeypatch):
    "Why the patches are held: the choice of patches jumps, which no gradient sees."
    hooked = ex._hooked
    model = tiny()
    scorer = model.visual.roi.scorer
    gaps = []
    for hold in (True, False):
        if not hold:
            def only_the_sound(module, hook): return hooked(None if module is scorer else module, hook)
            monkeypatch.setattr(ex, "_hooked", only_the_sound)
        with ex._gradients(model) as device:
            usual, given, f = ex._way(model, processor(make_clip(1.0, 8), device=device), 2)
            ends = [tuple(end.values()) for end in (given, usual)]
            found = IntegratedGradients(f).attribute(*ends, n_steps=32, internal_batch_size=8)
            gaps.append(abs(sum(x.sum() for x in found) - f(*ends[0]) + f(*ends[1])).item())
    assert gaps[0] < 0.01 < gaps[1]


def test_nothing_is_credited_to_what_never_changes(model):
    clip = make_clip()
    clip.frames[:, :32] = clip.frames[:1, :32]  # the upper half stands still
    found = ex._integrated_gradients(model, processor, clip, 2)
    assert np.abs(found.patches[:, :4]).max() == 0 < np.abs(found.patches[:, 4:]).max()


# Covers

windows = st.tuples(st.floats(0, 2), st.floats(0, 2)).map(sorted).filter(lambda w: 0.01 < w[1] - w[0] < 1.9)


@few
@given(windows, st.sampled_from(ex.COVERS["sound"]), st.integers(0, 99))
def test_a_cover_of_sound_depends_on_nothing_that_it_covers(window, kind, seed):
    clip = make_clip()
    inside = np.zeros(32_000, bool)
    inside[round(window[0] * 16_000):round(window[1] * 16_000)] = True
    louder = make_clip(seed=seed).audio * 7 + 1
    other = replace(clip, audio=np.where(inside, louder, clip.audio))
    covered = ex.cover_sound(clip, *window, kind)
    assert np.array_equal(covered.audio, ex.cover_sound(other, *window, kind).audio)
    assert np.array_equal(covered.audio[~inside], clip.audio[~inside])
    assert covered.audio.dtype == np.float32 and np.isfinite(covered.audio).all()
    assert np.array_equal(covered.frames, clip.frames)


@few
@given(windows, st.sampled_from(ex.COVERS["pictures"]))
def test_a_cover_of_pictures_depends_on_nothing_that_it_covers(window, kind):
    clip = make_clip()
    inside = (clip.times >= window[0]) & (clip.times < window[1])
    other = replace(clip, frames=np.where(inside[:, None, None, None], 255 - clip.frames, clip.frames))
    covered = ex.cover_pictures(clip, *window, kind)
    assert np.array_equal(covered.frames, ex.cover_pictures(other, *window, kind).frames)
    assert np.array_equal(covered.frames[~inside], clip.frames[~inside])
    assert not inside.any() or (covered.frames != clip.frames)[inside].any((1, 2, 3)).all()


corners = st.tuples(*[st.integers(0, 8)] * 4)
boxes = corners.map(lambda b: (*np.minimum(b[:2], b[2:]), *np.maximum(b[:2], b[2:])))


@few
@given(boxes.filter(lambda b: b[0] < b[2] and b[1] < b[3] and b != (0, 0, 8, 8)),
       st.sampled_from(("mean", "inpaint")))
def test_a_cover_of_a_place_depends_on_nothing_that_it_covers(box, kind):
    clip = make_clip(0.1, frames=2)
    x0, y0, x1, y1 = np.multiply(box, 8)
    inside = np.zeros((64, 64), bool)
    inside[y0:y1, x0:x1] = True
    other = replace(clip, frames=np.where(inside[..., None], 255 - clip.frames, clip.frames))
    covered = ex.cover_place(clip, np.divide(box, 8), kind)
    assert np.array_equal(covered.frames, ex.cover_place(other, np.divide(box, 8), kind).frames)
    assert np.array_equal(covered.frames[:, ~inside], clip.frames[:, ~inside])
    assert (covered.frames != clip.frames)[:, inside].any((1, 2)).all()


@few
@given(st.sets(st.integers(0, 10), max_size=5), st.integers(0, 99))
def test_the_usual_place_knows_nothing_of_what_lasts_for_less_than_half(pictures, seed):
    clip = make_clip(0.1, frames=11)
    clip.frames[:] = clip.frames[:1]
    other = replace(clip, frames=clip.frames.copy())
    other.frames[list(pictures), 8:24, 16:40] = make_clip(0.1, 1, seed).frames[0, 8:24, 16:40]
    box = (0.25, 0.125, 0.625, 0.375)
    assert np.array_equal(ex.cover_place(other, box, "usual").frames, clip.frames)


def test_hush_is_as_quiet_as_the_quietest_moment_and_noise_as_loud_as_all():
    clip = make_clip()
    clip.audio[:4_000] *= 0.01
    loud = clip.audio[4_000:16_000].std()
    covered = {kind: ex.cover_sound(clip, 1.0, 1.5, kind).audio for kind in ex.COVERS["sound"]}
    heard = {kind: audio[16_100:23_900].std() for kind, audio in covered.items()}
    assert heard["hush"] < 0.05 * loud
    assert heard["noise"] == pytest.approx(np.delete(clip.audio, slice(16_000, 24_000)).std(), rel=0.1)


def test_a_repeated_stretch_is_a_stretch_from_outside():
    clip = make_clip()
    covered = ex.cover_sound(clip, 1.5, 1.75, "repeat").audio
    assert np.array_equal(covered[24_080:27_920], clip.audio[80:3_920])


def test_covers_begin_without_a_click():
    "On a slow wave no sample may jump further than the wave itself does, times a few."
    clip = replace(make_clip(), audio=np.sin(np.arange(32_000) / 60).astype(np.float32))
    covered = ex.cover_sound(clip, 0.51, 1.03, "repeat").audio
    assert np.abs(np.diff(covered)).max() < 5 * np.abs(np.diff(clip.audio)).max()


def test_hold_shows_the_nearest_picture_outside():
    covered = ex.cover_pictures(make_clip(), 0.5, 1.0, "hold").frames  # pictures 4 to 7
    clip = make_clip()
    assert [int((covered[t] == clip.frames).all((1, 2, 3)).argmax()) for t in range(4, 8)] == [3, 3, 8, 8]


@pytest.mark.parametrize("cover, where", [(ex.cover_sound, (0, 2.0)), (ex.cover_pictures, (0, 2.0)),
                                          (ex.cover_place, ((0, 0, 1, 1),))])
def test_where_nothing_is_left_outside_a_cover_refuses(cover, where):
    with pytest.raises(MmferError, match="made-up.mp4 has no"): cover(make_clip(), *where)
    with pytest.raises(MmferError, match="choose one of"): cover(make_clip(), *where, "black")


# Occlusion

@pytest.mark.parametrize("window, bin", [((0.5, 0.75), 5), ((1.25, 1.5), 11), ((0, 0.2), 0)])
def test_occlusion_finds_the_moment_that_decides(window, bin):
    clip = make_clip()
    a, b = (round(w * 16_000) for w in window)
    clip.audio[a:b] *= 8
    found = ex.occlude(Planted(window), processor, clip, dict(sound=ex.COVERS["sound"]))
    assert found.sound.max() > 0.5 and found.sound[bin] == pytest.approx(found.sound.max(), abs=0.1)
    assert found.frames is None and found.place is None and found.patches is None
    far = np.abs((np.arange(16) + 0.5) / 8 - np.mean(window)) > 0.6
    assert np.abs(found.sound[far]).max() < 1e-5


def test_occlusion_finds_the_place_and_the_pictures_that_decide():
    clip = make_clip()
    clip.frames[:] = 40
    clip.frames[6:9, 24:40, 8:24] = 250  # rows 3 and 4, columns 1 and 2 of the patches
    found = ex.occlude(Planted(place=(8, 24, 24, 40), pictures=slice(6, 9)), processor, clip)
    assert np.unravel_index(found.place.argmax(), (8, 8)) in {(3, 1), (3, 2), (4, 1), (4, 2)}
    assert found.frames.argmax() in (6, 7, 8) and np.abs(found.sound).max() == 0
    assert found.patches.sum() == pytest.approx(1)
    t, row, column = np.unravel_index(found.patches.argmax(), found.patches.shape)
    assert t in (6, 7, 8) and row in (3, 4) and column in (1, 2)


def test_of_several_kinds_of_cover_the_mean_fall_counts(model):
    clip = make_clip(1.0, 4)
    for part, field in dict(sound="sound", pictures="frames", place="place").items():
        kinds = [getattr(ex.occlude(model, processor, clip, {part: (k,)}), field) for k in ex.COVERS[part]]
        together = getattr(ex.occlude(model, processor, clip, {part: ex.COVERS[part]}), field)
        assert together == pytest.approx(np.mean(kinds, 0), abs=1e-3)
        assert np.ptp(kinds, 0).max() > 1e-3, "the test needs kinds that differ"


@pytest.mark.parametrize("p", [0.2, 0.9, 1 - 1e-9])
def test_log_odds_do_not_saturate(p):
    assert ex._log_odds(np.log(p)) == pytest.approx(np.log(p / (1 - p)), rel=1e-6)
    assert np.isfinite(ex._log_odds(np.array([0.0, -1e-300, -80.0]))).all()


def test_versions_asked_together_get_the_answers_of_single_ones(model, monkeypatch):
    clip = make_clip()
    clips = [clip, make_clip(1.5, 12, seed=1), without(clip, "audio"), without(clip, "frames")]
    together = ex.log_probabilities(model, processor, clips)
    alone = np.concatenate([ex.log_probabilities(model, processor, [clip]) for clip in clips])
    with torch.inference_mode():
        plain = [model(**processor(clip, missing_ok=True)).logits.log_softmax(-1) for clip in clips]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together == pytest.approx(torch.cat(plain).numpy(), abs=1e-4)


def test_shared_pictures_pass_the_tower_once_and_versions_go_in_batches(model, monkeypatch):
    read = []
    encode = model.visual.encode
    monkeypatch.setattr(model.visual, "encode", lambda frames: (read.append(len(frames)), encode(frames))[1])
    ex.occlude(model, processor, make_clip(), dict(sound=ex.COVERS["sound"]))
    assert read == [16] * 4  # 49 versions of the sound, 16 at a time, all with the same 16 pictures


def test_the_face_of_a_clip_as_filmed_is_looked_for_once(model, monkeypatch):
    crop = make_clip(1.0, 4)
    wide = np.pad(crop.frames, ((0, 0), (0, 0), (20, 20), (0, 0)))  # the middle square is the crop
    filmed = Clip(crop.path, crop.audio, wide, crop.times, crop.duration)
    found = []
    track = Processor.crop

    def count(self, clip):
        found.append(isinstance(clip, FaceClip))
        return track(self, clip)
    monkeypatch.setattr(Processor, "crop", count)
    of_film = ex.explain(model, processor, filmed, ("attention", "occlusion"))
    assert found.count(False) == 1
    of_crop = ex.explain(model, processor, crop, ("attention", "occlusion"))
    for name, found in of_crop.maps.items():
        assert of_film.maps[name].sound == pytest.approx(found.sound, abs=1e-5)


# Shares

four = st.lists(st.floats(-9, 9), min_size=4, max_size=4)


@few
@given(four)
def test_shares_are_efficient_symmetric_and_give_nothing_for_nothing(worth):
    none, sound, pictures, both = worth
    shares = ex._shapley(none, sound, pictures, both)
    assert shares.sum() == pytest.approx(both - none, abs=1e-9)
    swapped = ex._shapley(none, pictures, sound, both)
    assert swapped["sound"] == pytest.approx(shares["pictures"], abs=1e-9)
    assert ex._shapley(none, none, pictures, pictures)["sound"] == pytest.approx(0, abs=1e-9)


def test_shares_on_four_numbers():
    assert ex._shapley(none=0, sound=1, pictures=2, both=4).to_dict() == dict(sound=1.5, pictures=2.5)


@pytest.mark.parametrize("system", ["lfm2", "late", "early"])
def test_shares_sum_to_what_the_answer_has_above_an_even_guess(system):
    model = tiny(system)
    clip = make_clip()
    with torch.inference_mode():
        cases = [model(**processor(c, missing_ok=True)).logits.log_softmax(-1)[0]
                 for c in (clip, without(clip, "frames"), without(clip, "audio"))]
    both, sound, pictures = (case[cases[0].argmax()].item() for case in cases)
    shares = ex.modality_shares(model, processor, clip)
    assert shares.sum() == pytest.approx(both + np.log(8), abs=1e-4)
    assert shares["sound"] - shares["pictures"] == pytest.approx(sound - pictures, abs=1e-4)


# Systems and clips that lack something

BUT_ROLLOUT = (ex.METHODS[0], *ex.METHODS[2:])
HAVE = dict(late=ex.METHODS[2:], early=BUT_ROLLOUT, attention=ex.METHODS, lfm2=ex.METHODS,
            audio_only=BUT_ROLLOUT, visual_only=BUT_ROLLOUT)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_method_that_a_system_lacks_is_not_there(system):
    model = tiny(system)
    own = Processor.for_model(model.config, faces="none")
    e = ex.explain(model, own, make_clip(0.6, 3))
    assert tuple(e.maps) == HAVE[system]
    assert (e.segments is None) == (system == "late")
    assert (e.fusion is None) == (system not in ("attention", "lfm2"))
    assert (e.shares is None) == (len(own.modalities) == 1)
    for found in e.maps.values():
        assert (found.sound is None) == (system == "visual_only")
        for values in (found.patches, found.frames, found.place):
            assert (values is None) == (system == "audio_only")
        assert all(np.isfinite(x).all() for x in vars(found).values() if x is not None)


@pytest.mark.parametrize("missing", ["audio", "frames"])
def test_a_modality_that_a_clip_lacks_is_left_out(model, missing):
    e = ex.explain(model, processor, without(make_clip(0.6, 3), missing))
    assert tuple(e.maps) == ex.METHODS and e.shares is None
    for found in e.maps.values():
        assert (found.sound is None) == (missing == "audio")
        assert (found.patches is None) == (missing == "frames")
    with pytest.raises(MmferError, match="one modality"):
        ex.modality_shares(model, processor, without(make_clip(), missing))


def test_a_model_that_shows_nothing_can_be_occluded():
    e = ex.explain(Planted(place=(0, 0, 8, 8)), processor, make_clip(1.0, 4))
    assert list(e.maps) == ["occlusion"] and e.segments is None and e.fusion is None


def test_methods_come_in_their_order_and_unknown_ones_are_named(model):
    e = ex.explain(model, processor, make_clip(1.0, 4), ("rollout", "attention"))
    assert list(e.maps) == ["attention", "rollout"]
    with pytest.raises(MmferError, match="'feeling' is unknown.*occlusion"):
        ex.explain(model, processor, make_clip(), ("feeling",))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(model, training):
    model.train(training)
    quick = ("attention", "gradient x attention")
    first = ex.explain(model, processor, make_clip(1.0, 4), quick)
    second = ex.explain(model, processor, make_clip(1.0, 4), quick)
    assert model.training == training
    pd.testing.assert_series_equal(first.probabilities, second.probabilities)
    for name, found in first.maps.items():
        assert found.sound == pytest.approx(second.maps[name].sound, abs=1e-6)
    model.eval()
