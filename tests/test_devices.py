"""Nothing is made on another device than the clips, every size can be built, bfloat16 answers as float32.

A GPU is not needed: while the *default* device is `meta`, clips and weights stay on the CPU. So whatever a
model makes without saying where lands on `meta`, which holds no numbers, and meets the clips in an error.
"""
import pytest
import torch
from torch import nn

from mmfer.audio import _tables
from mmfer.augment import soften, time_stretch
from mmfer.classifier import POOLINGS, TemporalPool
from mmfer.core import count_parameters, lengths_to_mask, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.features import SYSTEM_KINDS, FeatureConfig, FeatureSet, _loss, _mixed, feature_model
from mmfer.fusion import SYSTEMS
from mmfer.losses import MultimodalLoss
from mmfer.model import PRESETS, FEROutput, MultimodalFER

THREE = ("calm", "happy", "sad")


def clips():
    "Two clips of different lengths, and one more that lacks either modality."
    g = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(4, 12_000, generator=g)
    video = torch.randint(0, 256, (4, 5, 3, 64, 64), dtype=torch.uint8, generator=g)
    return dict(audio=audio, video=video, audio_lengths=torch.tensor([12_000, 9_000, 12_000, 0]),
                video_lengths=torch.tensor([5, 3, 0, 5]), roi_mask=torch.rand(4, 5, 64, generator=g) > 0.5)


def both_modalities(batch): return {name: values[:2] for name, values in batch.items()}


def tiny(system):
    seed_everything(0)
    return MultimodalFER.from_preset("tiny", THREE, system, weights="none")


def usable(system):
    "A single modality has no answer to a clip without it."
    return both_modalities(clips()) if system.endswith("_only") else clips()


def training_step(system):
    "A function that computes the loss with all its parts, and the length of the gradient."
    model = tiny(system).train()
    widths = (model.config.audio.d_model, model.config.visual.d_model)
    alignment = 0.0 if system.endswith("_only") else 0.1
    loss = MultimodalLoss(0.1, torch.tensor([1.0, 2.0, 3.0]), alignment=alignment, dims=widths)
    batch = both_modalities(clips())
    labels = torch.tensor([0, 2])

    def step():
        seed_everything(1)
        model.zero_grad()
        total = loss(model(**batch), soften(labels, 3))["total"]
        total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return dict(loss=total.detach(), gradient=nn.utils.get_total_norm(gradients))
    return step


def require_same_elsewhere(compute):
    "The same computation twice, the second time with another default device: the same values, on the CPU."
    usual = compute()  # fills the tables that are made once and then moved
    with torch.device("meta"): other = compute()
    assert usual.keys() == other.keys()
    for name, values in other.items():
        assert values.device.type == "cpu", name
        torch.testing.assert_close(values, usual[name], msg=name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_step_makes_every_tensor_where_the_clips_are(system):
    require_same_elsewhere(training_step(system))


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_answer_makes_every_tensor_where_the_clips_are(system):
    model = tiny(system).eval()
    batch = usable(system)

    @torch.inference_mode()
    def answer(): return model(**batch, output_attentions=True)
    require_same_elsewhere(answer)


GIVEN = {
    "no lengths, no mask": ("audio", "video"), "sound alone": ("audio", "audio_lengths"),
    "pictures alone": ("video", "video_lengths")}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("system", ("early", "late", "attention", "lfm2"))
def test_what_is_left_out_is_made_where_the_clips_are(system, given):
    model = tiny(system).eval()
    batch = {name: values for name, values in both_modalities(clips()).items() if name in GIVEN[given]}

    @torch.inference_mode()
    def answer(): return model(**batch)
    require_same_elsewhere(answer)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_makes_every_tensor_where_the_segments_are(pooling):
    pool = TemporalPool(4, pooling).eval()
    segments = torch.randn(2, 8, 4)

    @torch.inference_mode()
    def pooled(): return dict(zip(("pooled", "weights"), pool(segments)))
    require_same_elsewhere(pooled)


def test_the_tables_of_the_spectrogram_go_to_the_device_of_the_sound():
    spectrogram, filters = _tables(torch.device("meta"))
    assert spectrogram.window.device.type == filters.device.type == "meta"


def test_a_loss_without_flags_makes_them_where_the_logits_are():
    even = torch.zeros(2, 3)
    out = FEROutput(logits=even, audio_logits=even, audio_features=torch.zeros(2, 8, 4))
    labels = torch.tensor([0, 2])
    loss = MultimodalLoss()
    require_same_elsewhere(lambda: loss(out, labels))


def test_stretching_makes_every_tensor_where_the_sound_is():
    sound = 0.1 * torch.randn(1, 4_000, generator=torch.Generator().manual_seed(0))
    require_same_elsewhere(lambda: dict(sound=time_stretch(sound, 1.1)))


def test_tokens_in_place_of_pictures_make_every_tensor_where_they_are():
    model = tiny("lfm2").eval()
    batch = clips()
    video = batch.pop("video")

    @torch.inference_mode()
    def answer(): return model(**batch, video_tokens=torch.stack([model.visual.encode(v) for v in video]))
    require_same_elsewhere(answer)


@pytest.mark.parametrize("system", [system for system in SYSTEM_KINDS if system != "lfm2_full"])
def test_a_training_step_on_features_makes_every_tensor_where_they_are(system):
    g = torch.Generator().manual_seed(0)
    audio = torch.randn(6, 8, 5, generator=g)
    visual = torch.randn(6, 8, 4, generator=g)
    train = FeatureSet(audio, visual, torch.arange(6) % 3, n_emotions=3)
    config = FeatureConfig(width=16, ffn=32)
    model = feature_model(system, train, config).train()

    def step():
        seed_everything(1)
        return dict(loss=_loss(model, audio, visual, soften(train.label, 3), config).detach())
    require_same_elsewhere(step)


def test_mixup_stays_on_the_device_of_the_clips():
    somewhere = dict(device="meta")
    audio = torch.zeros(6, 8, 5, **somewhere)
    labels = torch.zeros(6, dtype=torch.long, **somewhere)
    assert {x.device.type for x in _mixed(audio, audio, labels, 3, alpha=1.0)} == {"meta"}


class Careless(nn.Module):
    "A part that counts places without saying on which device."
    def forward(self, lengths): return torch.arange(5) < lengths[:, None]


def test_a_tensor_made_on_the_default_device_is_found():
    lengths = torch.tensor([5, 3])
    require_same_elsewhere(lambda: dict(mask=lengths_to_mask(lengths, 5)))
    with pytest.raises((RuntimeError, AssertionError)):
        require_same_elsewhere(lambda: dict(mask=Careless()(lengths)))


# Sizes

MILLIONS = {  # part -> weights, as documented: FastConformer, SigLIP2 base, LFM2-700M
    "lightweight": {"audio.encoder": 26.7, "visual.vision": 85.8},
    "full": {"audio.encoder": 108.8, "visual.vision": 85.8, "fusion.backbone": 241.5},
}
TOTAL = {"tiny": (0, 2), "lightweight": (150, 170), "full": (460, 500)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_preset_can_be_built_without_memory(preset, system):
    with torch.device("meta"):
        model = MultimodalFER.from_preset(preset, RAVDESS_EMOTIONS, system, weights="none")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    if system != "lfm2": return
    low, high = TOTAL[preset]
    assert low < count_parameters(model) / 1e6 < high
    for part, millions in MILLIONS.get(preset, {}).items():
        assert count_parameters(model.get_submodule(part)) / 1e6 == pytest.approx(millions, abs=0.05), part


# Half precision

@pytest.mark.parametrize("system", SYSTEMS)
def test_bfloat16_answers_as_float32_does(system):
    model = tiny(system).eval()
    batch = usable(system)
    batch["audio"][0] *= 1e-3  # nearly silent, and
    batch["audio"][1] *= 8     # far too loud: what vanishes or overflows in 16 bits would show
    with torch.inference_mode():
        exact = model(**batch).probabilities
        with torch.autocast("cpu", torch.bfloat16): rough = model(**batch).probabilities
    assert (rough.float() - exact).abs().max() < 0.02


@pytest.mark.parametrize("system", SYSTEMS)
def test_bfloat16_learns_as_float32_does(system):
    step = training_step(system)
    exact = step()
    with torch.autocast("cpu", torch.bfloat16): rough = step()
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(value.item(), rel=0.05), name
