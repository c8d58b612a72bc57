"""Fusion: missing modalities, who sees whom, gradients, sizes."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from transformers import Lfm2Model

from mmfer.core import BranchOutput, MmferError, count_parameters
from mmfer.fusion import (
    FUSION_PRESETS, SYSTEMS, Lfm2Backbone, build_fusion, interleave, lfm2_config, separate)

AUDIO, VISUAL, EMOTIONS = 12, 20, 5
TINY = FUSION_PRESETS["tiny"]
FUSIONS = ("early", "late", "attention", "lfm2")


def branch(dim, batch=4, present=None, seed=0):
    g = torch.Generator().manual_seed(seed + dim)
    flags = None if present is None else torch.tensor(present)
    features = torch.randn(batch, 8, dim, generator=g)
    return BranchOutput(features, torch.randn(batch, EMOTIONS, generator=g), flags)


def system(kind, **kwargs):
    torch.manual_seed(0)
    return build_fusion(replace(TINY, kind=kind, **kwargs), AUDIO, VISUAL).eval()


def answer(out):
    return out.logits if out.features is None else out.features


# --- the sequence

@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_separate_is_the_inverse_of_interleave(batch, segments, dim, seed):
    g = torch.Generator().manual_seed(seed)
    a, v = torch.randn(2, batch, segments, dim, generator=g)
    tokens = interleave(a, v)
    assert tokens.shape == (batch, 2 * segments, dim)
    assert torch.equal(tokens[:, 2 * (segments - 1)], a[:, -1]) and torch.equal(tokens[:, 1], v[:, 0])
    back_a, back_v = separate(tokens)
    assert torch.equal(back_a, a) and torch.equal(back_v, v)


# --- one interface, missing modalities

@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("audio, visual", [
    (branch(AUDIO), None), (None, branch(VISUAL)), (branch(AUDIO), branch(VISUAL)),
    (branch(AUDIO, present=[True, False, True, False]), branch(VISUAL, present=[True, True, False, True]))])
def test_every_system_answers_with_anything_missing(kind, audio, visual):
    out = system(kind)(audio, visual, output_attentions=True)
    assert answer(out).shape == ((4, EMOTIONS) if kind == "late" else (4, 8, TINY.out_dim))
    assert answer(out).isfinite().all()
    assert (out.attention is not None) == (kind in ("attention", "lfm2"))
    if out.attention is not None:
        assert out.attention.shape[0] == 4 and out.attention.shape[2:] == (TINY.heads, 16, 16)
        assert torch.allclose(out.attention.sum(-1), torch.tensor(1.0), atol=1e-5)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_attention_only_when_asked(kind):
    assert system(kind)(branch(AUDIO), branch(VISUAL)).attention is None


@pytest.mark.parametrize("kind", SYSTEMS)
def test_neither_modality_is_refused(kind):
    with pytest.raises(MmferError, match="neither"): system(kind)(None, None)


@pytest.mark.parametrize("kind", SYSTEMS)
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=5), st.data())
def test_a_row_depends_on_itself_alone(kind, flags, data):
    fusion, n = system(kind), len(flags)
    has_a, has_v = map(list, zip(*flags))
    row = data.draw(st.integers(0, n - 1))
    a, v = branch(AUDIO, n, has_a), branch(VISUAL, n, has_v)
    with torch.no_grad():
        together = answer(fusion(a, v))[row]
        single = [BranchOutput(b.features[[row]], b.logits[[row]], b.present[[row]]) for b in (a, v)]
        alone = answer(fusion(*single))[0]
    assert together.isfinite().all() and torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_content_of_a_missing_modality_does_not_matter(kind, garbage):
    fusion, has_a, has_v = system(kind), [True, False, True], [True, True, False]
    a, v = branch(AUDIO, 3, has_a), branch(VISUAL, 3, has_v)
    want = answer(fusion(a, v))
    for b, row in ((a, 1), (v, 2)): b.features[row], b.logits[row] = garbage, garbage
    got = answer(fusion(a, v))
    assert torch.equal(got, want)
    fusion.zero_grad()
    got.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("kind", FUSIONS)
def test_both_modalities_matter(kind):
    fusion, a, v = system(kind), branch(AUDIO), branch(VISUAL)
    both = answer(fusion(a, v))
    assert not torch.allclose(both, answer(fusion(branch(AUDIO, seed=5), v)), atol=1e-3)
    assert not torch.allclose(both, answer(fusion(a, branch(VISUAL, seed=5))), atol=1e-3)


@pytest.mark.parametrize("kind, blind_to", [("audio_only", "visual"), ("visual_only", "audio")])
def test_single_systems_use_one_modality(kind, blind_to):
    fusion, given = system(kind), dict(audio=branch(AUDIO), visual=branch(VISUAL))
    other = given | {blind_to: branch(given[blind_to].features.shape[-1], seed=5)}
    assert torch.equal(fusion(**given).features, fusion(**other).features)
    assert torch.equal(fusion(**given).features, fusion(**given | {blind_to: None}).features)
    assert not any(blind_to in name for name, _ in fusion.named_parameters())


@pytest.mark.parametrize("kind", ["early", "attention", "lfm2"])
def test_none_and_not_present_are_the_same(kind):
    fusion, v = system(kind), branch(VISUAL)
    absent = branch(AUDIO, present=[False] * 4)
    assert torch.allclose(fusion(None, v).features, fusion(absent, v).features, atol=1e-6)


def test_late_fusion_counts_the_logits_that_are_there():
    fusion = system("late")
    a, v = branch(AUDIO, 3, [True, True, False]), branch(VISUAL, 3, [True, False, True])
    torch.nn.init.constant_(fusion.balance, 1.0)
    got, share = fusion(a, v).logits, torch.sigmoid(torch.tensor(1.0))
    logs = a.logits.log_softmax(-1), v.logits.log_softmax(-1)
    assert torch.allclose(got[0], share * logs[0][0] + (1 - share) * logs[1][0])
    assert torch.equal(got[1], logs[0][1]) and torch.equal(got[2], logs[1][2])
    assert torch.equal(fusion(None, branch(VISUAL)).logits, branch(VISUAL).logits.log_softmax(-1))


@pytest.mark.parametrize("other", [None, branch(VISUAL, 2)])
def test_late_fusion_needs_logits(other):
    headless = BranchOutput(features=torch.randn(2, 8, AUDIO))
    with pytest.raises(MmferError, match="a branch has none.*n_emotions"): system("late")(headless, other)


@given(n=st.integers(1, 12))
def test_late_fusion_takes_the_number_of_emotions_from_the_branches(n):
    a, v = BranchOutput(logits=torch.randn(3, n)), BranchOutput(logits=torch.randn(3, n))
    for given_ in ((a, v), (a, None), (None, v)): assert system("late")(*given_).logits.shape == (3, n)


# --- gradients and precision

@pytest.mark.parametrize("kind", SYSTEMS)
def test_gradients_reach_every_parameter(kind):
    fusion = system(kind).train()
    a, v = branch(AUDIO, present=[True, False, True, True]), branch(VISUAL, present=[True, True, False, True])
    answer(fusion(a, v)).pow(3).sum().backward()
    assert [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", SYSTEMS)
def test_runs_under_bf16_autocast(kind):
    a, v = branch(AUDIO, present=[True, False, True, True]), branch(VISUAL, present=[True, True, False, True])
    for b in (a, v): b.features, b.logits = b.features.bfloat16(), b.logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16): assert answer(system(kind)(a, v)).isfinite().all()


# --- who sees whom

def who_sees_whom(backbone, length=16, width=64):
    x = torch.randn(1, length, width, requires_grad=True)
    out = backbone(x).last_hidden_state[0]
    grads = [torch.autograd.grad(out[i].square().sum(), x, retain_graph=True)[0] for i in range(length)]
    return torch.cat(grads).abs().sum(-1) > 0


@pytest.mark.parametrize("layers, causal, behind, ahead", [
    (1, True, 2, 0), (2, True, 4, 0), (3, True, 15, 0),
    (1, False, 1, 1), (2, False, 2, 2), (3, False, 15, 15)])
def test_who_sees_whom(layers, causal, behind, ahead):
    torch.manual_seed(0)
    ones = torch.ones(16, 16, dtype=torch.bool)
    sees = who_sees_whom(Lfm2Backbone(lfm2_config(replace(TINY, layers=layers)), causal))
    assert torch.equal(sees, ones.triu(-behind) & ones.tril(ahead))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_map_respects_the_direction(causal):
    attention = system("lfm2", causal=causal)(branch(AUDIO), branch(VISUAL), output_attentions=True).attention
    assert (attention.triu(1).count_nonzero() == 0) == causal


def test_attention_fusion_looks_across_only():
    attention = system("attention")(branch(AUDIO), branch(VISUAL), output_attentions=True).attention
    for own in (slice(0, None, 2), slice(1, None, 2)): assert attention[..., own, own].count_nonzero() == 0


def test_causal_backbone_is_the_library_s():
    torch.manual_seed(0)
    library = Lfm2Model(lfm2_config(TINY)).eval()
    mine, x = Lfm2Backbone(lfm2_config(TINY)).eval(), torch.randn(2, 16, 64)
    mine.load_state_dict({k: w for k, w in library.state_dict().items() if k != "embed_tokens.weight"})
    assert torch.equal(mine(x).last_hidden_state, library(inputs_embeds=x).last_hidden_state)


def test_both_ways_starts_from_the_same_kind_of_weights():
    torch.manual_seed(0)
    for _, p in Lfm2Backbone(lfm2_config(TINY), causal=False).named_parameters():
        if p.ndim > 1: assert 0.015 < p.std() < 0.025


# --- sizes

def on_meta(preset, kind):
    with torch.device("meta"): return build_fusion(replace(FUSION_PRESETS[preset], kind=kind), 512, 768)


@pytest.mark.parametrize("preset, millions", [("lightweight", 18.8), ("full", 241.5)])
def test_lfm2_of_the_presets_has_the_published_size(preset, millions):
    assert round(count_parameters(on_meta(preset, "lfm2").backbone) / 1e6, 1) == millions


@pytest.mark.parametrize("preset", ["lightweight", "full"])
@pytest.mark.parametrize("kind", ["audio_only", "visual_only", "early", "attention"])
def test_baselines_are_of_comparable_size(preset, kind):
    assert 0.9 < count_parameters(on_meta(preset, kind)) / count_parameters(on_meta(preset, "lfm2")) < 1.1


@pytest.mark.parametrize("wrong, message", [
    (dict(kind="mid"), "audio_only, visual_only"), (dict(heads=5), "64.*5 heads"),
    (dict(kv_heads=3), "4 heads.*3"), (dict(layers=2), "layer 3"), (dict(dropout=-0.1), "dropout")])
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(MmferError, match=message): build_fusion(replace(TINY, **wrong), AUDIO, VISUAL)


def test_wrong_shape_of_features_is_named():
    seven = BranchOutput(torch.randn(2, 7, AUDIO))
    with pytest.raises(AssertionError, match="S should be 8, not 7"): system("lfm2")(seven, None)


# --- weights

@pytest.mark.parametrize("kind", SYSTEMS)
def test_weights_survive_saving(kind, tmp_path):
    first = system(kind)
    second = build_fusion(replace(TINY, kind=kind), AUDIO, VISUAL).eval()
    torch.nn.init.constant_(first.balance if kind == "late" else first.head[1].bias, 0.7)
    save_model(first, tmp_path / "fusion.safetensors")
    load_model(second, tmp_path / "fusion.safetensors")
    a, v = branch(AUDIO), branch(VISUAL)
    assert torch.equal(answer(second(a, v)), answer(first(a, v)))
