"""Pooling and MLP: masks, order, choices, and a class that can be learned."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmfer.classifier import (
    ACTIVATIONS, CLASSIFIER_PRESETS, NORMS, POOLINGS, Classifier, ClassifierConfig, TemporalPool)
from mmfer.core import MmferError, from_dict, lengths_to_mask, seed_everything, to_dict


def pooling(kind):
    "A pool of width 6 whose query, where it has one, is not zero: a query of zero is the mean."
    pool = TemporalPool(6, kind)
    if kind == "attention": pool.query.data.normal_(generator=torch.Generator().manual_seed(1))
    return pool


@pytest.mark.parametrize("kind", POOLINGS)
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    garbage=st.sampled_from([0.0, 1e6, -1e6, float("nan"), float("inf")]))
def test_padding_changes_nothing(kind, lengths, garbage):
    torch.manual_seed(0)
    pool, x, lengths = pooling(kind), torch.randn(len(lengths), 8, 6), torch.tensor(lengths)
    mask = lengths_to_mask(lengths, 8)
    pooled, weights = pool(torch.where(mask[..., None], x, garbage), mask)
    assert (weights[~mask] == 0).all()
    assert_close(weights.sum(1), torch.ones(len(x)))
    for row, n in enumerate(lengths): assert_close(pooled[row], pool(x[row : row + 1, :n])[0][0])


def test_garbage_in_the_padding_cannot_reach_the_query():
    torch.manual_seed(0)
    pool, x, mask = pooling("attention"), torch.randn(2, 8, 6), lengths_to_mask(torch.tensor([8, 3]), 8)
    x[~mask] = float("nan")
    pool(x, mask)[0].sum().backward()
    assert pool.query.grad.isfinite().all() and pool.query.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ("mean", "max", "attention"))
def test_the_order_of_segments_does_not_matter_but_for_last(kind):
    torch.manual_seed(0)
    pool, x = pooling(kind), torch.randn(2, 8, 6)
    assert_close(pool(x.flip(1))[0], pool(x)[0])
    assert not torch.equal(TemporalPool(6, "last")(x.flip(1))[0], TemporalPool(6, "last")(x)[0])


def test_weights_make_the_pooled_vector():
    torch.manual_seed(0)
    x = torch.randn(3, 8, 6)
    for kind in ("mean", "last", "attention"):
        pooled, weights = pooling(kind)(x)
        assert_close((weights[..., None] * x).sum(1), pooled)


def test_max_weights_are_shares_of_features():
    x = torch.tensor([[[9., 0., 0., 0.], [0., 9., 9., 9.]]])
    pooled, weights = TemporalPool(4, "max")(x)
    assert pooled.tolist() == [[9, 9, 9, 9]] and weights.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_clip_without_a_segment_is_an_error(kind):
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(MmferError, match="no real segment"): TemporalPool(3, kind)(torch.zeros(2, 2, 3), mask)


@pytest.mark.parametrize("how", [{"pooling": "median"}, {"norm": "group"}, {"activation": "tanh"}])
def test_unknown_choices_are_refused_by_name(how):
    [wrong] = how.values()
    config = ClassifierConfig(n_emotions=8, **how)
    with pytest.raises(MmferError, match=f"{wrong}.*choose one of"): Classifier(config)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_choice_trains_every_weight(pooling, norm, activation):
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(16, [12, 10], pooling, norm, activation, n_emotions=7))
    logits, attention = classifier(torch.randn(5, 8, 16))
    assert logits.shape == (5, 7) and attention.shape == (5, 8)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())
    assert classifier.mlp[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("preset", CLASSIFIER_PRESETS)
def test_a_config_round_trips(preset):
    config = CLASSIFIER_PRESETS[preset]
    assert from_dict(ClassifierConfig, to_dict(config)) == config


def test_configs_do_not_share_their_widths():
    a, b = ClassifierConfig(), ClassifierConfig()
    a.hidden.append(3)
    assert b.hidden == [512, 256]


def test_attention_finds_the_segment_that_fits_the_query():
    torch.manual_seed(0)
    pool, x = TemporalPool(6), 0.1 * torch.randn(4, 8, 6)
    pool.query.data[2] = 3.0
    places = torch.tensor([0, 3, 5, 7])
    x[torch.arange(4), places, 2] = 2.0
    _, weights = pool(x)
    assert weights.argmax(1).tolist() == places.tolist() and weights.amax(1).min() > 0.9


def test_the_score_is_multiplied_by_the_root_of_the_width():
    x = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    pool = TemporalPool(4)
    pool.query.data[0] = 0.5
    assert_close(pool(x)[1][0], torch.tensor([0.0, 0.5 * 2]).softmax(0))


def test_a_classifier_without_emotions_is_refused():
    with pytest.raises(MmferError, match="n_emotions 0"): Classifier(ClassifierConfig())
    with pytest.raises(MmferError, match="n_emotions"): ClassifierConfig(n_emotions=-1)


@pytest.mark.parametrize("wrong", [dict(hidden=[64, 0]), dict(in_dim=0), dict(dropout=2.0), dict(hiden=[3])])
def test_impossible_settings_are_refused_by_name(wrong):
    [name] = wrong
    with pytest.raises(MmferError, match=name): ClassifierConfig(**wrong)


def test_a_batch_of_one_clip_is_normalised_by_the_running_averages():
    seed_everything(0)
    config = ClassifierConfig(in_dim=6, hidden=[5], n_emotions=3, norm="batch", dropout=0.0)
    model = Classifier(config).train()
    model(torch.randn(5, 8, 6))
    alone = torch.randn(1, 8, 6)
    trained = model(alone)[0]
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm1d)]
    assert norms and all(norm.num_batches_tracked == 1 for norm in norms)
    trained.sum().backward()
    assert torch.equal(trained, model.eval()(alone)[0])
