"""Pretrained weights: files in the form of the real ones, what must be refused, and by which name."""
import copy
import io
import json
import os
import tarfile
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig, Lfm2Config, Lfm2ForCausalLM, Lfm2Model, Siglip2VisionConfig, Siglip2VisionModel, SiglipConfig,
    SiglipModel)

from mmfer.audio import AudioBranch, AudioConfig
from mmfer.core import BranchOutput, MmferError, count_parameters, seed_everything
from mmfer.fusion import FUSION_PRESETS, SYSTEMS, FusionConfig, build_fusion
from mmfer.visual import VisualBranch, VisualConfig
from mmfer.weights import (
    LFM2_NOTICE, PRETRAINED, choose_sources, describe_weights, find_weights, fit_sizes, lfm2_sizes,
    load_audio, load_backbone, load_lfm2, load_nemo, load_siglip, load_vision, nemo_sizes, origins_table,
    read_nemo, siglip_sizes)

AUDIO, VISUAL = 12, 20
TINY = FUSION_PRESETS["tiny"]
SMALL = dict(
    d_model=32, layers=2, heads=2, ffn=64, image_size=32, patch_size=8, top_k=5, temporal_layers=2,
    temporal_heads=2)


# --- SigLIP

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
    patch_size=8)
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
    bos_token_id=0, eos_token_id=1)
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def _write(folder, weights, config):
    folder.mkdir(parents=True)
    weights = {k: v.contiguous() for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def whole():
    "Weights and config as google/siglip2-base-patch16-224 has them: both towers in one file."
    seed_everything(1)
    model = SiglipModel(SiglipConfig(vision_config=SIZES, text_config=TEXT))
    weights = model.state_dict()
    assert FC1 in weights and "text_model.head.weight" in weights and "vision_model.head.probe" in weights
    vision = SIZES | {"model_type": "siglip_vision_model"}
    config = dict(architectures=["SiglipModel"], model_type="siglip", vision_config=vision, text_config=TEXT)
    return model, weights, config


@pytest.mark.parametrize("form", ["whole", "vision", "vision with prefix"])
def test_load_a_checkpoint_in_the_real_format(tmp_path, whole, form):
    model, weights, config = whole
    if form != "whole":
        config = SIZES | {"model_type": "siglip_vision_model"}
        weights = {k: v for k, v in weights.items() if k.startswith("vision_model.")}
        if form == "vision": weights = {k.removeprefix("vision_model."): v for k, v in weights.items()}
    branch = load_vision(VisualBranch(VisualConfig(**SMALL)), _write(tmp_path / "w", weights, config))
    frames = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): want, got = model.vision_model(frames), branch.vision(frames)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-6, rtol=0)
    assert got.pooler_output is None and not hasattr(branch.vision, "head")
    assert not any(p.requires_grad for p in branch.vision.parameters())
    assert next(branch.vision.parameters()).dtype == torch.float32


def test_half_precision_on_disk_becomes_float32(tmp_path, whole):
    _, weights, config = whole
    tower = load_siglip(_write(tmp_path / "w", {k: v.half() for k, v in weights.items()}, config))
    assert {p.dtype for p in tower.parameters()} == {torch.float32}


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop(FC1), ["missing", "encoder.layers.0.mlp.fc1.weight"]),
    (lambda w: w.update({FC1: torch.zeros(3, 3)}), ["of another shape", "encoder.layers.0.mlp.fc1.weight"]),
    (lambda w: w.update({"vision_model.extra.weight": torch.zeros(3)}), ["unknown", "extra.weight"]),
])
def test_bad_weights_are_named(tmp_path, whole, change, words):
    _, weights, config = whole
    change(weights)
    with pytest.raises(MmferError) as e: load_siglip(_write(tmp_path / "w", weights, config))
    assert all(w in str(e.value) for w in words) and str(tmp_path) in str(e.value)


def test_the_other_siglip2_is_refused(tmp_path):
    sizes = {k: v for k, v in SIZES.items() if k != "image_size"}
    Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16)).save_pretrained(tmp_path)
    words = "fixed resolution.*embeddings.patch_embedding.weight"
    with pytest.raises(MmferError, match=words): load_siglip(tmp_path)


def test_other_sizes_and_empty_folders_are_refused(tmp_path, whole):
    _, weights, config = whole
    folder = _write(tmp_path / "w", weights, config)
    tiny = VisualBranch.from_preset("tiny")
    before = tiny.vision
    with pytest.raises(MmferError, match="hidden_size 32 instead of 64"): load_vision(tiny, folder)
    assert tiny.vision is before
    (tmp_path / "empty").mkdir()
    with pytest.raises(MmferError, match="config.json"): load_siglip(tmp_path / "empty")


@pytest.mark.parametrize("load", [load_siglip, load_lfm2, lfm2_sizes])
@pytest.mark.parametrize("source", ["{}/absent", "./absent", "some/where/absent", "here/absent"])
def test_a_folder_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path, monkeypatch, load, source):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    source = source.format(tmp_path)
    with pytest.raises(MmferError) as e: load(source)
    assert str(e.value).startswith(f"{source} does not exist: give a hub id or a folder with")
    with pytest.raises(MmferError, match="absent does not exist"): load(tmp_path / "absent")


@pytest.mark.parametrize("load", [load_siglip, load_lfm2])
def test_a_hub_id_is_asked_of_the_hub(tmp_path, monkeypatch, load):
    asked = []

    def ask(source, **_):
        asked.append(source)
        raise OSError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmfer.weights.SiglipVisionConfig.from_pretrained", ask)
    monkeypatch.setattr("mmfer.weights.AutoConfig.from_pretrained", ask)
    with pytest.raises(MmferError, match="cannot be read.*offline"): load("google/siglip2-base-patch16-224")
    assert asked == ["google/siglip2-base-patch16-224"]


def test_a_truncated_file_is_refused(tmp_path, whole):
    _, weights, config = whole
    file = _write(tmp_path / "w", weights, config) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MmferError, match="config.json and model.safetensors"): load_siglip(tmp_path / "w")


@pytest.mark.parametrize("freeze", [True, False])
def test_a_loaded_tower_is_frozen_as_the_config_says(tmp_path, whole, freeze):
    _, weights, config = whole
    branch = VisualBranch(VisualConfig(**SMALL, freeze=freeze, n_emotions=3))
    assert load_vision(branch, _write(tmp_path / "w", weights, config)) is branch
    assert {p.requires_grad for p in branch.vision.parameters()} == {not freeze}
    assert all(p.requires_grad for p in branch.head.parameters())


def test_a_branch_with_loaded_weights_survives_saving(tmp_path, whole):
    _, weights, config = whole
    branch = load_vision(VisualBranch(VisualConfig(**SMALL)), _write(tmp_path / "w", weights, config)).eval()
    branch.save_pretrained(tmp_path / "saved")
    again = VisualBranch.from_pretrained(tmp_path / "saved").eval()
    video = torch.randint(0, 256, (1, 3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(again(video).features, branch(video).features)


# --- .nemo: names and yaml as NeMo writes them, written down here once more so that a wrong map cannot hide

D, FFN, C, LAYERS, KERNEL = 64, 256, 32, 2, 9
CONFIG = dict(
    sample_rate=16_000,
    preprocessor=dict(
        _target_="nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", sample_rate=16_000,
        normalize="per_feature", window_size=0.025, window_stride=0.01, window="hann", features=80, n_fft=512,
        log=True, frame_splicing=1, dither=1e-5, pad_to=0),
    encoder=dict(
        _target_="nemo.collections.asr.modules.ConformerEncoder", feat_in=80, feat_out=-1, n_layers=LAYERS,
        d_model=D, use_bias=True, subsampling="dw_striding", subsampling_factor=8,
        subsampling_conv_channels=C, causal_downsampling=False, ff_expansion_factor=4,
        self_attention_model="rel_pos", n_heads=4,
        att_context_size=[-1, -1], att_context_style="regular", xscaling=False, untie_biases=True,
        pos_emb_max_len=5000, conv_kernel_size=KERNEL, conv_norm_type="batch_norm", conv_context_size=None,
        dropout=0.1, dropout_pre_encoder=0.1, dropout_emb=0.0, dropout_att=0.1),
    decoder=dict(_target_="nemo.collections.asr.modules.RNNTDecoder"))


def nemo_shapes():
    "Every weight of NeMo's ConformerEncoder, by its own name."
    pre = "encoder.pre_encode"
    yield f"{pre}.out.weight", (D, C * 10)
    yield f"{pre}.out.bias", (D,)
    three, one = (C, 1, 3, 3), (C, C, 1, 1)
    for i, shape in ((0, three), (2, three), (3, one), (5, three), (6, one)):
        yield f"{pre}.conv.{i}.weight", shape
        yield f"{pre}.conv.{i}.bias", (C,)
    for layer in (f"encoder.layers.{i}" for i in range(LAYERS)):
        for norm in ("feed_forward1", "conv", "self_att", "feed_forward2", "out"):
            for what in ("weight", "bias"): yield f"{layer}.norm_{norm}.{what}", (D,)
        for ff in ("feed_forward1", "feed_forward2"):
            yield from ((f"{layer}.{ff}.linear1.weight", (FFN, D)), (f"{layer}.{ff}.linear1.bias", (FFN,)))
            yield from ((f"{layer}.{ff}.linear2.weight", (D, FFN)), (f"{layer}.{ff}.linear2.bias", (D,)))
        attention, conv = f"{layer}.self_attn", f"{layer}.conv"
        for what in ("q", "k", "v", "out"):
            yield f"{attention}.linear_{what}.weight", (D, D)
            yield f"{attention}.linear_{what}.bias", (D,)
        yield f"{attention}.linear_pos.weight", (D, D)
        yield from ((f"{attention}.pos_bias_u", (4, D // 4)), (f"{attention}.pos_bias_v", (4, D // 4)))
        yield f"{conv}.pointwise_conv1.weight", (2 * D, D, 1)
        yield f"{conv}.pointwise_conv1.bias", (2 * D,)
        yield from ((f"{conv}.depthwise_conv.weight", (D, 1, KERNEL)), (f"{conv}.depthwise_conv.bias", (D,)))
        yield from ((f"{conv}.pointwise_conv2.weight", (D, D, 1)), (f"{conv}.pointwise_conv2.bias", (D,)))
        for what in ("weight", "bias", "running_mean", "running_var"): yield f"{conv}.batch_norm.{what}", (D,)
        yield f"{conv}.batch_norm.num_batches_tracked", ()
    yield from (("preprocessor.featurizer.window", (400,)), ("preprocessor.featurizer.fb", (1, 80, 257)))
    yield from (("decoder.prediction.embed.weight", (9, 8)), ("joint.enc.weight", (8, D)))
    yield "ctc_decoder.decoder_layers.0.weight", (9, D, 1)


def nemo_weights():
    g = torch.Generator().manual_seed(0)

    def make(key, shape):
        if key.endswith("tracked"): return torch.tensor(3)
        return torch.rand(shape, generator=g) * 0.2 + key.endswith("running_var")

    return {key: make(key, shape) for key, shape in nemo_shapes()}


def write_nemo(path, weights, config=CONFIG, extra=()):
    checkpoint = io.BytesIO()
    torch.save(weights, checkpoint)
    settings = yaml.safe_dump(config).encode()
    files = [("./model_config.yaml", settings), ("./model_weights.ckpt", checkpoint.getvalue())]
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (*files, *extra):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_nemo_weights_land_in_their_places(tmp_path):
    weights = nemo_weights()
    encoder = load_nemo(write_nemo(tmp_path / "a.nemo", weights))
    assert not encoder.training and not encoder.config.scale_input and encoder.config.layerdrop == 0
    own, first = encoder.state_dict(), "encoder.layers.1."
    pairs = {
        "encoder.pre_encode.conv.6.weight": "subsampling.layers.6.weight",
        "encoder.pre_encode.out.bias": "subsampling.linear.bias",
        first + "self_attn.linear_q.weight": "layers.1.self_attn.q_proj.weight",
        first + "self_attn.linear_k.bias": "layers.1.self_attn.k_proj.bias",
        first + "self_attn.linear_v.weight": "layers.1.self_attn.v_proj.weight",
        first + "self_attn.linear_out.bias": "layers.1.self_attn.o_proj.bias",
        first + "self_attn.linear_pos.weight": "layers.1.self_attn.relative_k_proj.weight",
        first + "self_attn.pos_bias_u": "layers.1.self_attn.bias_u",
        first + "self_attn.pos_bias_v": "layers.1.self_attn.bias_v",
        first + "conv.batch_norm.running_var": "layers.1.conv.norm.running_var",
        first + "feed_forward2.linear1.weight": "layers.1.feed_forward2.linear1.weight",
        first + "norm_self_att.weight": "layers.1.norm_self_att.weight",
    }
    for nemo, ours in pairs.items(): assert torch.equal(own[ours], weights[nemo]), nemo
    counted = [k for k in weights if k.startswith("encoder.") and not k.endswith(("mean", "var", "tracked"))]
    assert count_parameters(encoder) == sum(weights[k].numel() for k in counted)


def test_a_branch_from_nemo_survives_saving(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["encoder"]["xscaling"] = True
    path = write_nemo(tmp_path / "b.nemo", nemo_weights(), config)
    assert nemo_sizes(path)["scale_input"]
    branch = AudioBranch(AudioConfig(**nemo_sizes(path), pooling="mean", n_emotions=3))
    assert load_audio(branch, path) is branch
    branch.eval().save_pretrained(tmp_path / "saved")
    loaded = AudioBranch.from_pretrained(tmp_path / "saved").eval()
    sound = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(sound).logits, branch(sound).logits)


def test_the_first_layers_of_a_nemo_file(tmp_path):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights())
    branch = AudioBranch(AudioConfig(**nemo_sizes(path) | dict(layers=1)))
    load_audio(branch, path)
    whole = load_nemo(path).state_dict()
    own = branch.encoder.state_dict()
    assert own.keys() == {key for key in whole if not key.startswith("layers.1.")}
    for key, weight in own.items(): assert torch.equal(weight, whole[key]), key


@pytest.mark.parametrize("change, words", [
    (dict(layers=3), "x.nemo has 2 layers, not 3"), (dict(d_model=32), "d_model is 64 there and 32 here"),
    (dict(bias=False), "bias is True there and False here"),
    (dict(scale_input=True), "scale_input is False there and True here")])
def test_an_encoder_of_other_sizes_is_refused(tmp_path, change, words):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights())
    branch = AudioBranch(AudioConfig(**nemo_sizes(path) | change))
    before = copy.deepcopy(branch.state_dict())
    with pytest.raises(MmferError, match=words): load_audio(branch, path)
    for key, weight in branch.state_dict().items(): assert torch.equal(weight, before[key]), key


class Code:
    def __reduce__(self): return os.mkdir, ("should-never-exist",)


def missing(weights): del weights["encoder.layers.1.conv.batch_norm.running_mean"]
def unknown(weights): weights["encoder.layers.1.conv.gate.weight"] = torch.zeros(1)
def misshapen(weights): weights["encoder.layers.0.feed_forward1.linear1.weight"] = torch.zeros(D, FFN)
def with_code(weights): weights["encoder.x"] = Code()


@pytest.mark.parametrize("alter, told", [
    (missing, "missing: layers.1.conv.norm.running_mean"), (unknown, "unknown: layers.1.conv.gate.weight"),
    (misshapen, "another shape: layers.0.feed_forward1.linear1.weight"), (with_code, "carries code")])
def test_altered_weights_are_refused_by_name(tmp_path, monkeypatch, alter, told):
    monkeypatch.chdir(tmp_path)
    weights = nemo_weights()
    alter(weights)
    with pytest.raises(MmferError, match=told): load_nemo(write_nemo(tmp_path / "x.nemo", weights))
    assert [p.name for p in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py"])
def test_a_tar_that_leads_outside_is_refused(tmp_path, name):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights(), extra=[(name, b"x")])
    with pytest.raises(MmferError, match="unsafe name"): load_nemo(path)


def test_a_link_in_the_tar_is_refused(tmp_path):
    path = tmp_path / "x.nemo"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(MmferError, match="unsafe name"): load_nemo(path)


@pytest.mark.parametrize("data", [b"no tar at all", b""])
def test_what_is_no_tar_is_refused(tmp_path, data):
    (tmp_path / "x.nemo").write_bytes(data)
    words = "x.nemo cannot be read.*whole .nemo file"
    with pytest.raises(MmferError, match=words): load_nemo(tmp_path / "x.nemo")


def test_a_cut_file_and_an_absent_file_are_refused(tmp_path):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights())
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(MmferError, match="whole .nemo file|broken"): load_nemo(path)
    words = "y.nemo cannot be read.*No such file"
    with pytest.raises(MmferError, match=words): load_nemo(tmp_path / "y.nemo")


@pytest.mark.parametrize("lost", ["model_config.yaml", "model_weights.ckpt"])
def test_an_archive_without_a_part_is_refused(tmp_path, lost):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights())
    with tarfile.open(path) as tar, tarfile.open(tmp_path / "y.nemo", "w") as less:
        for member in tar.getmembers():
            if not member.name.endswith(lost): less.addfile(member, tar.extractfile(member))
    with pytest.raises(MmferError, match=f"{lost} is not in the archive"): load_nemo(tmp_path / "y.nemo")


def test_weights_that_are_no_dictionary_are_refused(tmp_path):
    with pytest.raises(MmferError, match="not a dictionary of weights"):
        load_nemo(write_nemo(tmp_path / "x.nemo", [torch.zeros(2)]))


def with_setting(part, **changes):
    config = copy.deepcopy(CONFIG)
    config[part] |= changes
    return config


@pytest.mark.parametrize("part, key, value", [
    ("encoder", "subsampling", "striding"), ("encoder", "subsampling_factor", 4),
    ("encoder", "causal_downsampling", True), ("encoder", "reduction", "pooling"),
    ("encoder", "self_attention_model", "rel_pos_local_attn"),
    ("encoder", "untie_biases", False), ("encoder", "conv_norm_type", "layer_norm"),
    ("encoder", "att_context_size", [70, 1]), ("encoder", "att_context_size", [[70, 13], [-1, -1]]),
    ("encoder", "conv_context_size", "causal"), ("encoder", "conv_context_size", [8, 0]),
    ("encoder", "d_model", "large"), ("encoder", "n_layers", 0), ("encoder", "n_heads", "many"),
    ("preprocessor", "features", 128), ("preprocessor", "sample_rate", 8_000),
    ("preprocessor", "n_fft", 1024), ("preprocessor", "window_size", 0.02),
    ("preprocessor", "window", "hamming"), ("preprocessor", "normalize", "NA"),
    ("preprocessor", "exact_pad", True), ("preprocessor", "mag_power", 1), ("preprocessor", "mel_norm", None),
    ("preprocessor", "lowfreq", 80), ("preprocessor", "highfreq", 7_600), ("preprocessor", "preemph", None),
    ("preprocessor", "log", False), ("preprocessor", "log_zero_guard_type", "clamp"),
    ("preprocessor", "log_zero_guard_value", 1e-6), ("preprocessor", "frame_splicing", 2)])
def test_what_nemo_computes_otherwise_is_refused_by_its_setting(tmp_path, part, key, value):
    ours = dict(n_layers="layers", n_heads="heads").get(key, key)  # a size is named as our config names it
    path = write_nemo(tmp_path / "x.nemo", nemo_weights(), with_setting(part, **{key: value}))
    with pytest.raises(MmferError, match=ours): load_nemo(path)


@pytest.mark.parametrize("part, key", [
    ("encoder", "subsampling"), ("encoder", "subsampling_factor"), ("encoder", "n_layers"),
    ("encoder", "d_model"),
    ("preprocessor", "features"), ("preprocessor", "window_size")])
def test_what_a_file_leaves_unsaid_is_not_guessed(tmp_path, part, key):
    "NeMo's own value for each of these is another than ours."
    config = copy.deepcopy(CONFIG)
    del config[part][key]
    path = write_nemo(tmp_path / "x.nemo", nemo_weights(), config)
    with pytest.raises(MmferError, match=key): load_nemo(path)


@pytest.mark.parametrize("part, changes", [
    ("encoder", dict(att_context_size=[-1, -1])), ("encoder", dict(att_context_size=None)),
    ("encoder", dict(att_context_size=[[-1, -1]])), ("encoder", dict(att_context_size=[[-1, -1], [70, 13]])),
    ("encoder", dict(conv_context_size=[4, 4])), ("encoder", dict(conv_context_size=None)),
    ("encoder", dict(ff_expansion_factor=4.0)), ("encoder", dict(reduction=None)),
    ("preprocessor", dict(exact_pad=False, mag_power=2.0, mel_norm="slaney", preemph=0.97)),
    ("preprocessor", dict(lowfreq=0, highfreq=None)), ("preprocessor", dict(highfreq=8_000, n_fft=None)),
    ("preprocessor", dict(log_zero_guard_type="add", log_zero_guard_value=2**-24))])
def test_other_words_for_the_same_are_accepted(tmp_path, part, changes):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights(), with_setting(part, **changes))
    assert read_nemo(path)[0] == AudioConfig(D, LAYERS, 4, FFN, C)
    load_nemo(path)


def test_what_a_file_may_leave_unsaid(tmp_path):
    config = copy.deepcopy(CONFIG)
    silent = dict(
        encoder="att_context_size conv_context_size untie_biases causal_downsampling use_bias conv_norm_type",
        preprocessor="window normalize window_stride n_fft log frame_splicing")
    for part, keys in silent.items():
        for key in keys.split(): del config[part][key]
    load_nemo(write_nemo(tmp_path / "x.nemo", nemo_weights(), config))


def test_channels_of_minus_one_are_the_width(tmp_path):
    config = with_setting("encoder", subsampling_conv_channels=-1)
    assert read_nemo(write_nemo(tmp_path / "x.nemo", {}, config))[0].subsampling_channels == D


@pytest.mark.parametrize("config", [
    None, [1], {"encoder": 3}, {"encoder": {}, "preprocessor": {}}, {"encoder": 3, "preprocessor": 4}])
def test_a_config_without_an_encoder_is_refused(tmp_path, config):
    path = write_nemo(tmp_path / "x.nemo", nemo_weights(), config)
    with pytest.raises(MmferError, match="describes no encoder|subsampling"): load_nemo(path)


# --- LFM2

def branch(dim):
    return BranchOutput(torch.randn(4, 8, dim))


def fusion_of(**changes):
    return build_fusion(replace(TINY, **changes), AUDIO, VISUAL)


LANGUAGE = dict(
    vocab_size=40, hidden_size=64, intermediate_size=264, block_multiple_of=16, num_hidden_layers=16,
    num_attention_heads=4, num_key_value_heads=2, full_attn_idxs=[2, 5, 8, 10, 12, 14])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A whole language model with random weights, bf16, and a config.json with the keys of the real one."
    folder = tmp_path_factory.mktemp("lfm2")
    torch.manual_seed(0)
    Lfm2ForCausalLM(Lfm2Config(**LANGUAGE)).to(torch.bfloat16).save_pretrained(folder)
    published = dict(
        architectures=["Lfm2ForCausalLM"], model_type="lfm2", vocab_size=40, hidden_size=64, block_dim=64,
        conv_dim=64, conv_dim_out=64, block_ff_dim=264, block_multiple_of=16, block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=True, block_use_swiglu=True, conv_L_cache=3, conv_bias=False,
        num_hidden_layers=16, num_attention_heads=4, num_heads=4, num_key_value_heads=2,
        full_attn_idxs=[2, 5, 8, 10, 12, 14], norm_eps=1e-5, rope_theta=1000000.0, use_cache=True,
        bos_token_id=1, eos_token_id=7, pad_token_id=0,
        max_position_embeddings=128000, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    "Writes a copy of the checkpoint whose weights a function has changed."
    def write(change):
        weights = load_file(checkpoint / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
        return tmp_path
    return write


def test_sizes_of_a_checkpoint(checkpoint):
    assert lfm2_sizes(checkpoint) == dict(d_model=64, heads=4, kv_heads=2, ffn=176)


@pytest.mark.parametrize("layers", [3, 6, 12])
@pytest.mark.filterwarnings("ignore:LFM2 weights")
def test_first_layers_of_a_checkpoint(checkpoint, layers):
    backbone, x = load_lfm2(checkpoint, layers), torch.randn(2, 16, 64)
    reference = Lfm2Model.from_pretrained(checkpoint, num_hidden_layers=layers, dtype=torch.float32)
    want = reference(inputs_embeds=x).last_hidden_state
    assert torch.allclose(backbone(x).last_hidden_state, want, atol=1e-5)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    saved = load_file(checkpoint / "model.safetensors")
    for name, p in backbone.named_parameters(): assert torch.equal(p, saved[f"model.{name}"].float())


def test_licence_is_said_where_weights_are_loaded(checkpoint):
    with pytest.warns(UserWarning, match="LFM Open License"): load_lfm2(checkpoint, 3)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.filterwarnings("ignore:LFM2 weights")
def test_loaded_backbone_can_be_frozen(checkpoint, freeze):
    fusion = build_fusion(FusionConfig(**lfm2_sizes(checkpoint), out_dim=64), AUDIO, VISUAL)
    load_backbone(fusion, checkpoint, freeze)
    fusion(branch(AUDIO), branch(VISUAL)).features.sum().backward()
    assert all((p.grad is None) == freeze for p in fusion.backbone.parameters())
    assert all(p.grad is not None for p in fusion.projections.parameters())


def test_missing_weight_is_named(broken):
    folder = broken(lambda w: w.pop("model.layers.1.conv.in_proj.weight"))
    with pytest.raises(MmferError, match=r"missing: layers\.1\.conv\.in_proj\.weight"): load_lfm2(folder, 3)


def test_weight_of_another_shape_is_named(broken):
    folder = broken(lambda w: w.update({"model.layers.2.self_attn.k_proj.weight": torch.zeros(16, 64)}))
    words = r"of another shape: .*layers\.2\.self_attn\.k_proj\.weight"
    with pytest.raises(MmferError, match=words): load_lfm2(folder, 3)


def test_superfluous_weight_is_named(broken):
    folder = broken(lambda w: w.update({"model.layers.0.conv.conv.bias": torch.zeros(64)}))
    with pytest.raises(MmferError, match=r"unknown: .*layers\.0\.conv\.conv\.bias"): load_lfm2(folder, 3)


def test_a_fault_in_a_later_layer_does_not_matter(broken):
    folder = broken(lambda w: w.pop("model.layers.9.feed_forward.w1.weight"))
    with pytest.warns(UserWarning, match=LFM2_NOTICE[:20]): load_lfm2(folder, 3)


def test_truncated_weights_are_refused(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(MmferError, match="cannot be read.*model.safetensors"): load_lfm2(tmp_path, 3)


def test_what_is_no_lfm2_is_refused(checkpoint, tmp_path):
    with pytest.raises(MmferError, match="cannot be read.*config.json"): load_lfm2(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(MmferError, match="checkpoint of bert"): load_lfm2(tmp_path)
    with pytest.raises(MmferError, match="16 layers, not 17"): load_lfm2(checkpoint, 17)


def test_fusion_of_other_sizes_is_refused(checkpoint):
    wide, symmetric = fusion_of(ffn=256), fusion_of(causal=False)
    with pytest.raises(MmferError, match="ffn is 176 there and 256 here"): load_backbone(wide, checkpoint)
    words = "causal is True there and False here"
    with pytest.raises(MmferError, match=words): load_backbone(symmetric, checkpoint)


@pytest.mark.parametrize("kind", sorted(set(SYSTEMS) - {"lfm2"}))
def test_only_lfm2_takes_the_weights_of_lfm2(checkpoint, kind):
    with pytest.raises(MmferError, match=f"{kind}.*'lfm2'"): load_backbone(fusion_of(kind=kind), checkpoint)


def test_one_load_does_not_loosen_the_next(checkpoint, broken):
    "What is left out of a short load must not be forgiven in a longer one."
    folder = broken(lambda w: w.pop("model.layers.4.conv.in_proj.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_lfm2(folder, 3)
    with pytest.raises(MmferError, match="layers.4.conv.in_proj.weight"): load_lfm2(folder, 6)


def test_another_order_of_layers_is_refused(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text()) | dict(full_attn_idxs=[1, 5, 8, 10, 12, 14])
    (tmp_path / "config.json").write_text(json.dumps(config))
    fusion = build_fusion(FusionConfig(**lfm2_sizes(checkpoint), out_dim=64), AUDIO, VISUAL)
    words = "has the layers conv, full_attention, conv.*not conv, conv, full_attention"
    with pytest.raises(MmferError, match=words): load_backbone(fusion, tmp_path)


# --- by name

EMOTIONS = ("calm", "angry", "sad")


@pytest.fixture
def files(tmp_path, whole, checkpoint):
    "A source per part: a .nemo file, and the folders of a tower and of LFM2."
    _, weights, config = whole
    voice = write_nemo(tmp_path / "voice.nemo", nemo_weights())
    return dict(audio=voice, vision=_write(tmp_path / "tower", weights, config), fusion=checkpoint)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A Hub that gives what lies in `tmp_path/hub/<owner>/<name>`; the list of what was asked of it."
    asked = []

    def snapshot(repo, allow_patterns, local_files_only):
        asked.append((repo, allow_patterns, local_files_only))
        folder = tmp_path / "hub" / repo / "snapshots" / ("0123456789" * 4)
        if not folder.is_dir(): raise OSError("no network")
        return str(folder)

    monkeypatch.setattr("mmfer.weights.snapshot_download", snapshot)
    asked.append(tmp_path / "hub")
    return asked


def test_every_default_has_a_part_in_its_preset():
    for preset in PRETRAINED: assert choose_sources(preset, "lfm2", "pretrained") == PRETRAINED[preset]
    assert PRETRAINED["tiny"] == {} and PRETRAINED["full"].keys() == {"audio", "vision", "fusion"}


@pytest.mark.parametrize("system, parts", [
    ("audio_only", {"audio"}), ("visual_only", {"vision"}), ("early", {"audio", "vision"}),
    ("late", {"audio", "vision"}), ("attention", {"audio", "vision"}),
    ("lfm2", {"audio", "vision", "fusion"})])
def test_a_system_takes_what_it_has_a_place_for(system, parts):
    assert choose_sources("full", system, "pretrained").keys() == parts
    assert choose_sources("full", system, "none") == {}
    own = choose_sources("full", system, "pretrained")
    assert choose_sources("full", system, dict.fromkeys(parts, "none")) == {}
    for part in {"audio", "vision", "fusion"} - parts:
        with pytest.raises(MmferError, match=f"{system!r} has no place for the {part} weights"):
            choose_sources("full", system, {part: "owner/name"})
        assert choose_sources("full", system, {part: "none"}) == own


def test_one_part_can_be_changed_alone():
    changed = choose_sources("lightweight", "lfm2", dict(fusion="owner/name"))
    assert changed == PRETRAINED["lightweight"] | dict(fusion="owner/name")


@pytest.mark.parametrize("weights, words", [
    ("good", "weights 'good' are unknown"), (dict(face="none"), "part 'face' is unknown"), (None, "None")])
def test_unknown_words_for_weights_are_refused(weights, words):
    with pytest.raises(MmferError, match=words): choose_sources("lightweight", "lfm2", weights)


def test_a_hub_id_leads_to_its_one_nemo_file(hub):
    folder = hub[0] / "owner/voice/snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    (folder / "a.nemo").touch()
    assert find_weights("audio", "owner/voice") == folder / "a.nemo"
    assert hub[1] == ("owner/voice", ["*.nemo", "README.md"], False)
    (folder / "b.nemo").touch()
    with pytest.raises(MmferError, match="one .nemo file and has a.nemo, b.nemo"):
        find_weights("audio", "owner/voice")


def test_a_hub_id_with_a_file(hub):
    folder = hub[0] / "owner/voice/snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    (folder / "a.nemo").touch()
    (folder / "b.nemo").touch()
    assert find_weights("audio", "owner/voice/b.nemo") == folder / "b.nemo"
    assert hub[1] == ("owner/voice", ["b.nemo", "README.md"], False)
    with pytest.raises(MmferError, match="owner/voice/c.nemo holds no c.nemo: it has a.nemo, b.nemo"):
        find_weights("audio", "owner/voice/c.nemo")


@pytest.mark.parametrize("fetch", [True, False])
def test_what_is_missing_and_where_to_put_it(hub, fetch):
    with pytest.raises(MmferError) as e: find_weights("vision", "owner/tower", fetch)
    told = str(e.value)
    assert told.startswith("owner/tower is not on this machine") and "--vision-weights" in told
    assert ("no network" in told) == fetch and hub[1][2] == (not fetch)


def test_a_folder_or_a_file_is_never_asked_of_the_hub(hub, files):
    assert find_weights("audio", files["audio"]) == files["audio"]
    assert find_weights("vision", str(files["vision"])) == files["vision"]
    with pytest.raises(MmferError, match="absent.nemo does not exist"):
        find_weights("audio", files["audio"].parent / "absent.nemo")
    assert len(hub) == 1


def test_sizes_fit_the_checkpoint(files):
    audio = fit_sizes("audio", files["audio"], layers=17)
    assert AudioConfig(**audio) == AudioConfig(64, 2, 4, 256, 32)
    assert fit_sizes("audio", files["audio"], layers=1)["layers"] == 1
    assert fit_sizes("vision", files["vision"], layers=1) == siglip_sizes(files["vision"])  # kept whole
    assert fit_sizes("fusion", files["fusion"], layers=6)["layers"] == 6


def test_an_origin_tells_commit_or_checksum(tmp_path, files):
    store = tmp_path / "models--o--n" / "snapshots" / ("ab" * 20)
    store.mkdir(parents=True)
    (store / "model.safetensors").write_bytes((files["vision"] / "model.safetensors").read_bytes())
    (store / "config.json").write_bytes((files["vision"] / "config.json").read_bytes())
    (store / "README.md").write_text("---\nlicense: other\nlicense_name: my-own\n---\n")
    there = describe_weights("vision", "o/n", store, layers=2)
    assert (there.source, there.revision, there.licence) == ("o/n", "ab" * 20, "my-own")
    here = describe_weights("vision", files["vision"], files["vision"], layers=2)
    assert here.source == "tower" and here.licence == "not stated" and here.revision.startswith("sha256:")
    assert here.megabytes == there.megabytes == (store / "model.safetensors").stat().st_size / 1e6
    file = files["vision"] / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert describe_weights("vision", files["vision"], files["vision"], layers=2).revision != here.revision


def test_the_table_names_random_parts(files):
    origin = describe_weights("audio", files["audio"], files["audio"], layers=1)
    table = origins_table([origin], ["audio", "fusion"])
    assert table.source.to_dict() == {"audio": "voice.nemo", "fusion": "random"}
    assert table.layers.to_dict() == {"audio": "1 of 2", "fusion": ""}
