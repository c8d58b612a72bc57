"""The audio branch: parity with the reference, leaks through padding, lengths, gradients, saving."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ParakeetFeatureExtractor

from mmfer.audio import AUDIO_PRESETS, AudioBranch, AudioConfig, LogMel, SegmentPool, build_encoder
from mmfer.core import MmferError, count_parameters, first_line, seed_everything
from mmfer.visual import enable_gradient_checkpointing

RATE = 16_000
slow_ok = settings(max_examples=15, deadline=None)


def voice(samples, seed=0):
    g, t = torch.Generator().manual_seed(seed), torch.arange(samples) / RATE
    pitch = 100 + 150 * torch.rand(1, generator=g) * (1 + 0.2 * torch.sin(5 * t))
    phase = 2 * torch.pi * pitch.cumsum(0) / RATE
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 15))
    return 0.1 * buzz * torch.sin(9 * t + 1).square() + 0.01 * torch.randn(samples, generator=g)


def extractor():
    "The reference, where this version of transformers can build it: before 5.23 it needs librosa."
    try: return ParakeetFeatureExtractor()
    except ImportError as e: pytest.skip(f"the reference front end cannot be built ({first_line(e)})")


def reference(sound):
    return extractor()(sound.numpy(), sampling_rate=RATE, return_tensors="pt")


def tiny(**changes):
    return AudioBranch.from_preset("tiny", **dict(n_emotions=5) | changes)


def awake(model):
    "Queries start at zero and norms at one; random ones let every leak show."
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("query"): p.data = 0.05 * torch.randn(p.shape, generator=g)
    for m in model.modules():
        if not isinstance(m, torch.nn.BatchNorm1d): continue
        m.running_mean.normal_(0, 0.1, generator=g)
        m.running_var.uniform_(0.5, 2, generator=g)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def branch():
    seed_everything(0)
    return awake(tiny())


# --- front end ---

@pytest.mark.parametrize("samples", [320, 1600, 16_000, 37_523, 48_000, 160_000])
def test_log_mel_equals_the_reference(samples):
    sound = voice(samples)
    mel, lengths = LogMel()(sound[None], torch.tensor([samples]))
    want = reference(sound)
    assert mel.shape == (1, 80, 1 + samples // 160)
    assert lengths.tolist() == want.attention_mask.sum(1).tolist()
    torch.testing.assert_close(mel, want.input_features.mT, atol=1e-4, rtol=0)


def test_log_mel_equals_the_reference_in_a_padded_batch():
    sounds = [voice(n, seed=n) for n in (48_000, 31_999, 5_000)]
    batch = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)
    mel, _ = LogMel()(batch, torch.tensor([len(s) for s in sounds]))
    want = extractor()([s.numpy() for s in sounds], sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(mel, want.input_features.mT, atol=1e-4, rtol=0)


def test_log_mel_equals_the_reference_on_real_speech(shared_data):
    from mmfer.media import read_clip
    clips = sorted((shared_data / "ravdess_speech").rglob("*.*"))[::150]
    assert clips
    for path in clips:
        sound = torch.from_numpy(np.asarray(read_clip(path).audio))
        mel, _ = LogMel()(sound[None], torch.tensor([len(sound)]))
        want = reference(sound).input_features.mT
        torch.testing.assert_close(mel, want, atol=1e-4, rtol=0, msg=lambda m: f"{path.name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_outside_does_not_touch_the_front_end(dtype):
    sound, lengths = voice(16_000)[None], torch.tensor([16_000])
    want, _ = LogMel()(sound, lengths)
    with torch.autocast("cpu", dtype=dtype): got, _ = LogMel().to(dtype)(sound, lengths)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_and_finite(branch, dtype):
    sounds = torch.stack([voice(32_000), voice(32_000, 1), torch.zeros(32_000)])
    lengths = torch.tensor([32_000, 9_000, 0])
    want = branch(sounds, lengths)
    with torch.autocast("cpu", dtype=dtype): got = branch(sounds, lengths)
    assert got.features.isfinite().all()
    torch.testing.assert_close(got.logits.float()[:2], want.logits[:2], atol=0.05, rtol=0)


@pytest.mark.parametrize("level", [0.0, 1e-8, 0.5])
def test_silence_and_constants_are_finite(branch, level):
    out = branch(torch.full((2, 16_000), level))
    assert all(v.isfinite().all() for v in (out.features, out.logits, out.frames))


def test_silence_is_exactly_zero():
    assert LogMel()(torch.zeros(1, 8_000), torch.tensor([8_000]))[0].abs().max() == 0


# --- no leak: the answer for a clip depends on that clip alone ---

def same(a, b, i=0, j=0):
    for key in ("features", "logits"):
        torch.testing.assert_close(a[key][i], b[key][j], atol=1e-5, rtol=0, msg=lambda m: f"{key}: {m}")
    n = int(a.frame_lengths[i])
    assert n == b.frame_lengths[j]
    torch.testing.assert_close(a.frames[i, :n], b.frames[j, :n], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.attention[i, :, :n], b.attention[j, :, :n], atol=1e-5, rtol=0)


@slow_ok
@given(
    samples=st.integers(1600, 32_000), extra=st.integers(1, 16_000),
    loud=st.sampled_from([0.01, 1.0, 1e4, float("nan"), float("inf")]))
def test_garbage_after_the_true_length_changes_nothing(branch, samples, extra, loud):
    sound = voice(samples)
    padded = torch.cat([sound, torch.full((extra,), loud)])
    same(branch(sound[None]), branch(padded[None], torch.tensor([samples])))


@slow_ok
@given(
    lengths=st.lists(st.integers(1600, 32_000), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False))
def test_alone_in_a_batch_and_in_any_order(branch, lengths, order):
    sounds = [voice(n, seed=i) for i, n in enumerate(lengths)]
    rows = list(range(len(lengths)))
    order.shuffle(rows)
    batch = torch.nn.utils.rnn.pad_sequence([sounds[r] for r in rows], batch_first=True)
    out = branch(batch, torch.tensor([lengths[r] for r in rows]))
    for place, r in enumerate(rows): same(branch(sounds[r][None]), out, 0, place)


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_a_clip_without_sound_does_not_disturb_its_neighbour(pooling):
    seed_everything(0)
    b = awake(tiny(pooling=pooling))
    sound = voice(20_000)
    out = b(torch.stack([sound, torch.full_like(sound, 7.0)]), torch.tensor([20_000, 0]))
    same(b(sound[None]), out)
    assert out.present.tolist() == [True, False] and out.frame_lengths[1] == 0
    assert out.features.isfinite().all() and out.logits.isfinite().all()


def test_padded_frames_are_zero_and_weigh_nothing(branch):
    out = branch(torch.stack([voice(32_000), voice(32_000, 1)]), torch.tensor([32_000, 9_000]))
    n = int(out.frame_lengths[1])
    assert out.frames[1, n:].abs().max() == 0 and out.attention[1, :, n:].max() == 0
    torch.testing.assert_close(out.attention.sum(-1), torch.ones(2, 8))


@slow_ok
@given(
    length=st.integers(1, 60), pad=st.integers(0, 30), kind=st.sampled_from(["attention", "mean", "max"]),
    segments=st.sampled_from([1, 3, 8]))
def test_segment_pool_equals_a_loop_over_segments(length, pad, kind, segments):
    seed_everything(length)
    pool = awake(SegmentPool(16, segments, kind))
    x = torch.randn(1, length + pad, 16)
    got, weights = pool(x, torch.tensor([length]))
    for k in range(segments):
        part = x[0, k * length // segments : -(-(k + 1) * length // segments)]
        want = dict(mean=part.mean(0), max=part.amax(0)).get(kind)
        if kind == "attention": want = (part @ pool.query[k] * 4).softmax(0) @ part + pool.order[k]
        torch.testing.assert_close(got[0, k], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, segments))


# --- sizes, lengths, gradients ---

@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 3.0, 5.3, 10.0])
def test_from_a_tenth_of_a_second_to_ten(branch, seconds):
    n = round(seconds * RATE)
    out = branch(voice(n)[None])
    assert out.frames.shape == (1, -(-(1 + n // 160) // 8), 64)
    assert out.frame_lengths.item() == -(-(n // 160) // 8)
    assert out.features.isfinite().all()


@pytest.mark.parametrize("samples", [0, 1, 159, 160])
def test_shorter_than_one_column(branch, samples):
    out = branch(torch.ones(2, samples))
    assert out.features.shape == (2, 8, 64) and out.features.isfinite().all() and out.logits.isfinite().all()
    assert out.present.tolist() == [samples > 0] * 2


# A bias before a softmax over keys, or before a BatchNorm, moves all alike: its gradient is 0 by nature.
NO_GRADIENT_BY_NATURE = ("self_attn.k_proj.bias", "conv.depthwise_conv.bias")


@pytest.mark.parametrize("lengths", [[32_000, 20_000], [32_000, 0]])
def test_gradients_reach_every_trainable_parameter(lengths):
    seed_everything(0)
    b = tiny(dropout=0.0).train()
    out = b(torch.stack([voice(32_000), voice(32_000, 1)]), torch.tensor(lengths))
    loss = torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 2])) + out.features.square().mean()
    loss.backward()
    for name, p in b.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.endswith(NO_GRADIENT_BY_NATURE): assert p.grad.abs().max() > 1e-8, name


def test_a_batch_without_any_sound_still_has_finite_gradients():
    b = tiny().train()
    b(torch.zeros(2, 0)).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in b.parameters() if p.grad is not None)
    assert all(m.isfinite().all() for m in b.buffers())


def test_random_weights_let_the_sound_through():
    for seed in range(3):
        seed_everything(seed)
        e = build_encoder(AUDIO_PRESETS["lightweight"]).eval().requires_grad_(False)
        mel, _ = LogMel()(voice(RATE)[None], torch.tensor([RATE]))
        assert e.subsampling(mel.mT).std(1).mean() > 1e-3


@pytest.mark.parametrize("preset, millions", [
    ("tiny", 0.225472), ("lightweight", 26.700288), ("full", 108.762112)])
def test_parameters_of_the_presets(preset, millions):
    with torch.device("meta"): b = AudioBranch.from_preset(preset)
    assert count_parameters(b.encoder) == round(millions * 1e6)


def test_spec_augment_only_while_training():
    seed_everything(0)
    plain = tiny(dropout=0.0, spec_augment=False).eval()
    masked = tiny(dropout=0.0, spec_augment=True).eval()
    masked.load_state_dict(plain.state_dict())
    sound = voice(RATE)[None]
    assert torch.equal(plain(sound).logits, masked(sound).logits)
    assert not torch.equal(plain.train()(sound).logits, masked.train()(sound).logits)


# --- files ---

def test_saved_and_loaded_is_the_same(branch, tmp_path):
    branch.save_pretrained(tmp_path)
    loaded = AudioBranch.from_pretrained(tmp_path).requires_grad_(False)
    assert loaded.config == branch.config
    sound = voice(RATE)[None]
    assert torch.equal(loaded(sound).logits, branch(sound).logits)


def test_loading_never_falls_back_in_silence(branch, tmp_path):
    from safetensors.torch import load_file, save_file
    branch.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["pool.query"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(MmferError, match="pool.query"): AudioBranch.from_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"heads"', '"haeds"'))
    with pytest.raises(MmferError, match="haeds"): AudioBranch.from_pretrained(tmp_path)


@pytest.mark.parametrize("audio, lengths", [
    (torch.zeros(800), None), (torch.zeros(1, 2, 800), None), (torch.zeros(1, 800), torch.tensor([801])),
    (torch.zeros(2, 800), torch.tensor([800])), (torch.zeros(1, 800), torch.tensor([-1]))])
def test_wrong_sound_is_refused(branch, audio, lengths):
    with pytest.raises(MmferError, match="sound"): branch(audio, lengths)


# --- settings

@pytest.mark.parametrize("n", [0, 1, 3, 11])
def test_as_many_logits_as_emotions(n):
    b = tiny(n_emotions=n).eval()
    logits = b(voice(RATE)[None]).logits
    assert logits is None if n == 0 else logits.shape == (1, n)
    assert any(name.startswith("head.") for name, _ in b.named_parameters()) == (n > 0)


def test_the_head_reads_the_segments_it_weighs():
    "A query that fits one segment makes the logits those of that segment alone."
    b = awake(tiny())
    features = torch.randn(2, 8, 64)
    features[:, 3] += 100 * b.head.pool.query[0] / b.head.pool.query[0].norm()
    alone = features[:, 3:4].expand(-1, 8, -1)
    torch.testing.assert_close(b.head(features), b.head(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes, words", [
    (dict(heads=5), "64 cannot be cut into 5 heads"), (dict(conv_kernel=8), "odd"),
    (dict(pooling="median"), "attention, mean"), (dict(layers=0), "layers"),
    (dict(n_emotions=-1), "n_emotions"), (dict(dropout=1.5), "dropout"), (dict(haeds=4), "haeds")])
def test_impossible_settings_are_refused_by_name(changes, words):
    with pytest.raises(MmferError, match=words): AudioBranch.from_preset("tiny", **changes)


def test_an_unknown_preset_is_told_the_known_ones():
    with pytest.raises(MmferError, match="huge.*tiny, lightweight, full"): AudioBranch.from_preset("huge")


def test_changes_leave_the_preset_alone():
    assert tiny(layers=1).config.layers == 1 and AUDIO_PRESETS["tiny"].layers == 2
    plain = dict(d_model=64, layers=1, heads=4, ffn=8, subsampling_channels=8)
    assert AudioBranch(plain).config == AudioConfig(64, 1, 4, 8, 8)


def test_gradient_checkpointing_changes_nothing():
    "Neither gradients nor the averages of batch norm, though every block runs twice."
    states = []
    for change in (lambda branch: branch, enable_gradient_checkpointing):
        seed_everything(0)
        branch = AudioBranch.from_preset("tiny", n_emotions=3, dropout=0.0).train()
        sound = torch.randn(3, 16_000, generator=torch.Generator().manual_seed(1))
        change(branch)(sound).logits.sum().backward()
        gradients = {name: p.grad for name, p in branch.named_parameters() if p.grad is not None}
        states.append((branch.state_dict(), gradients))
    (plain, plain_gradients), (thrifty, thrifty_gradients) = states
    assert plain["encoder.layers.0.conv.norm.num_batches_tracked"] == 1
    for name, value in plain.items(): torch.testing.assert_close(thrifty[name], value, atol=0, rtol=0)
    assert plain_gradients.keys() == thrifty_gradients.keys()
    for name, value in plain_gradients.items(): torch.testing.assert_close(thrifty_gradients[name], value)
