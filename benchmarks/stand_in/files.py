"""What the stand-in serves: repositories and archives with the names, formats and sizes of the real ones.

The weights are random, so nothing that is trained from them says anything about people."""
import hashlib
import io
import json
import math
import shutil
import tarfile
import zipfile
from collections import defaultdict
from functools import partial

import torch
import yaml
from safetensors.torch import save_file
from transformers import Lfm2Config, Lfm2ForCausalLM, SiglipConfig, SiglipModel

from mmfer.core import seed_everything
from mmfer.toy import make_toy

SIGLIP2 = dict(
    architectures=["SiglipModel"], initializer_factor=1.0, model_type="siglip", torch_dtype="float32",
    text_config=dict(
        model_type="siglip_text_model", vocab_size=256_000, projection_size=768, hidden_size=768,
        torch_dtype="float32"),
    vision_config=dict(model_type="siglip_vision_model", torch_dtype="float32"))
LFM2 = dict(
    architectures=["Lfm2ForCausalLM"], model_type="lfm2", torch_dtype="bfloat16",
    block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1.0, block_mlp_init_scale=1.0,
    block_multiple_of=256, block_norm_eps=1e-5, block_out_init_scale=1.0, block_use_swiglu=True,
    block_use_xavier_init=True, bos_token_id=1, eos_token_id=7, pad_token_id=0, conv_L_cache=3,
    conv_bias=False, conv_use_xavier_init=True, full_attn_idxs=[2, 5, 8, 10, 12, 14],
    initializer_range=0.02, max_position_embeddings=128_000,
    norm_eps=1e-5, num_hidden_layers=16, num_key_value_heads=8, rope_theta=1_000_000.0, use_cache=True,
    use_pos_enc=True, vocab_size=65_536)
LFM2_WIDTHS = {"LFM2-350M": (1024, 6656, 16), "LFM2-700M": (1536, 10_240, 24)}  # width, feed-forward, heads
LAYERS_WRITTEN = 6  # of LFM2's 16: what is read here
PARAKEET = dict(
    target="nemo.collections.asr.models.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel",
    sample_rate=16_000, compute_eval_loss=False,
    preprocessor=dict(
        _target_="nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", sample_rate=16_000,
        normalize="per_feature", window_size=0.025, window_stride=0.01, window="hann", features=80, n_fft=512,
        log=True, frame_splicing=1, dither=1e-5, pad_to=0),
    encoder=dict(
        _target_="nemo.collections.asr.modules.ConformerEncoder", feat_in=80, feat_out=-1, n_layers=17,
        d_model=512, use_bias=True, subsampling="dw_striding", subsampling_factor=8,
        subsampling_conv_channels=256, causal_downsampling=False, reduction=None, reduction_position=None,
        reduction_factor=1, ff_expansion_factor=4, self_attention_model="rel_pos", n_heads=8,
        att_context_size=[-1, -1], att_context_style="regular", xscaling=False, untie_biases=True,
        pos_emb_max_len=5000, conv_kernel_size=9, conv_norm_type="batch_norm", conv_context_size=None,
        dropout=0.1, dropout_pre_encoder=0.1, dropout_emb=0.0, dropout_att=0.1),
    decoder=dict(_target_="nemo.collections.asr.modules.RNNTDecoder", vocab_size=1024),
    joint=dict(_target_="nemo.collections.asr.modules.RNNTJoint", num_extra_outputs=5),
    aux_ctc=dict(decoder=dict(_target_="nemo.collections.asr.modules.ConvASRDecoder", num_classes=1024)))


def random_weights(
    shapes: dict,               # {name: shape}
    dtype=torch.float32,
) -> dict[str, torch.Tensor]:
    "Weights under which values neither vanish nor explode: norms that change nothing, the rest Gaussian."
    def draw(name, shape):
        if name.endswith(("bias", "running_mean")): return torch.zeros(shape, dtype=dtype)
        if name.endswith("num_batches_tracked"): return torch.zeros(shape, dtype=torch.long)
        if len(shape) < 2: return torch.ones(shape, dtype=dtype)
        return (torch.randn(shape) / math.sqrt(math.prod(shape[1:]))).to(dtype)
    return {name: draw(name, tuple(shape)) for name, shape in shapes.items()}


def _shapes_of(build):
    "The names and shapes of a model's weights, without its weights."
    with torch.device("meta"): model = build()
    return {name: weight.shape for name, weight in model.state_dict().items()}


def _write_repo(folder, licence, config=None, weights=None):
    folder.mkdir(parents=True, exist_ok=True)
    card = f"---\n{yaml.safe_dump(licence)}---\n\nRandom weights, made for a rehearsal.\n"
    (folder / "README.md").write_text(card)
    if config: (folder / "config.json").write_text(json.dumps(config, indent=2))
    if weights: save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_siglip2(
    folder,  # becomes the repository: both towers in one file, 1.5 GB
):
    shapes = _shapes_of(lambda: SiglipModel(SiglipConfig(**SIGLIP2)))
    _write_repo(folder, dict(license="apache-2.0"), SIGLIP2, random_weights(shapes))


def write_lfm2(
    folder,  # becomes the repository: named after the checkpoint
):
    "Embeddings and the first layers, in bfloat16; the config names all layers, as the published one does."
    width, hidden, heads = LFM2_WIDTHS[folder.name]
    sizes = dict(
        hidden_size=width, block_dim=width, conv_dim=width, conv_dim_out=width, block_ff_dim=hidden,
        num_attention_heads=heads, num_heads=heads)
    config = LFM2 | sizes
    written = Lfm2Config(**config | dict(num_hidden_layers=LAYERS_WRITTEN, full_attn_idxs=[2, 5]))
    shapes = _shapes_of(lambda: Lfm2ForCausalLM(written))
    del shapes["lm_head.weight"]  # tied to the embeddings
    licence = dict(license="other", license_name="lfm1.0")
    _write_repo(folder, licence, config, random_weights(shapes, torch.bfloat16))


def nemo_shapes(
    config: dict,  # as in model_config.yaml
):
    "Every weight of a hybrid TDT-CTC model under NeMo's names, with its shape."
    encoder = config["encoder"]
    d = encoder["d_model"]
    c = encoder["subsampling_conv_channels"]
    ffn = d * encoder["ff_expansion_factor"]
    heads = encoder["n_heads"]
    kernel = encoder["conv_kernel_size"]
    linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    shapes = {"preprocessor.featurizer.window": (400,), "preprocessor.featurizer.fb": (1, 80, 257)}
    shapes |= linear("encoder.pre_encode.out", d, c * encoder["feat_in"] // 8)
    for i, into, size in ((0, 1, 3), (2, 1, 3), (3, c, 1), (5, 1, 3), (6, c, 1)):
        shapes[f"encoder.pre_encode.conv.{i}.weight"] = (c, into, size, size)
        shapes[f"encoder.pre_encode.conv.{i}.bias"] = (c,)
    for i in range(encoder["n_layers"]):
        layer = f"encoder.layers.{i}"
        for norm in ("feed_forward1", "self_att", "conv", "feed_forward2", "out"):
            shapes |= {f"{layer}.norm_{norm}.weight": (d,), f"{layer}.norm_{norm}.bias": (d,)}
        for part in ("feed_forward1", "feed_forward2"):
            shapes |= linear(f"{layer}.{part}.linear1", ffn, d) | linear(f"{layer}.{part}.linear2", d, ffn)
        for what in ("q", "k", "v", "out"): shapes |= linear(f"{layer}.self_attn.linear_{what}", d, d)
        shapes[f"{layer}.self_attn.linear_pos.weight"] = (d, d)
        for what in ("u", "v"): shapes[f"{layer}.self_attn.pos_bias_{what}"] = (heads, d // heads)
        conv = {
            "pointwise_conv1": (2 * d, d, 1), "depthwise_conv": (d, 1, kernel), "pointwise_conv2": (d, d, 1)}
        for name, shape in conv.items():
            shapes |= {f"{layer}.conv.{name}.weight": shape, f"{layer}.conv.{name}.bias": shape[:1]}
        for what in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{layer}.conv.batch_norm.{what}"] = (d,)
        shapes[f"{layer}.conv.batch_norm.num_batches_tracked"] = ()
    classes = config["decoder"]["vocab_size"] + 1
    shapes["decoder.prediction.embed.weight"] = (classes, 640)
    for what in ("ih", "hh"):
        shapes[f"decoder.prediction.dec_rnn.lstm.weight_{what}_l0"] = (4 * 640, 640)
        shapes[f"decoder.prediction.dec_rnn.lstm.bias_{what}_l0"] = (4 * 640,)
    shapes |= linear("joint.pred", 640, 640) | linear("joint.enc", 640, d)
    shapes |= linear("joint.joint_net.2", classes + config["joint"]["num_extra_outputs"], 640)
    shapes["ctc_decoder.decoder_layers.0.weight"] = (classes, d, 1)
    shapes["ctc_decoder.decoder_layers.0.bias"] = (classes,)
    return shapes


def write_parakeet(
    folder,  # becomes the repository: one .nemo of 17 layers, with its decoders
):
    _write_repo(folder, dict(license="cc-by-4.0"))
    write_nemo(folder / "parakeet-tdt_ctc-110m.nemo", PARAKEET)


def write_yunet(
    folder,  # becomes the repository
    yunet,   # the file of the real face detector
):
    _write_repo(folder, dict(license="mit"))
    shutil.copy(yunet, folder / "face_detection_yunet_2023mar.onnx")


def write_nemo(
    file,          # becomes the `.nemo`: a tar
    config: dict,  # as in model_config.yaml
):
    weights = io.BytesIO()
    torch.save(random_weights(nemo_shapes(config)), weights)
    members = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights.ckpt": weights.getvalue(),
        "0_tokenizer.model": b"no tokenizer: it is not read"}
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_weights(
    hub,  # the stand-in's folder of repositories; one that lies there already stays
):
    "All pretrained weights that the presets and the front door name: 3 GB."
    seed_everything(0)
    _once(hub / "google" / "siglip2-base-patch16-224", write_siglip2)
    _once(hub / "nvidia" / "parakeet-tdt_ctc-110m", write_parakeet)
    for name in LFM2_WIDTHS: _once(hub / "LiquidAI" / name, write_lfm2)


def write_detector(
    hub,    # the stand-in's folder of repositories
    yunet,  # the file of the real face detector
):
    "The repository that holds the face detector."
    _once(hub / "opencv" / "face_detection_yunet", partial(write_yunet, yunet=yunet))


def _once(folder, write):
    "A folder that is there is whole."
    if folder.exists(): return
    work = folder.parent/"unfinished"/folder.name
    shutil.rmtree(work, ignore_errors=True)
    write(work)
    work.rename(folder)


def some_clips(
    recordings,            # folder with ravdess_original and ravdess_actor05_crops, of actor 05
    per_emotion: int = 2,
) -> list:
    "Real clips of one actor: originals with their silent twin, and face crops of what is lacking."
    originals = sorted(recordings.glob("ravdess_original/Actor_05/*.mp4"))
    there = {clip.name for clip in originals}
    crops = sorted(recordings.glob("ravdess_actor05_crops/Actor_05/*.mp4"))
    chosen = defaultdict(list)
    for clip in [*originals, *(clip for clip in crops if clip.name not in there)]:
        kind = clip.name[:8]  # modality, channel, emotion
        if len(chosen[kind]) < per_emotion: chosen[kind].append(clip)
    return [clip for clips in chosen.values() for clip in clips]


def write_archives(
    root,             # the stand-in's folder
    actors,           # "01", "02", ...
    recordings=None,  # folder of real clips; None: the toy corpus
    per_emotion: int = 2,
):
    "RAVDESS's archives for these actors, all with the same faces, and the list of their checksums."
    folder = root / "ravdess"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    toy = root / "toy"
    if not recordings: make_toy(toy, actors=len(actors), clips_per_actor=8 * per_emotion, progress=False)
    registry = []
    for actor in actors:
        clips = some_clips(recordings, per_emotion) if recordings else toy.glob(f"Actor_{actor}/*.mp4")
        archive = folder / f"Video_Speech_Actor_{actor}.zip"
        with zipfile.ZipFile(archive, "w") as z:
            for clip in sorted(clips): z.write(clip, f"Actor_{actor}/{clip.stem[:-2]}{actor}.mp4")
        registry.append(f"{archive.name} md5:{hashlib.md5(archive.read_bytes()).hexdigest()}\n")
    (folder / "registry.txt").write_text("".join(registry))
