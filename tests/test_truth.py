"""Methods are marked justly: known maps get the marks they deserve, and what a model hangs on is found."""
import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmfer import truth as tr
from mmfer.core import MmferError, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.explain import COVERS, Explanation, Map, explain, log_probabilities
from mmfer.faces import middle_square
from mmfer.media import SAMPLE_RATE
from mmfer.model import FEROutput, MultimodalFER, preset_config
from mmfer.processor import FaceClip, Processor
from mmfer.toy import FACE_GROUPS, VOICE_GROUPS, make_actor, perform, script

few = settings(max_examples=30, deadline=None)
ends = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda w: w[1] - w[0] > 0.05)
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results/explain_truth.json"
PLACE = [[0.25, 0.5, 0.375, 0.625]]  # one patch of 8 x 8: row 4, column 2
TRUTH = dict(start=0.5, end=1.0, place=PLACE, voice_group="soft", face_group="rest")
processor = Processor(image_size=64, grid=8, crop_size=64, n_frames=12, faces="none")


def made_up_clip():
    "1.5 s of faint noise; loud, and bright in one patch, from 0.5 to 1 s."
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.03, 24_000).astype(np.float32)
    audio[8_000:16_000] *= 8
    frames = rng.integers(60, 90, (12, 64, 64, 3), dtype=np.uint8)
    frames[4:8, 32:40, 16:24] = 250
    times = (np.arange(12) + 0.5) / 8
    return FaceClip(Path("made-up.mp4"), audio, frames, times, 1.5, track=middle_square(frames))


class SeeThrough(nn.Module):
    "Says the second word where sound is loud from 0.5 to 1 s or one patch is bright, and knows nothing else."
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(emotions=("bored", "curious"), visual=SimpleNamespace(grid=8))
        self.audio = self.visual = None
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, audio, video, **others):
        loud = audio[:, 8_000:16_000].abs().mean(1)
        bright = video[..., 32:40, 16:24].float().mean((2, 3, 4)).amax(1) / 255
        curious = self.weight * (30 * loud + 8 * bright - 8)
        return FEROutput(logits=torch.stack([-curious, curious], 1))


def explanation_of(duration=1.5, **maps):
    return Explanation(duration, pd.Series(dict(bored=0.2, curious=0.8)), maps, None, None, None)


# Pointing


@few
@given(st.integers(1, 50), st.floats(0.5, 6), ends)
def test_shares_add_up_to_the_window(n, length, window):
    start, end = np.multiply(window, length)
    inside = tr.share_inside(n, length, start, end)
    assert inside.sum() * length / n == pytest.approx(end - start, abs=1e-9)
    assert inside.min() >= 0 and inside.max() <= 1 + 1e-9


@few
@given(st.integers(1, 20), ends, ends)
def test_shares_of_patches_add_up_to_the_box(side, x, y):
    box = [x[0], y[0], x[1], y[1]]
    share = tr.share_on_place(side, [box])
    assert share.sum() / side**2 == pytest.approx((x[1] - x[0]) * (y[1] - y[0]))
    assert tr.share_on_place(side, [box, box]).max() <= 1  # overlapping boxes count once


@few
@given(st.integers(2, 40), st.integers(2, 20), ends, ends)
def test_an_even_map_scores_chance_and_chance_is_the_share_of_hits(n_bins, n_frames, time, x):
    even = Map(np.full(n_bins, 0.3), np.full((n_frames, 8, 8), 1 / 64))
    truth = dict(start=1.5 * time[0], end=1.5 * time[1], place=[[x[0], 0, x[1], 1]])
    [marks] = tr.point(explanation_of(even=even), truth).to_dict("records")
    for part in tr.PARTS: assert marks[part] == pytest.approx(marks[f"{part}_chance"])
    hits = [tr.share_inside(n_bins, 1.5, truth["start"], truth["end"])[i] >= 0.25 for i in range(n_bins)]
    assert marks["sound_chance"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("peak, hit", [(0, 0), (7, 0), (8, 1), (15, 1), (16, 0), (23, 0)])
def test_a_peak_hits_inside_the_window_only(peak, hit):
    marks = tr.point(explanation_of(one=Map(np.eye(24)[peak])), TRUTH)  # bins of 1/16 s, the cue in 8 to 15
    assert marks.loc["one"].to_dict() == dict(sound=hit, sound_chance=8 / 24)


@pytest.mark.parametrize("t, row, column, frames, place", [(5, 4, 2, 1, 1), (5, 2, 4, 1, 0), (0, 4, 2, 0, 1)])
def test_time_and_place_of_pictures_are_marked_apart(t, row, column, frames, place):
    patches = np.zeros((12, 8, 8))
    patches[t, row, column] = 1
    marks = tr.point(explanation_of(one=Map(patches=patches)), TRUTH).loc["one"]
    assert (marks.frames, marks.place) == (frames, place) and "sound" not in marks
    assert (marks.frames_chance, marks.place_chance) == (4 / 12, 1 / 64)


def test_several_peaks_earn_their_share_and_negative_values_are_no_peaks():
    two = np.zeros(24)
    two[[10, 20]] = 1
    against = np.zeros(24)
    against[10] = -5
    marks = tr.point(explanation_of(two=Map(two), against=Map(against)), TRUTH).sound
    assert marks["two"] == 0.5 and marks["against"] == pytest.approx(7 / 23)


def test_occlusion_points_at_what_a_clear_model_looks_at():
    found = explain(SeeThrough(), processor, made_up_clip(), methods=("occlusion",))
    assert tr.point(found, TRUTH).loc["occlusion", list(tr.PARTS)].tolist() == [1, 1, 1]


# Covers


@pytest.mark.parametrize("kind", range(3))
def test_the_cue_is_covered_and_nothing_else(kind):
    clip = made_up_clip()
    whole = tr.cover_cue(clip, TRUTH, kind=kind)
    place = tr.cover_cue(clip, TRUTH, ("place",), kind)
    cue = slice(8_000, 16_000)
    outside = np.r_[0:8_000, 16_000:24_000]
    assert np.array_equal(whole.audio[outside], clip.audio[outside])
    assert whole.audio[cue].std() < 0.5 * clip.audio[cue].std()
    assert (whole.frames != clip.frames).any((1, 2, 3)).tolist() == [4 <= t < 8 for t in range(12)]
    elsewhere = place.frames != clip.frames
    elsewhere[:, 32:40, 16:24] = False
    assert not elsewhere.any() and place.frames[5, 32:40, 16:24].max() < 100
    assert np.array_equal(place.audio, clip.audio) and len(COVERS["sound"]) == 3


def test_what_is_usual_holds_nothing_of_a_short_cue():
    clip = made_up_clip()
    usual = tr.usual_clip(clip)
    assert usual.frames.max() < 100 and (usual.frames == usual.frames[0]).all()
    assert 0.03 < usual.audio.std() < 0.05 and usual.audio.dtype == np.float32  # the cue has 0.24
    assert tr.usual_clip(replace(clip, frames=None)).frames is None


@pytest.mark.parametrize("kind", range(3))
def test_all_but_the_cue_is_covered_and_no_cover_holds_the_cue(kind):
    clip = made_up_clip()
    left = tr.cover_all_but_cue(clip, TRUTH, kind)
    cue = slice(8_000, 16_000)
    outside = np.r_[0:8_000, 16_000:24_000]
    assert np.array_equal(left.audio[cue], clip.audio[cue])
    assert (left.audio[outside] != clip.audio[outside]).mean() > 0.9 and left.audio[outside].std() < 0.05
    assert np.array_equal(left.frames[4:8], clip.frames[4:8])
    around = [*range(4), *range(8, 12)]
    changed = (left.frames != clip.frames).any((1, 2, 3))[around]
    assert changed.sum() >= 5 and left.frames[around].max() < 100  # a picture may stand for itself


def test_a_clear_model_needs_the_cue_and_only_the_cue():
    clip = made_up_clip()
    versions = [clip, tr.cover_cue(clip, TRUTH), tr.cover_all_but_cue(clip, TRUTH)]
    as_it_was, covered, left = np.exp(log_probabilities(SeeThrough(), processor, versions))[:, 1]
    assert as_it_was > 0.9 and covered < 0.1 and left > 0.9


@few
@given(st.sampled_from(tr.PARTS), st.integers(0, 2**32 - 1))
def test_a_mask_changes_what_it_names(part, seed):
    clip = made_up_clip()
    usual = tr.usual_clip(clip)
    shape = dict(sound=(24,), frames=(12,), place=(8, 8))[part]
    mask = np.random.default_rng(seed).random(shape) < 0.5
    made = tr._make_usual(clip, usual, part, mask)
    if part == "sound":
        middles = (np.arange(24) * 1000 + 500)
        assert ((made.audio == clip.audio)[middles] == ~mask).all()
        assert made.audio[middles][mask] == pytest.approx(usual.audio[middles][mask], abs=1e-6)
        return
    pixels = mask[:, None, None] if part == "frames" else mask.repeat(8, 0).repeat(8, 1)[None]
    assert np.array_equal(made.frames, np.where(pixels[..., None], usual.frames, clip.frames))


# Curves


def test_deleting_what_counts_first_lets_the_answer_fall_at_once():
    clip = made_up_clip()
    cue = np.zeros((12, 8, 8))
    cue[4:8, 4, 2] = 1
    planted = explanation_of(knows=Map(tr.share_inside(24, 1.5, 0.5, 1), cue),
                             inverted=Map(-tr.share_inside(24, 1.5, 0.5, 1), -cue))
    curves = tr.deletion_insertion(SeeThrough(), processor, clip, planted, steps=12)
    areas = tr.curve_areas(curves)
    for part in tr.PARTS:
        knows, inverted, random = [areas.loc[(part, name)] for name in ("knows", "inverted", "random")]
        assert knows.deletion < random.deletion <= inverted.deletion
        assert knows.insertion > random.insertion >= inverted.insertion
    whole = np.exp(log_probabilities(SeeThrough(), processor, [clip]))[0, 1]
    point = curves.set_index(["test", "share"]).probability
    assert point["deletion", 0.0].to_numpy() == pytest.approx(whole)
    assert point["insertion", 1.0].to_numpy() == pytest.approx(whole)
    for part, some in curves[(curves.test == "deletion") & (curves.share == 1)].groupby("part"):
        assert np.ptp(some.probability) == pytest.approx(0)  # when all is gone the order is no matter


def test_areas_are_those_of_trapezoids():
    rows = [("sound", "m", "deletion", share, p) for share, p in zip((0, 0.5, 1), (1, 0.5, 0.25))]
    curves = pd.DataFrame(rows, columns=["part", "method", "test", "share", "probability"])
    assert tr.curve_areas(curves).loc[("sound", "m"), "deletion"] == pytest.approx(0.5 * (0.75 + 0.375))


@few
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_ranks_are_an_order_and_ties_fall_by_chance(n, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, n).astype(float)
    ranks = tr._ranks(values, rng)
    assert sorted(ranks) == list(range(n))
    assert (np.diff(values[np.argsort(ranks)]) <= 0).all()


# Shuffled weights, agreement, scores


def test_shuffling_moves_the_numbers_of_each_weight_and_leaves_the_model_alone():
    seed_everything(0)
    model = MultimodalFER(preset_config("tiny", RAVDESS_EMOTIONS, "audio_only"))
    before = [p.clone() for p in model.parameters()]
    shuffled = tr.randomised(model, 1)
    for old, new, same in zip(before, shuffled.parameters(), model.parameters()):
        assert torch.equal(old, same)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    pairs = [(old, new) for old, new in zip(before, shuffled.parameters()) if old.unique().numel() > 9]
    moved = [not torch.equal(old, new) for old, new in pairs]
    assert moved and all(moved)
    again, other = [next(tr.randomised(model, seed).parameters()) for seed in (1, 2)]
    assert torch.equal(again, next(shuffled.parameters())) and not torch.equal(again, other)


def test_agreement_is_that_of_the_order():
    values = np.arange(24.0)
    maps = dict(occlusion=Map(values), same=Map(values**3), opposite=Map(-values), even=Map(np.ones(24)),
                coarse=Map(values.reshape(8, 3).sum(1)))
    found = tr.agreement(explanation_of(**maps)).sound
    assert found[["same", "opposite", "coarse"]].tolist() == pytest.approx([1, -1, 1])
    assert np.isnan(found["even"]) and "occlusion" not in found
    with pytest.raises(MmferError, match="'rollout' is unknown"):
        tr.agreement(explanation_of(**maps), "rollout")


@few
@given(st.integers(1, 40), st.integers(1, 40))
def test_resampling_keeps_the_mean(n, m):
    values = np.random.default_rng(0).random(n)
    assert tr._resampled(values, m).mean() == pytest.approx(values.mean())


class Fixed(nn.Module):
    "Always answers the same emotion."
    def __init__(self, emotion):
        super().__init__()
        self.config = SimpleNamespace(emotions=RAVDESS_EMOTIONS)
        self.audio = self.visual = None
        self.weight = nn.Parameter(torch.eye(8)[RAVDESS_EMOTIONS.index(emotion)])

    def forward(self, audio=None, video=None, **others):
        return FEROutput(logits=self.weight.detach().expand(len(audio if video is None else video), 8))


@pytest.mark.parametrize("modalities, right", [(("audio",), [1, 1, 0]), (("video",), [1, 0, 1]),
                                               (("audio", "video"), [1, 0, 0])])
def test_an_answer_is_right_if_it_fits_what_can_be_perceived(modalities, right):
    happy = dict(voice_group="rising", face_group="raised")
    truths = [happy, happy | dict(face_group="stern"), happy | dict(voice_group="falling")]
    reader = replace(processor, modalities=modalities)
    assert tr.answered_rightly(Fixed("happy"), reader, [made_up_clip()] * 3, truths).tolist() == right


@pytest.mark.parametrize("modalities, allowed", [
    (("audio",), {"sound": 1 / 4}), (("video",), {"pictures": 1 / 4, "place": 1 / 4}),
    (("audio", "video"), {"sound": 1 / 2, "pictures": 1 / 2, "place": 1 / 2, "sound and pictures": 1 / 8})])
def test_a_control_says_what_guessing_would_get(modalities, allowed):
    groups = [dict(voice_group=v, face_group=f) for v, vs in VOICE_GROUPS.items()
              for f, fs in FACE_GROUPS.items() if {*vs} & {*fs}]
    truths = [TRUTH | group for group in groups]
    reader = replace(processor, modalities=modalities)
    table = tr.control(Fixed("happy"), reader, [made_up_clip()] * 8, truths, progress=False)
    assert table.allowed.drop(["nothing", "all but the cue"]).to_dict() == pytest.approx(allowed)
    always = (1 / 4, 1 / 8)[len(modalities) - 1]  # as often as a guess, whatever is covered
    assert table.drop(columns="allowed").stack().to_numpy() == pytest.approx(always)


def test_scores_of_a_model_that_knows_nothing_are_refused():
    with pytest.raises(MmferError, match="none of these clips"):
        tr.score_methods(Fixed("angry"), processor, [made_up_clip()], [TRUTH], progress=False)


def test_two_standard_errors_are_above_chance():
    scores = pd.DataFrame(dict(sound=[0.45, 0.44], sound_chance=0.3, n=40), index=["far", "near"])
    assert tr.above_chance(scores).sound.to_dict() == dict(far=True, near=False)  # 0.3 + 2 * 0.0725 = 0.445


def test_trust_is_what_was_measured():
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["pointing"]
    names = [f"{part}{end}" for part in tr.PARTS for end in ("", "_chance")]
    rounded = {method: {name: round(row[name], 2) for name in names} for method, row in measured.items()}
    assert tr.TRUST == rounded


def test_the_tables_of_the_chapter_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS.parent.parent)
    benchmark = importlib.import_module("explain_truth")
    chapter = json.loads((RESULTS.parent.parent.parent / "nbs/18_truth.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in chapter["cells"])
    for table in benchmark.report(json.loads(RESULTS.read_text(encoding="utf-8"))).split("\n\n"):
        assert table in text


# A trained model: three seeds, speakers it has not met


class Ear(nn.Module):
    "A small encoder in the place of FastConformer."
    def __init__(self, dim=64):
        super().__init__()
        self.near = nn.Conv1d(80, dim, 9, stride=4, padding=4)
        self.wide = nn.Conv1d(dim, dim, 7, padding=3)
        self.norm = nn.LayerNorm(dim)

    @property
    def dtype(self): return self.norm.weight.dtype

    def forward(self, mel, attention_mask):
        x = self.wide(self.near(mel.mT).relu()).relu().mT
        return SimpleNamespace(last_hidden_state=self.norm(x), attention_mask=attention_mask[:, ::4])


class Eye(nn.Module):
    "A small tower in the place of SigLIP2: a token per patch of 8 x 8 pixels."
    def __init__(self, dim=64):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, dim, 4, 2, padding=1))
        self.place = nn.Parameter(0.02 * torch.randn(64, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels):
        tokens = self.look(pixels).flatten(2).mT + self.place
        return SimpleNamespace(last_hidden_state=self.norm(tokens.relu()))


def toy_clips(numbers, every=1):
    "Clips of toy speakers in memory, what is true of each, and their emotions."
    parts = [part for number in numbers for part in script(make_actor(number))[::every]]
    clips = []
    truths = []
    for part in parts:
        frames, audio, truth = perform(part, fps=6)
        times = (np.arange(len(frames)) + 0.5) / 6
        clips.append(FaceClip(Path(part.stem), audio, frames, times, 2.0, track=middle_square(frames)))
        truths.append(truth)
    return clips, truths, torch.tensor([part.emotion - 1 for part in parts])


def group_loss(logits, emotions, groups):
    "Minus the log of what all emotions get together that share the group of the right one."
    same = torch.tensor([[any({a, b} <= {*group} for group in groups.values()) for b in RAVDESS_EMOTIONS]
                         for a in RAVDESS_EMOTIONS])[emotions]
    return -logits.log_softmax(-1).masked_fill(~same, -torch.inf).logsumexp(-1).mean()


def train(system, lessons, seed, epochs=8):
    "A small model of one modality, taught which group each clip belongs to."
    clips, _, emotions = lessons
    seed_everything(seed)
    model = MultimodalFER(preset_config("tiny", RAVDESS_EMOTIONS, system))
    hears = system == "audio_only"
    if hears: model.audio.encoder = Ear()
    else: model.visual.vision = Eye()
    groups = VOICE_GROUPS if hears else FACE_GROUPS
    inputs = Processor.for_model(model.config, faces="none")(clips)
    optimizer = torch.optim.AdamW(model.parameters())
    per_epoch = -(-len(emotions) // 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * per_epoch, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(emotions)).split(16):
            out = model(**{name: values[batch] for name, values in inputs.items()})
            own = out.audio_logits if hears else out.visual_logits
            loss = sum(group_loss(logits, emotions[batch], groups) for logits in (out.logits, own))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


METHODS = ("integrated gradients", "occlusion")


def exam_of(model, reader, clips, truths):
    "Marks of the methods on right answers, on those that need the cue, and for shuffled weights."
    right = tr.answered_rightly(model, reader, clips, truths)
    assert right.mean() >= 0.8
    needed = tr.needs_cue(model, reader, clips, truths)
    marks = [tr.point(explain(model, reader, clips[i], METHODS), truths[i]) for i in np.flatnonzero(right)]
    where_needed = [mark[[part for part in needed if needed[part][i]]]
                    for mark, i in zip(marks, np.flatnonzero(right))]
    shuffled = tr.score_randomised(model, reader, clips, truths, METHODS, progress=False)
    return tr.mean_scores(marks), tr.mean_scores(where_needed), shuffled


@pytest.mark.parametrize("system, parts", [("audio_only", ["sound"]), ("visual_only", ["frames", "place"])])
def test_over_three_seeds_methods_find_what_a_model_needs_and_not_for_shuffled_weights(system, parts):
    lessons = toy_clips(range(1, 8))
    clips, truths, _ = toy_clips((11, 12), every=5)
    models = [train(system, lessons, seed) for seed in range(3)]
    reader = Processor.for_model(models[0].config, faces="none")
    exams = zip(*(exam_of(model, reader, clips, truths) for model in models))
    hits, where_needed, shuffled = [pd.concat(tables).groupby(level=0).mean() for tables in exams]
    control = pd.concat([tr.control(model, reader, clips, truths, progress=False) for model in models])
    control = control.groupby(level=0).mean()
    for part in parts:
        best = where_needed[part].idxmax()
        assert where_needed.loc[best, part] >= 0.9
        assert hits.loc[best, part] >= 0.8
        assert shuffled.loc[best, part] <= hits.loc[best, f"{part}_chance"] + 0.2
    assert control.loc["all but the cue", [0, 1, 2]].mean() >= 0.85
    covered = control.drop(["nothing", "all but the cue"])
    assert (covered[[0, 1, 2]].mean(axis=1) <= covered.allowed + 0.1).all()
