"""Augmentation depends on seed, epoch and clip; masks move with pictures; mixing keeps shares and lengths."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmfer.augment import (
    AudioAugment, AugmentedClips, VideoAugment, add_noise, augment_clip, blend, clip_seed, cutmix, draw_mix,
    mix_batch, mixup, pitch_shift, seeded, soften, time_stretch)
from mmfer.core import MmferError, seed_everything
from mmfer.corpus import Corpus
from mmfer.processor import ClipDataset, Processor
from mmfer.toy import make_toy
from mmfer.visual import VisualBranch

RATE = 16_000
BOTH = ["audio", "video"]
few = settings(max_examples=20, deadline=None)  # resampling is slow


def tone(samples=RATE, pitch=440):
    return torch.sin(2 * torch.pi * pitch * torch.arange(samples) / RATE)


def voice(samples, seed=0):
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.3 * tone(samples, 150) + 0.01 * noise


def pitch_of(sound):
    return torch.fft.rfft(sound).abs().argmax().item() * RATE / len(sound)


# sound

@few
@given(samples=st.integers(1600, 32_000), seed=st.integers(0, 100))
def test_sound_is_seeded_finite_and_keeps_the_length_within_its_range(samples, seed):
    sound = voice(samples)
    a, b = (AudioAugment(p=1.0)(sound, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and a.dtype == torch.float32
    assert samples / 1.1 - 1 <= len(a) <= samples / 0.9 + 1


@pytest.mark.parametrize("semitones", [-4.0, -0.3, 0.0, 1.7, 12.0])
def test_pitch_moves_and_length_stays(semitones):
    shifted = pitch_shift(tone(), semitones)
    assert len(shifted) == RATE
    assert pitch_of(shifted) == pytest.approx(440 * 2 ** (semitones / 12), rel=0.01)


@pytest.mark.parametrize("rate", [0.8, 1.0, 1.25])
def test_stretch_changes_the_length_and_keeps_the_pitch(rate):
    stretched = time_stretch(tone(), rate)
    assert len(stretched) == round(RATE / rate)
    assert pitch_of(stretched) == pytest.approx(440, abs=3)


def rms(sound): return sound.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def toy_sound(tmp_path_factory):
    folder = make_toy(tmp_path_factory.mktemp("toy"), actors=2, clips_per_actor=8, progress=False)
    return ClipDataset(Corpus.from_folder(folder), Processor(image_size=32, grid=4, faces="none"))[4]["audio"]


@few
@given(rate=st.floats(0.8, 1.25), semitones=st.floats(-4, 4))
def test_tempo_and_pitch_keep_the_loudness(toy_sound, rate, semitones):
    assert rms(toy_sound) > 0.01
    for changed in (time_stretch(toy_sound, rate), pitch_shift(toy_sound, semitones)):
        assert rms(changed) == pytest.approx(rms(toy_sound), rel=0.01)


def test_silence_stays_silent():
    silence = torch.zeros(RATE)
    assert (time_stretch(silence, 0.8) == 0).all() and (pitch_shift(silence, 2.0) == 0).all()


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_noise_has_the_strength_asked_for(snr):
    sound = voice(RATE)
    noise = add_noise(sound, snr) - sound
    assert 10 * (sound.square().sum() / noise.square().sum()).log10().item() == pytest.approx(snr, abs=0.01)


def test_a_probability_of_zero_changes_nothing():
    assert torch.equal(AudioAugment(p=0.0)(voice(RATE)), voice(RATE))


@pytest.mark.parametrize("wrong", [dict(p=1.5), dict(stretch=-0.1), dict(semitones=-1.0), dict(loud=2.0)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(MmferError, match=next(iter(wrong))): AudioAugment(**wrong)


# pictures

def test_one_draw_for_all_frames():
    seed_everything(3)
    still = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(6, -1, -1, -1)
    changed, _ = VideoAugment()(still)
    assert changed.shape == still.shape and changed.dtype == torch.uint8 and type(changed) is torch.Tensor
    assert (changed == changed[:1]).all() and not torch.equal(changed, still)
    assert not torch.equal(VideoAugment()(still)[0], changed)  # another clip, another draw


def marked_corner(size=32, grid=4):
    "A black clip with a white corner of one quarter, and the mask that marks it."
    video = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    video[..., :size // 2, :size // 2] = 255
    mask = torch.zeros(2, grid, grid, dtype=torch.bool)
    mask[:, :grid // 2, :grid // 2] = True
    return video, mask.flatten(1)


def patch_means(video, grid):
    return torch.nn.functional.adaptive_avg_pool2d(video.float().mean(1), grid).flatten(1)


def test_the_mask_is_cropped_and_flipped_with_the_picture():
    video, mask = marked_corner()
    masks = set()
    for seed in range(8):
        seed_everything(seed)
        a, m = VideoAugment(colour=0.0)(video, mask)
        seed_everything(seed)
        b, n = VideoAugment(colour=0.0)(video, mask)
        assert torch.equal(a, b) and torch.equal(m, n) and type(m) is torch.Tensor and m.dtype == torch.bool
        assert torch.equal(patch_means(a, 4) > 127.5, m)
        masks.add(tuple(m[0].tolist()))
    assert len(masks) > 1


# clips

class Clips(torch.utils.data.Dataset):
    "Three clips that are all the same: what differs comes from the draw."
    def __len__(self): return 3

    def __getitem__(self, i):
        video, mask = marked_corner()
        return dict(audio=voice(4_000), video=video, roi_mask=mask, label=2, clip=f"clip-{i}")


def differ(a, b): return not (torch.equal(a["audio"], b["audio"]) and torch.equal(a["video"], b["video"]))


def test_the_draw_depends_on_seed_epoch_and_clip_alone():
    torch.manual_seed(0)
    clips = AugmentedClips(Clips(), BOTH, seed=0)
    before = torch.get_rng_state()
    first = clips[1, 4]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert not differ(clips[1, 4], first)
    others = (clips[1, 5], clips[2, 4], AugmentedClips(Clips(), BOTH, seed=1)[1, 4])
    assert all(differ(first, other) for other in others)


def test_without_augmentation_the_clips_are_those_of_the_dataset():
    clips = AugmentedClips(Clips(), [], seed=0)
    assert len(clips) == 3 and not differ(clips[1, 4], Clips()[1])


@pytest.mark.parametrize("augment", [["audio"], ["video"]])
def test_one_modality_changes_and_the_other_stays(augment):
    [changes] = augment
    clips = AugmentedClips(Clips(), augment, seed=0)
    drawn = [clips[0, epoch] for epoch in range(8)]
    before = Clips()[0]
    parts = dict(audio=["audio"], video=["video", "roi_mask"])
    for name in parts.pop(changes): assert not all(torch.equal(item[name], before[name]) for item in drawn)
    [kept] = parts.values()
    for name in kept: assert all(torch.equal(item[name], before[name]) for item in drawn)


def test_the_pictures_that_are_drawn_do_not_depend_on_their_neighbours_in_the_list():
    one, two = (AugmentedClips(Clips(), names, seed=0)[1, 4] for names in (BOTH, BOTH[::-1]))
    assert not differ(one, two)


class Tokens(Clips):
    "The same clips from the cache: tokens in place of pictures."
    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {k: v for k, v in item.items() if k != "video"} | dict(video_tokens=torch.ones(2, 16, 5))


def test_the_sound_changes_while_the_pictures_come_as_tokens():
    clips = AugmentedClips(Tokens(), ["audio"], seed=0)
    for epoch in range(4):
        item = clips[1, epoch]
        assert torch.equal(item["video_tokens"], torch.ones(2, 16, 5))
        assert torch.equal(item["roi_mask"], marked_corner()[1])
    assert not all(torch.equal(clips[1, epoch]["audio"], Clips()[1]["audio"]) for epoch in range(4))


@pytest.mark.parametrize("augment", [["video"], BOTH])
def test_cached_pictures_cannot_be_augmented(augment):
    with pytest.raises(MmferError, match="clip-1 comes as cached tokens.*augment the sound alone"):
        AugmentedClips(Tokens(), augment, seed=0)[1, 0]


@pytest.mark.parametrize("augment", [["sound"], ["audio", "pictures"], "audio"])
def test_an_unknown_modality_is_refused_at_once(augment):
    with pytest.raises(MmferError, match="unknown: choose one of audio, video"):
        AugmentedClips(Clips(), augment, seed=0)


def test_a_clip_is_changed_in_all_its_parts_and_the_original_stays():
    item = Clips()[0]
    with seeded(3): changed = augment_clip(item, BOTH)
    assert not differ(item, Clips()[0]) and not torch.equal(changed["video"], item["video"])
    assert (patch_means(changed["video"], 4) > 100).eq(changed["roi_mask"]).float().mean() > 0.8
    assert changed["label"] == 2 and changed["clip"] == "clip-0"


def test_the_sound_of_most_clips_changes():
    item = Clips()[0]
    unchanged = 0
    for seed in range(24):
        with seeded(seed): unchanged += torch.equal(augment_clip(item, BOTH)["audio"], item["audio"])
    assert 0 < unchanged < 12  # each of three changes has a probability of one half


@pytest.mark.parametrize("gone", ["audio", "video"])
def test_a_clip_without_sound_or_pictures_stays_without(gone):
    item = {k: v for k, v in Clips()[0].items() if k not in (gone, "roi_mask")}
    with seeded(0): assert set(augment_clip(item, BOTH)) == set(item)


@given(st.lists(st.tuples(*[st.integers(0, 9999)] * 3), min_size=2, max_size=20, unique=True))
def test_no_two_clips_share_a_seed(places):
    assert len({clip_seed(*place) for place in places}) == len(places)


# mixing

def batch(audio=(6, 4, 0), video=(2, 0, 2), garbage=0.0):
    torch.manual_seed(0)
    sound = torch.stack([torch.cat([torch.rand(n), torch.full((6 - n,), garbage)]) for n in audio])
    pictures = torch.randint(256, (len(video), 2, 3, 16, 16), dtype=torch.uint8)
    return dict(audio=sound, audio_lengths=torch.tensor(audio), video=pictures,
                video_lengths=torch.tensor(video), labels=LABELS, clip=["a", "b", "c"])


def partners(before, alpha, generator):
    "Whom `draw_mix` draws, but the clip itself where the two have neither sound nor pictures in common."
    drawn = draw_mix(len(before["labels"]), alpha, generator)[1].tolist()
    lengths = [before[key].tolist() for key in ("audio_lengths", "video_lengths")]
    return [j if any(n[i] and n[j] for n in lengths) else i for i, j in enumerate(drawn)]


def real(mixed): return [row[:n] for row, n in zip(mixed["audio"], mixed["audio_lengths"])]


LABELS = torch.tensor([0, 3, 3])


@pytest.mark.parametrize("mix", (mixup, cutmix))
@settings(deadline=None)
@given(seed=st.integers(0, 9999), alpha=st.sampled_from((0.2, 1.0, 5.0)), n_classes=st.integers(4, 9))
def test_mixing_keeps_label_mass_lengths_and_types(mix, seed, alpha, n_classes):
    def draw(): return torch.Generator().manual_seed(seed)
    before = batch()
    mixed, soft = mix(before, LABELS, n_classes, alpha, draw())
    partner = partners(before, alpha, draw())
    assert soft.shape == (3, n_classes)
    assert_close(soft.sum(1), torch.ones(3))
    assert (soft >= 0).all() and (soft[:, [k for k in range(n_classes) if k not in (0, 3)]] == 0).all()
    for key in ("audio_lengths", "video_lengths"):
        for i, j in enumerate(partner): assert mixed[key][i] == (before[key][i] if before[key][j] else 0)
    assert mixed["video"].dtype == torch.uint8 and before["video"].equal(batch()["video"])
    assert mixed["clip"] == before["clip"]


@pytest.mark.parametrize("mix", (mixup, cutmix))
@settings(deadline=None)
@given(has=st.tuples(*[st.sampled_from(((6, 2), (4, 0), (0, 2)))] * 3), seed=st.integers(0, 9999))
def test_no_mixed_clip_loses_all_modalities(mix, has, seed):
    "Clips with both, with sound alone and with pictures alone."
    audio, video = zip(*has)
    before = batch(audio, video)
    mixed, soft = mix(before, torch.arange(3), 3, 1.0, torch.Generator().manual_seed(seed))
    assert ((mixed["audio_lengths"] > 0) | (mixed["video_lengths"] > 0)).all()
    for i, j in enumerate(partners(before, 1.0, torch.Generator().manual_seed(seed))):
        if i != j: continue
        assert soft[i].argmax() == i and soft[i].max().item() == pytest.approx(1)
        assert torch.equal(mixed["video"][i, :video[i]], before["video"][i, :video[i]])
        assert_close(real(mixed)[i], real(before)[i])


@settings(deadline=None)
@given(seed=st.integers(0, 9999))
def test_mixup_takes_one_share_per_clip_for_sound_pictures_and_label(seed):
    before = batch(audio=(6, 6, 6), video=(2, 2, 2))
    mixed, soft = mixup(before, torch.arange(3), 3, 1.0, torch.Generator().manual_seed(seed))
    partner = draw_mix(3, 1.0, torch.Generator().manual_seed(seed))[1].tolist()
    for i, j in enumerate(partner):
        share = soft[i, i].item()
        if i != j: assert soft[i, j].item() == pytest.approx(1 - share, abs=1e-6)
        for key, error in (("audio", 1e-5), ("video", 0.51)):
            wanted = share * before[key][i].float() + (1 - share) * before[key][j].float()
            assert_close(mixed[key][i].float(), wanted, rtol=0, atol=error)


def test_the_clips_of_a_batch_have_different_shares_from_the_beta_distribution():
    shares, partner = draw_mix(4000, 0.2, torch.Generator().manual_seed(0))
    assert sorted(partner.tolist()) == list(range(4000))
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    variance = 1 / (4 * (2 * 0.2 + 1))  # of Beta(0.2, 0.2)
    assert shares.var().item() == pytest.approx(variance, rel=0.05)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_blend_takes_a_number_or_one_share_per_clip(n, width, seed):
    rng = torch.Generator().manual_seed(seed)
    x, other = torch.rand(2, n, width, 2, generator=rng)
    shares = torch.rand(n, generator=rng)
    wanted = torch.stack([s * a + (1 - s) * b for s, a, b in zip(shares, x, other)])
    assert_close(blend(x, other, shares), wanted)
    assert_close(blend(x, other, 0.25), blend(x, other, torch.full((n,), 0.25)))
    assert blend(x.half(), other.half(), shares).dtype == torch.float16


@pytest.mark.parametrize("mix", (mixup, cutmix))
def test_garbage_behind_the_length_changes_nothing(mix):
    for seed in range(5):
        rng = [torch.Generator().manual_seed(seed) for _ in range(2)]
        clean, _ = mix(batch(garbage=0.0), LABELS, 8, 1.0, rng[0])
        dirty, _ = mix(batch(garbage=1e9), LABELS, 8, 1.0, rng[1])
        for a, b in zip(real(clean), real(dirty)): assert torch.equal(a, b)


@pytest.mark.parametrize("mix", (mixup, cutmix))
def test_the_same_generator_mixes_the_same_way(mix):
    runs = [mix(batch(), LABELS, 8, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert runs[0][1].equal(runs[1][1]) and runs[0][0]["video"].equal(runs[1][0]["video"])
    assert not runs[0][1].equal(runs[2][1])


@pytest.mark.parametrize("seed", range(20))
def test_the_label_tells_the_area_that_was_pasted(seed):
    pictures = torch.stack([torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)])
    sound = torch.stack([torch.zeros(8), torch.ones(8)])
    lengths = dict(audio_lengths=torch.tensor([8, 8]), video_lengths=torch.tensor([2, 2]))
    plain = lengths | dict(audio=sound, video=pictures)
    mixed, soft = cutmix(plain, torch.tensor([0, 1]), 2, 1.0, torch.Generator().manual_seed(seed))
    assert_close(soft[:, 1], mixed["video"].mean((1, 2, 3, 4)))
    assert_close(soft[:, 1], mixed["audio"].mean(1))
    assert torch.equal(mixed["video"][:, 0], mixed["video"][:, 1])  # the same box in every picture


def masked(seed):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 2, 16, generator=rng) < 0.4
    return batch(video=(2, 2, 2)) | dict(roi_mask=mask)


@given(st.integers(0, 999), st.booleans())
@settings(deadline=None)
def test_mixup_marks_each_face_in_its_share(seed, cached):
    "Neither the mask of one clip alone nor the union of both."
    before = masked(seed)
    if cached: before |= dict(video=None, video_tokens=before["video"].flatten(3).half())
    mixed, soft = mixup(before, torch.arange(3), 3, 1.0, torch.Generator().manual_seed(seed))
    partner = draw_mix(3, 1.0, torch.Generator().manual_seed(seed))[1].tolist()
    for i, j in enumerate(partner):
        share = soft[i, i].item()
        own, other = (before["roi_mask"][k].float() for k in (i, j))
        assert_close(mixed["roi_mask"][i], share * own + (1 - share) * other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_with_a_mixed_mask_each_face_is_preferred_in_its_share():
    "Seen through the visual branch: same pictures, so the scores differ by the mask alone."
    seed_everything(0)
    branch = VisualBranch.from_preset("tiny").eval()
    tokens = torch.randn(1, 2, 64, 64).expand(2, -1, -1, -1)
    mask = torch.rand(2, 2, 64) < 0.4
    two = dict(audio=None, audio_lengths=torch.zeros(2).long(), video=None, video_tokens=tokens,
               video_lengths=torch.tensor([2, 2]), roi_mask=mask)
    mixed, soft = mixup(two, torch.tensor([0, 1]), 2, 1.0, torch.Generator().manual_seed(3))
    assert 0.1 < soft.min() < 0.5
    plain, out = (branch(tokens=tokens, roi_mask=m).scores for m in (mask, mixed["roi_mask"]))
    assert_close(out, torch.einsum("ij,jtn->itn", soft, plain))


@given(st.integers(0, 999))
@settings(deadline=None)
def test_cutmix_cuts_the_mask_where_it_cuts_the_picture(seed):
    "Clip 0 is black and unmarked, clip 1 white and marked: white patches are marked, black ones are not."
    pictures = torch.stack([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])
    mask = torch.stack([torch.zeros(1, 16), torch.ones(1, 16)]).bool()
    two = dict(audio=None, video=pictures, video_lengths=torch.tensor([1, 1]), roi_mask=mask)
    mixed, _ = cutmix(two, torch.tensor([0, 1]), 2, 1.0, torch.Generator().manual_seed(seed))
    white = torch.nn.functional.adaptive_avg_pool2d(mixed["video"][:, :, 0], 4).flatten(2)
    whole = (white == 0) | (white == 1)
    assert torch.equal(mixed["roi_mask"][whole], white[whole] == 1)


def test_a_batch_without_masks_stays_without():
    for mix in (mixup, cutmix): assert "roi_mask" not in mix(batch(), LABELS, 4)[0]


def test_soft_labels_can_be_mixed_again():
    _, once = mixup(batch(), LABELS, 8, 1.0, torch.Generator().manual_seed(1))
    _, twice = mixup(batch(), once, 8, 1.0, torch.Generator().manual_seed(1))
    assert_close(twice.sum(1), torch.ones(3))
    assert torch.equal(soften(once, 8), once)


def test_cutmix_needs_pictures():
    with pytest.raises(MmferError, match="use mixup"): cutmix(batch() | {"video": None}, LABELS, 8)
    mixed, _ = mixup(batch() | {"video": None}, LABELS, 8)
    assert mixed["video"] is None


def test_tokens_are_blended_as_pictures_are():
    pictures = batch(video=(2, 2, 2)) | dict(video=torch.rand(3, 2, 5, 3, 7))
    tokens = pictures | dict(video=None, video_tokens=pictures["video"].flatten(3))
    results = []
    for one in (pictures, tokens):
        torch.manual_seed(0)
        results.append(mix_batch(one, 0.4, 8))
    (a, labels), (b, others) = results
    assert torch.equal(labels, others) and torch.equal(a["audio"], b["audio"]) and b["video"] is None
    assert torch.equal(a["video"].flatten(3), b["video_tokens"])
    assert not torch.equal(a["video"], pictures["video"])


def test_beyond_the_partners_last_picture_nothing_of_it_is_mixed_in():
    before = batch(audio=(6, 6, 6), video=(2, 1, 2)) | dict(roi_mask=torch.ones(3, 2, 4, dtype=torch.bool))
    for seed in range(10):
        draw = [torch.Generator().manual_seed(seed) for _ in range(2)]
        mixed, soft = mixup(before, torch.arange(3), 3, 1.0, draw[0])
        for i, j in enumerate(draw_mix(3, 1.0, draw[1])[1].tolist()):
            assert mixed["video_lengths"][i] == before["video_lengths"][i]
            if j != 1 or i == 1: continue
            assert_close(mixed["roi_mask"][i, 1], soft[i, i].expand(4))
            wanted = soft[i, i] * before["video"][i, 1].float()
            assert_close(mixed["video"][i, 1].float(), wanted, rtol=0, atol=0.51)


@pytest.mark.parametrize("key", ["video", "video_tokens"])
def test_a_mixture_with_a_clip_without_pictures_has_none(key):
    "The clip without pictures has no face, so it takes nothing from the masks of the others."
    pictures = torch.rand(3, 2, 16, 5).half() if key == "video_tokens" else batch()["video"]
    before = batch(audio=(6, 4, 5), video=(2, 0, 2)) | {"video": None, key: pictures}
    before["roi_mask"] = torch.ones(3, 2, 16, dtype=torch.bool)
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        partner = draw_mix(3, 1.0, rng)[1].tolist()
        mixed, soft = mixup(before, LABELS, 4, 1.0, torch.Generator().manual_seed(seed))
        has = [i != 1 and j != 1 for i, j in enumerate(partner)]
        assert (mixed["video_lengths"] > 0).tolist() == has
        assert mixed[key].dtype == pictures.dtype and mixed[key].isfinite().all()
        for i in range(3):
            if has[i]: assert_close(mixed["roi_mask"][i], torch.ones(2, 16))


def test_without_alpha_a_batch_is_left_alone():
    before = batch()
    mixed, labels = mix_batch(before, 0.0, 8)
    assert mixed is before and labels is before["labels"]
    assert mix_batch(before, 5.0, 8)[1].shape == (3, 8)
