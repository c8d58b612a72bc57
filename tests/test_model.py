"""The whole model: padding, neighbours and missing modalities change nothing they should not; sizes are those of the design."""
import json

import pytest
import torch
from fastcore.test import test_close as close
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfer.core import MmferError, count_parameters, seed_everything
from mmfer.fusion import SYSTEMS
from mmfer.model import MultimodalFER, hide_modalities, preset_config


def tiny(system="lfm2"):
    seed_everything(0)
    return MultimodalFER.from_preset("tiny", system).eval()


MODEL = tiny()


def clips(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(audio=0.1 * torch.randn(n, 20_000, generator=g), audio_lengths=torch.randint(4_000, 20_001, (n,), generator=g),
                video=torch.randint(0, 256, (n, 9, 3, 64, 64), dtype=torch.uint8, generator=g),
                video_lengths=torch.randint(1, 10, (n,), generator=g))


def row(batch, i):
    "Clip i alone, cut to its own length."
    a, v = batch["audio_lengths"][i], batch["video_lengths"][i]
    return dict(audio=batch["audio"][i:i + 1, :a], audio_lengths=a[None], video=batch["video"][i:i + 1, :v], video_lengths=v[None])


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


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
    model, batch = tiny(system), clips(2)
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
    model, batch = tiny(system), clips(2)
    wanted, tokens = logits(model, batch), torch.zeros(2, 9, 64, 64)
    if model.visual:
        real = torch.arange(9) < batch["video_lengths"][:, None]
        with torch.no_grad(): tokens[real] = model.visual.encode(batch["video"][real])
    video = batch.pop("video")
    assert torch.equal(logits(model, batch | {"video_tokens": tokens}), wanted)
    if system == "audio_only": return
    with pytest.raises(MmferError, match="either video or tokens"): model(**batch, video=video, video_tokens=tokens)
    with pytest.raises(MmferError, match="tokens have the shape"): model(**batch, video_tokens=tokens[..., :32])


@pytest.mark.parametrize("system", SYSTEMS)
def test_saved_and_loaded_is_the_same(system, tmp_path):
    model, batch = tiny(system), clips(2)
    model.save_pretrained(tmp_path)
    again = MultimodalFER.from_pretrained(tmp_path).eval()
    assert again.config == model.config and set(again.summary()["weights from"]) == {str(tmp_path), ""}
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_config_with_a_typo_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fusion"]["hedas"] = config["fusion"].pop("heads")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmferError, match="fusion.hedas is unknown"): MultimodalFER.from_pretrained(tmp_path)


def test_every_trainable_weight_gets_a_gradient():
    model = tiny().train()
    out = model(**clips(3))
    (out.logits.square().sum() + out.audio_logits.square().sum() + out.visual_logits.square().sum()).backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == [n for n in lost if n.startswith("fusion.stand_ins")], lost


@given(p=st.floats(0, 1), seed=st.integers(0, 1000))
def test_modality_dropout_never_takes_both_nor_gives_any(p, seed):
    torch.manual_seed(seed)
    audio, visual = torch.rand(50) < 0.7, torch.rand(50) < 0.7
    a, v = hide_modalities(audio, visual, p)
    assert not (a & ~audio).any() and not (v & ~visual).any()
    assert torch.equal(a | v, audio | visual)


@pytest.mark.parametrize("preset, low, high", [("tiny", 0.4e6, 2e6), ("lightweight", 150e6, 170e6), ("full", 450e6, 520e6)])
def test_sizes(preset, low, high):
    with torch.device("meta"): model = MultimodalFER(preset_config(preset))
    assert low < count_parameters(model) < high
