"""What would interrupt the audio chapter: parity with the reference, leaks through padding, lengths, gradients, foreign checkpoints."""
import copy
import io
import os
import tarfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ParakeetFeatureExtractor

from mmfer.audio import (AUDIO_PRESETS, AudioAugment, AudioBranch, AudioConfig, LogMel, SegmentPool, add_noise, build_encoder, load_nemo,
                         pitch_shift, time_stretch)
from mmfer.core import MmferError, count_parameters, seed_everything

RATE = 16_000
slow_ok = settings(max_examples=15, deadline=None)


def voice(samples, seed=0):
    g, t = torch.Generator().manual_seed(seed), torch.arange(samples) / RATE
    pitch = 100 + 150 * torch.rand(1, generator=g) * (1 + 0.2 * torch.sin(5 * t))
    phase = 2 * torch.pi * pitch.cumsum(0) / RATE
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 15))
    return 0.1 * buzz * torch.sin(9 * t + 1).square() + 0.01 * torch.randn(samples, generator=g)


def reference(sound):
    return ParakeetFeatureExtractor()(sound.numpy(), sampling_rate=RATE, return_tensors="pt")


def awake(model):
    "Queries start at zero and norms at one; random ones let every leak show."
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("query"): p.data = 0.05 * torch.randn(p.shape, generator=g)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm1d): m.running_mean.normal_(0, 0.1, generator=g); m.running_var.uniform_(0.5, 2, generator=g)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def branch():
    seed_everything(0)
    return awake(AudioBranch.from_preset("tiny"))


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
    want = ParakeetFeatureExtractor()([s.numpy() for s in sounds], sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(mel, want.input_features.mT, atol=1e-4, rtol=0)


def test_log_mel_equals_the_reference_on_real_speech(shared_data):
    from mmfer.media import read_clip
    clips = sorted((shared_data / "ravdess_speech").rglob("*.*"))[::150]
    assert clips
    for path in clips:
        sound = torch.from_numpy(np.asarray(read_clip(path).audio))
        mel, _ = LogMel()(sound[None], torch.tensor([len(sound)]))
        torch.testing.assert_close(mel, reference(sound).input_features.mT, atol=1e-4, rtol=0, msg=lambda m: f"{path.name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_outside_does_not_touch_the_front_end(dtype):
    sound, lengths = voice(16_000)[None], torch.tensor([16_000])
    want, _ = LogMel()(sound, lengths)
    with torch.autocast("cpu", dtype=dtype): got, _ = LogMel().to(dtype)(sound, lengths)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_and_finite(branch, dtype):
    sounds, lengths = torch.stack([voice(32_000), voice(32_000, 1), torch.zeros(32_000)]), torch.tensor([32_000, 9_000, 0])
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
    for key in ("features", "logits"): torch.testing.assert_close(a[key][i], b[key][j], atol=1e-5, rtol=0, msg=lambda m: f"{key}: {m}")
    n = int(a.frame_lengths[i])
    assert n == b.frame_lengths[j]
    torch.testing.assert_close(a.frames[i, :n], b.frames[j, :n], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.attention[i, :, :n], b.attention[j, :, :n], atol=1e-5, rtol=0)


@slow_ok
@given(samples=st.integers(1600, 32_000), extra=st.integers(1, 16_000), loud=st.sampled_from([0.01, 1.0, 1e4, float("nan"), float("inf")]))
def test_garbage_after_the_true_length_changes_nothing(branch, samples, extra, loud):
    sound = voice(samples)
    padded = torch.cat([sound, torch.full((extra,), loud)])
    same(branch(sound[None]), branch(padded[None], torch.tensor([samples])))


@slow_ok
@given(lengths=st.lists(st.integers(1600, 32_000), min_size=2, max_size=4), order=st.randoms(use_true_random=False))
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
    b = awake(AudioBranch.from_preset("tiny", pooling=pooling))
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
@given(length=st.integers(1, 60), pad=st.integers(0, 30), kind=st.sampled_from(["attention", "mean", "max"]), segments=st.sampled_from([1, 3, 8]))
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


# A bias before a softmax over keys, or before a BatchNorm, moves all scores or all values alike: its gradient is 0 by nature.
NO_GRADIENT_BY_NATURE = ("self_attn.k_proj.bias", "conv.depthwise_conv.bias")


@pytest.mark.parametrize("lengths", [[32_000, 20_000], [32_000, 0]])
def test_gradients_reach_every_trainable_parameter(lengths):
    seed_everything(0)
    b = AudioBranch.from_preset("tiny", dropout=0.0).train()
    out = b(torch.stack([voice(32_000), voice(32_000, 1)]), torch.tensor(lengths))
    (torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 2])) + out.features.square().mean()).backward()
    for name, p in b.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.endswith(NO_GRADIENT_BY_NATURE): assert p.grad.abs().max() > 1e-8, name


def test_a_batch_without_any_sound_still_has_finite_gradients():
    b = AudioBranch.from_preset("tiny").train()
    b(torch.zeros(2, 0)).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in b.parameters() if p.grad is not None)
    assert all(m.isfinite().all() for m in b.buffers())


def test_random_weights_let_the_sound_through():
    for seed in range(3):
        seed_everything(seed)
        e = build_encoder(AUDIO_PRESETS["lightweight"]).eval().requires_grad_(False)
        mel, _ = LogMel()(voice(RATE)[None], torch.tensor([RATE]))
        assert e.subsampling(mel.mT).std(1).mean() > 1e-3


@pytest.mark.parametrize("preset, millions", [("tiny", 0.225472), ("lightweight", 26.700288), ("full", 108.762112)])
def test_parameters_of_the_presets(preset, millions):
    with torch.device("meta"): b = AudioBranch.from_preset(preset)
    assert count_parameters(b.encoder) == round(millions * 1e6)


def test_spec_augment_only_while_training():
    seed_everything(0)
    plain, masked = (AudioBranch.from_preset("tiny", dropout=0.0, spec_augment=s).eval() for s in (False, True))
    masked.load_state_dict(plain.state_dict())
    sound = voice(RATE)[None]
    assert torch.equal(plain(sound).logits, masked(sound).logits)
    assert not torch.equal(plain.train()(sound).logits, masked.train()(sound).logits)


# --- files ---

def test_saved_and_loaded_is_the_same(branch, tmp_path):
    branch.save_pretrained(tmp_path)
    loaded = AudioBranch.from_pretrained(tmp_path).requires_grad_(False)
    assert loaded.config == branch.config and loaded.weights_from == str(tmp_path) and branch.weights_from == "random"
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
    with pytest.raises(MmferError, match="haeds is unknown"): AudioBranch.from_pretrained(tmp_path)


@pytest.mark.parametrize("audio, lengths", [(torch.zeros(800), None), (torch.zeros(1, 2, 800), None), (torch.zeros(1, 800), torch.tensor([801])),
                                            (torch.zeros(2, 800), torch.tensor([800])), (torch.zeros(1, 800), torch.tensor([-1]))])
def test_wrong_sound_is_refused(branch, audio, lengths):
    with pytest.raises(MmferError, match="sound"): branch(audio, lengths)


# --- .nemo: names and yaml as NeMo writes them, written down here once more so that a wrong map cannot hide ---

D, FFN, C, LAYERS, KERNEL = 64, 256, 32, 2, 9
CONFIG = dict(
    sample_rate=16_000,
    preprocessor=dict(_target_="nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", sample_rate=16_000, normalize="per_feature",
                      window_size=0.025, window_stride=0.01, window="hann", features=80, n_fft=512, log=True, frame_splicing=1, dither=1e-5, pad_to=0),
    encoder=dict(_target_="nemo.collections.asr.modules.ConformerEncoder", feat_in=80, feat_out=-1, n_layers=LAYERS, d_model=D, use_bias=True,
                 subsampling="dw_striding", subsampling_factor=8, subsampling_conv_channels=C, causal_downsampling=False,
                 ff_expansion_factor=4, self_attention_model="rel_pos", n_heads=4, att_context_size=[-1, -1], att_context_style="regular",
                 xscaling=False, untie_biases=True, pos_emb_max_len=5000, conv_kernel_size=KERNEL, conv_norm_type="batch_norm",
                 conv_context_size=None, dropout=0.1, dropout_pre_encoder=0.1, dropout_emb=0.0, dropout_att=0.1),
    decoder=dict(_target_="nemo.collections.asr.modules.RNNTDecoder"))


def nemo_shapes():
    "Every weight of NeMo's ConformerEncoder, by its own name."
    pre = "encoder.pre_encode"
    yield f"{pre}.out.weight", (D, C * 10)
    yield f"{pre}.out.bias", (D,)
    for i, shape in ((0, (C, 1, 3, 3)), (2, (C, 1, 3, 3)), (3, (C, C, 1, 1)), (5, (C, 1, 3, 3)), (6, (C, C, 1, 1))):
        yield f"{pre}.conv.{i}.weight", shape
        yield f"{pre}.conv.{i}.bias", (C,)
    for layer in (f"encoder.layers.{i}" for i in range(LAYERS)):
        for norm in ("feed_forward1", "conv", "self_att", "feed_forward2", "out"):
            for what in ("weight", "bias"): yield f"{layer}.norm_{norm}.{what}", (D,)
        for ff in ("feed_forward1", "feed_forward2"):
            yield from ((f"{layer}.{ff}.linear1.weight", (FFN, D)), (f"{layer}.{ff}.linear1.bias", (FFN,)))
            yield from ((f"{layer}.{ff}.linear2.weight", (D, FFN)), (f"{layer}.{ff}.linear2.bias", (D,)))
        for what in "qkv": yield from ((f"{layer}.self_attn.linear_{what}.weight", (D, D)), (f"{layer}.self_attn.linear_{what}.bias", (D,)))
        yield from ((f"{layer}.self_attn.linear_out.weight", (D, D)), (f"{layer}.self_attn.linear_out.bias", (D,)))
        yield from ((f"{layer}.self_attn.linear_pos.weight", (D, D)), (f"{layer}.self_attn.pos_bias_u", (4, D // 4)), (f"{layer}.self_attn.pos_bias_v", (4, D // 4)))
        yield from ((f"{layer}.conv.pointwise_conv1.weight", (2 * D, D, 1)), (f"{layer}.conv.pointwise_conv1.bias", (2 * D,)))
        yield from ((f"{layer}.conv.depthwise_conv.weight", (D, 1, KERNEL)), (f"{layer}.conv.depthwise_conv.bias", (D,)))
        yield from ((f"{layer}.conv.pointwise_conv2.weight", (D, D, 1)), (f"{layer}.conv.pointwise_conv2.bias", (D,)))
        for what in ("weight", "bias", "running_mean", "running_var"): yield f"{layer}.conv.batch_norm.{what}", (D,)
        yield f"{layer}.conv.batch_norm.num_batches_tracked", ()
    yield from (("preprocessor.featurizer.window", (400,)), ("preprocessor.featurizer.fb", (1, 80, 257)), ("decoder.prediction.embed.weight", (9, 8)),
                ("joint.enc.weight", (8, D)), ("ctc_decoder.decoder_layers.0.weight", (9, D, 1)))


def nemo_weights():
    g = torch.Generator().manual_seed(0)
    make = lambda key, shape: torch.tensor(3) if key.endswith("tracked") else torch.rand(shape, generator=g) * 0.2 + key.endswith("running_var")
    return {key: make(key, shape) for key, shape in nemo_shapes()}


def write_nemo(path, weights, config=CONFIG, extra=()):
    checkpoint = io.BytesIO()
    torch.save(weights, checkpoint)
    files = [("./", None), ("./model_config.yaml", yaml.safe_dump(config).encode()), ("./model_weights.ckpt", checkpoint.getvalue()), *extra]
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.type, member.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(member, io.BytesIO(data or b""))
    return path


def test_nemo_weights_land_in_their_places(tmp_path):
    weights = nemo_weights()
    encoder = load_nemo(write_nemo(tmp_path / "a.nemo", weights))
    assert not encoder.training and not encoder.config.scale_input and encoder.config.layerdrop == 0
    layer = encoder.layers[1]
    pairs = {
        "encoder.pre_encode.conv.6.weight": encoder.subsampling.layers[6].weight, "encoder.pre_encode.out.bias": encoder.subsampling.linear.bias,
        "encoder.layers.1.self_attn.linear_q.weight": layer.self_attn.q_proj.weight, "encoder.layers.1.self_attn.linear_k.bias": layer.self_attn.k_proj.bias,
        "encoder.layers.1.self_attn.linear_v.weight": layer.self_attn.v_proj.weight, "encoder.layers.1.self_attn.linear_out.bias": layer.self_attn.o_proj.bias,
        "encoder.layers.1.self_attn.linear_pos.weight": layer.self_attn.relative_k_proj.weight, "encoder.layers.1.self_attn.pos_bias_u": layer.self_attn.bias_u,
        "encoder.layers.1.self_attn.pos_bias_v": layer.self_attn.bias_v, "encoder.layers.1.conv.batch_norm.running_var": layer.conv.norm.running_var,
        "encoder.layers.1.feed_forward2.linear1.weight": layer.feed_forward2.linear1.weight, "encoder.layers.1.norm_self_att.weight": layer.norm_self_att.weight,
    }
    for key, got in pairs.items(): assert torch.equal(got, weights[key]), key
    assert count_parameters(encoder) == sum(v.numel() for k, v in weights.items() if k.startswith("encoder.") and not k.endswith(("mean", "var", "tracked")))


def test_a_branch_from_nemo_says_so_and_survives_saving(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["encoder"]["xscaling"] = True
    b = AudioBranch.from_nemo(write_nemo(tmp_path / "b.nemo", nemo_weights(), config), pooling="mean").eval()
    assert "b.nemo" in b.weights_from and b.config == AudioConfig(64, 2, 4, 256, 32, scale_input=True, pooling="mean")
    b.save_pretrained(tmp_path / "saved")
    loaded = AudioBranch.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(voice(RATE)[None]).logits, b(voice(RATE)[None]).logits)


class Code:
    def __reduce__(self): return os.mkdir, ("should-never-exist",)


def missing(weights): del weights["encoder.layers.1.conv.batch_norm.running_mean"]
def unknown(weights): weights["encoder.layers.1.conv.gate.weight"] = torch.zeros(1)
def misshapen(weights): weights["encoder.layers.0.feed_forward1.linear1.weight"] = torch.zeros(D, FFN)
def with_code(weights): weights["encoder.x"] = Code()


@pytest.mark.parametrize("alter, told", [
    (missing, "missing: layers.1.conv.norm.running_mean"), (unknown, "unknown: layers.1.conv.gate.weight"),
    (misshapen, r"wrong shape: layers.0.feed_forward1.linear1.weight \[64, 256\] for \[256, 64\]"), (with_code, "carries code")])
def test_altered_weights_are_refused_by_name(tmp_path, monkeypatch, alter, told):
    monkeypatch.chdir(tmp_path)
    weights = nemo_weights()
    alter(weights)
    with pytest.raises(MmferError, match=told): load_nemo(write_nemo(tmp_path / "x.nemo", weights))
    assert [p.name for p in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py"])
def test_a_tar_that_leads_outside_is_refused(tmp_path, name):
    with pytest.raises(MmferError, match="unsafe name"): load_nemo(write_nemo(tmp_path / "x.nemo", nemo_weights(), extra=[(name, b"x")]))


def test_a_link_in_the_tar_is_refused(tmp_path):
    path = tmp_path / "x.nemo"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(MmferError, match="unsafe name"): load_nemo(path)


@pytest.mark.parametrize("data, told", [(b"no tar at all", "not a whole tar"), (b"", "not a whole tar")])
def test_what_is_no_tar_is_refused(tmp_path, data, told):
    (tmp_path / "x.nemo").write_bytes(data)
    with pytest.raises(MmferError, match=told): load_nemo(tmp_path / "x.nemo")


def test_a_cut_file_and_an_absent_file_are_refused(tmp_path):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights())
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(MmferError, match="not a whole tar|broken"): load_nemo(path)
    with pytest.raises(MmferError, match="not there"): load_nemo(tmp_path / "y.nemo")


@pytest.mark.parametrize("part, key, value", [("encoder", "subsampling_factor", 4), ("encoder", "self_attention_model", "rel_pos_local_attn"),
                                              ("encoder", "conv_norm_type", "layer_norm"), ("preprocessor", "features", 128), ("encoder", "d_model", "large")])
def test_another_architecture_is_refused_by_its_setting(tmp_path, part, key, value):
    config = copy.deepcopy(CONFIG)
    config[part][key] = value
    with pytest.raises(MmferError, match=key): load_nemo(write_nemo(tmp_path / "x.nemo", nemo_weights(), config))


@pytest.mark.parametrize("config", [None, [1], {"encoder": 3}, {"encoder": {}, "preprocessor": {}}, {"encoder": 3, "preprocessor": 4}])
def test_a_config_without_an_encoder_is_refused(tmp_path, config):
    with pytest.raises(MmferError, match="describes no encoder"): load_nemo(write_nemo(tmp_path / "x.nemo", nemo_weights(), config))


# --- augmentation ---

@slow_ok
@given(samples=st.integers(1600, 32_000), seed=st.integers(0, 100))
def test_augmentation_is_seeded_finite_and_keeps_the_length_within_its_range(samples, seed):
    sound = voice(samples)
    a, b = (AudioAugment(p=1.0)(sound, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and a.dtype == torch.float32
    assert samples / 1.1 - 1 <= len(a) <= samples / 0.9 + 1


@pytest.mark.parametrize("semitones", [-4.0, -0.3, 0.0, 1.7, 12.0])
def test_pitch_moves_and_length_stays(semitones):
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(RATE) / RATE)
    shifted = pitch_shift(tone, semitones)
    assert len(shifted) == RATE
    want = 440 * 2 ** (semitones / 12)
    assert abs(torch.fft.rfft(shifted).abs().argmax().item() - want) < 0.01 * want


@pytest.mark.parametrize("rate", [0.8, 1.0, 1.25])
def test_stretch_changes_the_length_and_keeps_the_pitch(rate):
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(RATE) / RATE)
    out = time_stretch(tone, rate)
    assert len(out) == round(RATE / rate)
    assert abs(torch.fft.rfft(out).abs().argmax().item() * RATE / len(out) - 440) < 3


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_noise_has_the_strength_asked_for(snr):
    sound = voice(RATE)
    noise = add_noise(sound, snr) - sound
    assert abs(10 * (sound.square().sum() / noise.square().sum()).log10() - snr) < 0.01
