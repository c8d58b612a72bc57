"""The whole model: padding and missing modalities change nothing they should not, emotions size the heads."""
import json
import warnings
from dataclasses import replace

import pytest
import torch
from fastcore.test import test_close as close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Lfm2Config, Lfm2ForCausalLM

from mmfer.core import MmferError, count_parameters, from_dict, seed_everything, to_dict
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.fusion import SYSTEMS
from mmfer.model import ModelConfig, MultimodalFER, hide_modalities, preset_config
from mmfer.visual import VisualConfig, build_siglip
from mmfer.weights import Origin

THREE = ("shy", "bold", "bored")  # neither RAVDESS's names nor in the order of the alphabet


def tiny(system="lfm2", emotions=RAVDESS_EMOTIONS):
    seed_everything(0)
    return MultimodalFER.from_preset("tiny", emotions, system).eval()


MODEL = tiny()


def clips(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(audio=0.1 * torch.randn(n, 20_000, generator=g),
                audio_lengths=torch.randint(4_000, 20_001, (n,), generator=g),
                video=torch.randint(0, 256, (n, 9, 3, 64, 64), dtype=torch.uint8, generator=g),
                video_lengths=torch.randint(1, 10, (n,), generator=g))


def row(batch, i):
    "Clip i alone, cut to its own length."
    a = batch["audio_lengths"][i]
    v = batch["video_lengths"][i]
    return dict(audio=batch["audio"][i:i + 1, :a], audio_lengths=a[None],
                video=batch["video"][i:i + 1, :v], video_lengths=v[None])


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def heads(out):
    "Every kind of logits that a model gives."
    found = dict(fused=out.logits, audio=out.audio_logits, visual=out.visual_logits)
    return {name: logits for name, logits in found.items() if logits is not None}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_garbage_behind_the_end_changes_nothing(seed):
    batch = clips(2, seed)
    wanted = logits(MODEL, batch)
    for i in range(2):
        batch["audio"][i, batch["audio_lengths"][i]:] = 5.0
        batch["video"][i, batch["video_lengths"][i]:] = 255
    close(logits(MODEL, batch), wanted, eps=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)))
def test_a_clip_does_not_notice_its_neighbours(seed, order):
    batch = clips(3, seed)
    wanted = logits(MODEL, batch)
    close(logits(MODEL, {k: v[list(order)] for k, v in batch.items()}), wanted[list(order)], eps=1e-5)
    close(torch.cat([logits(MODEL, row(batch, i)) for i in range(3)]), wanted, eps=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_missing_modalities(system):
    model = tiny(system)
    batch = clips(2)
    for name in ("audio", "video"):
        other = {"audio": "video", "video": "audio"}[name]
        alone = {other: batch[other], f"{other}_lengths": batch[f"{other}_lengths"]}
        if system == {"audio": "audio_only", "video": "visual_only"}[name]:
            with pytest.raises(MmferError, match="nothing that the system"): model(**alone)
            continue
        flagged = batch | {f"{name}_lengths": torch.tensor([0, batch[f"{name}_lengths"][1]])}
        close(logits(model, flagged)[0], logits(model, alone)[0], eps=1e-5)
        close(logits(model, flagged)[1], logits(model, batch)[1], eps=1e-5)
        assert logits(model, alone).isfinite().all()


@pytest.mark.parametrize("system", SYSTEMS)
def test_tokens_in_place_of_video(system):
    model = tiny(system)
    batch = clips(2)
    wanted = logits(model, batch)
    tokens = torch.zeros(2, 9, 64, 64)
    if model.visual:
        real = torch.arange(9) < batch["video_lengths"][:, None]
        with torch.no_grad(): tokens[real] = model.visual.encode(batch["video"][real])
    video = batch.pop("video")
    assert torch.equal(logits(model, batch | {"video_tokens": tokens}), wanted)
    if system == "audio_only": return
    both = dict(video=video, video_tokens=tokens)
    narrow = dict(video_tokens=tokens[..., :32])
    with pytest.raises(MmferError, match="either video or tokens"): model(**batch, **both)
    with pytest.raises(MmferError, match="tokens have the shape"): model(**batch, **narrow)


@pytest.mark.parametrize("system", SYSTEMS)
def test_saved_and_loaded_is_the_same(system, tmp_path):
    model = tiny(system)
    batch = clips(2)
    model.save_pretrained(tmp_path)
    again = MultimodalFER.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_config_with_a_typo_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fusion"]["hedas"] = config["fusion"].pop("heads")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmferError, match="fusion.hedas"): MultimodalFER.from_pretrained(tmp_path)


def test_every_trainable_weight_gets_a_gradient():
    model = tiny().train()
    out = model(**clips(3))
    sum(logits.square().sum() for logits in heads(out).values()).backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == [n for n in lost if n.startswith("fusion.stand_ins")], lost


@given(p=st.floats(0, 1), seed=st.integers(0, 1000))
def test_modality_dropout_never_takes_both_nor_gives_any(p, seed):
    torch.manual_seed(seed)
    audio = torch.rand(50) < 0.7
    visual = torch.rand(50) < 0.7
    a, v = hide_modalities(audio, visual, p)
    assert not (a & ~audio).any() and not (v & ~visual).any()
    assert torch.equal(a | v, audio | visual)


SIZES = [("tiny", 0.4e6, 2e6), ("lightweight", 150e6, 170e6), ("full", 450e6, 520e6)]


@pytest.mark.parametrize("preset, low, high", SIZES)
def test_sizes(preset, low, high):
    with torch.device("meta"): model = MultimodalFER(preset_config(preset, RAVDESS_EMOTIONS))
    assert low < count_parameters(model) < high


# Emotions are the corpus's: their number sizes every head, their names and order are saved


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("emotions", [THREE, ("yes", "no"), tuple("abcdefghijk")], ids=len)
@torch.no_grad()
def test_emotions_size_every_head(system, emotions):
    out = tiny(system, emotions)(**clips(2))
    branches = dict(audio_only={"audio"}, visual_only={"visual"}).get(system, {"audio", "visual"})
    assert set(heads(out)) == {"fused"} | branches
    assert {tuple(logits.shape) for logits in heads(out).values()} == {(2, len(emotions))}
    close(out.probabilities.sum(1), torch.ones(2), eps=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_three_emotions_saved_and_loaded(system, tmp_path):
    model = tiny(system, THREE)
    batch = clips(2)
    model.save_pretrained(tmp_path)
    again = MultimodalFER.from_pretrained(tmp_path).eval()
    assert again.config.emotions == THREE and again.config == model.config
    assert torch.equal(logits(again, batch), logits(model, batch))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=12, unique=True))
def test_order_and_names_live_through_plain_data(emotions):
    config = preset_config("tiny", emotions)
    again = from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))))
    assert again.emotions == tuple(emotions) and again == config
    assert {again.audio.n_emotions, again.visual.n_emotions, again.classifier.n_emotions} == {len(emotions)}


@settings(max_examples=10, deadline=None)
@given(st.permutations(THREE).filter(lambda order: tuple(order) != THREE))
def test_another_order_is_another_config(order):
    assert preset_config("tiny", order) != preset_config("tiny", THREE)


@pytest.mark.parametrize("part", ["audio", "visual", "classifier"])
def test_a_head_of_another_size_cannot_be_made(part, tmp_path):
    "The number of emotions is told once: a config that says another one for a part does not get it."
    plain = to_dict(preset_config("tiny", THREE))
    plain[part]["n_emotions"] = 8
    with torch.no_grad(): out = MultimodalFER(plain).eval()(**clips(1))
    assert {logits.shape[1] for logits in heads(out).values()} == {3}


def test_weights_for_other_emotions_do_not_load(tmp_path):
    tiny(emotions=THREE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["emotions"] = [*THREE, "proud"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmferError, match="do not fit MultimodalFER"): MultimodalFER.from_pretrained(tmp_path)


@pytest.mark.parametrize("emotions", [(), ("sad",), ("sad", "sad")])
def test_emotions_that_cannot_be_told_apart_are_refused(emotions):
    with pytest.raises(MmferError, match="two emotions or more"): preset_config("tiny", emotions)


def test_a_model_without_emotions_is_refused():
    plain = to_dict(preset_config("tiny", THREE))
    del plain["emotions"]
    with pytest.raises(MmferError, match="emotions"): MultimodalFER(plain)


# --- pretrained parts: see also test_weights

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "A tower and a language model, small, in the form of the published ones."
    folder = tmp_path_factory.mktemp("sources")
    seed_everything(0)
    tower = VisualConfig(d_model=48, layers=3, heads=4, ffn=96, image_size=64, patch_size=16)
    build_siglip(tower).save_pretrained(folder / "tower")
    language = Lfm2Config(
        vocab_size=50, hidden_size=48, intermediate_size=96, block_multiple_of=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, full_attn_idxs=[2])
    Lfm2ForCausalLM(language).save_pretrained(folder / "language")
    return dict(vision=folder / "tower", fusion=folder / "language")


@pytest.fixture
def started(sources):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the licence of LFM2
        return MultimodalFER.from_preset("tiny", THREE, weights=sources)


def test_a_model_takes_sizes_and_weights_of_its_sources(started, sources):
    assert (started.config.visual.d_model, started.config.visual.grid) == (48, 4)
    assert (started.config.fusion.d_model, started.config.fusion.layers) == (48, 3)
    tower = load_file(sources["vision"] / "model.safetensors")
    own = started.visual.vision.state_dict()
    for name, weight in own.items():
        there = tower.get(name, tower.get(f"vision_model.{name}"))
        assert torch.equal(weight, there), name
    language = load_file(sources["fusion"] / "model.safetensors")
    for name, weight in started.fusion.backbone.named_parameters():
        assert torch.equal(weight, language[f"model.{name}"]), name
    video = torch.zeros(1, 4, 3, 64, 64, dtype=torch.uint8)
    assert started.eval()(audio=torch.randn(1, 16_000), video=video).logits.shape == (1, 3)


def test_origins_survive_saving_and_stand_in_the_card(started, tmp_path):
    started.save_pretrained(tmp_path)
    again = MultimodalFER.from_pretrained(tmp_path)
    assert again.config == started.config and len(again.config.origins) == 2
    assert again.loaded_parts().keys() == {"vision", "fusion"}
    card = (tmp_path / "README.md").read_text()
    for origin in started.config.origins: assert origin.source in card and origin.revision[7:] in card
    assert list(again.origins().source) == ["random", "tower", "language"]


def test_the_summary_says_from_what_each_part_started(started):
    assert started.summary()["started from"].to_dict() == dict(
        audio="random", visual="tower", fusion="language", classifier="random", total="")


def test_a_preset_without_a_network_is_told_and_never_random(monkeypatch):
    def gone(*_, **__): raise OSError("gone")
    monkeypatch.setattr("mmfer.weights.snapshot_download", gone)
    for preset in ("lightweight", "full"):
        with pytest.raises(MmferError, match="parakeet.* is not on this machine.*gone"):
            MultimodalFER.from_preset(preset, THREE)
    assert MultimodalFER.from_preset("tiny", THREE).config.origins == []


def test_loaded_batch_norm_keeps_its_statistics():
    "3 s of padding more would move them (and with them every answer)."
    config = preset_config("tiny", THREE)
    origin = Origin("audio", "voice.nemo", "sha256:0", layers=2, held=2, licence="mine", megabytes=1.0)
    sound = dict(audio=torch.randn(2, 16_000), video=torch.zeros(2, 4, 3, 64, 64, dtype=torch.uint8))
    for origins, moves in ([], True), ([origin], False):
        model = MultimodalFER(replace(config, origins=origins)).train()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
        before = [norm.running_mean.clone() for norm in norms]
        model(**sound)
        assert len(norms) == 2 and model.audio.encoder.training
        assert all(torch.equal(norm.running_mean, b) != moves for norm, b in zip(norms, before))
