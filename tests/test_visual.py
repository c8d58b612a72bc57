"""The visual branch: invariances, gradients, freezing, saving."""
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mmfer import visual
from mmfer.core import MmferError, count_parameters, lengths_to_mask, seed_everything
from mmfer.visual import VISUAL_PRESETS, VisualBranch, VisualConfig, enable_gradient_checkpointing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import roi_study  # noqa: E402

SMALL = dict(
    d_model=32, layers=2, heads=2, ffn=64, image_size=32, patch_size=8, top_k=5, temporal_layers=3,
    temporal_heads=2, attention_share=0.4, n_emotions=5)
close = dict(atol=1e-5, rtol=0)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small(**changes):
    seed_everything(0)
    branch = VisualBranch(VisualConfig(**(SMALL | changes))).eval()
    for p in branch.parameters(): p.data += 0.05 * torch.randn_like(p)  # away from zeros and ones
    return branch


@pytest.fixture(scope="module")
def branch(): return small()


def clips(b, t, seed=0):
    g = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (b, t, 3, 32, 32), generator=g, dtype=torch.uint8)
    return video, torch.rand(b, t, 16, generator=g) < 0.4


def same(a, b):
    for name in ("features", "logits", "frames", "scores", "attention"):
        torch.testing.assert_close(a[name], b[name], **close)
    assert torch.equal(a.kept, b.kept)


# ---- the answer depends on the clip alone ----
@few
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_garbage_after_the_true_length_changes_nothing(branch, lengths, seed):
    lengths = torch.tensor(lengths)
    video, roi = clips(len(lengths), 9, seed)
    video = video / 255
    dirty, dirty_roi = video.clone(), roi.clone()
    for i, n in enumerate(lengths): dirty[i, n:], dirty_roi[i, n:] = float("nan"), ~roi[i, n:]
    with torch.no_grad(): same(branch(video, lengths, roi), branch(dirty, lengths, dirty_roi))


@few
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_clip_alone_is_the_clip_in_a_batch(branch, lengths, seed):
    video, roi = clips(len(lengths), 9, seed)
    with torch.no_grad():
        together = branch(video, torch.tensor(lengths), roi)
        for i, n in enumerate(lengths):
            alone = branch(video[i : i + 1, :n], None, roi[i : i + 1, :n])
            torch.testing.assert_close(alone.logits[0], together.logits[i], **close)
            torch.testing.assert_close(alone.features[0], together.features[i], **close)
            torch.testing.assert_close(alone.frames[0], together.frames[i, :n], **close)
            torch.testing.assert_close(alone.scores[0], together.scores[i, :n], **close)
            assert torch.equal(alone.kept[0], together.kept[i, :n])


@few
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_batch_order_and_batch_size(branch, order, seed):
    video, roi = clips(4, 6, seed)
    lengths = torch.tensor([6, 1, 4, 3])
    with torch.no_grad():
        whole, mixed = branch(video, lengths, roi), branch(video[order], lengths[order], roi[order])
        halves = [branch(video[s], lengths[s], roi[s]) for s in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(mixed.features, whole.features[order], **close)
    torch.testing.assert_close(mixed.logits, whole.logits[order], **close)
    torch.testing.assert_close(torch.cat([h.features for h in halves]), whole.features, **close)


@few
@given(chunk=st.integers(1, 40))
def test_chunks_change_nothing(branch, chunk):
    video, roi = clips(2, 9)
    with torch.no_grad():
        whole = branch(video, None, roi)
        branch.config.chunk, before = chunk, branch.config.chunk
        try: same(branch(video, None, roi), whole)
        finally: branch.config.chunk = before


@pytest.mark.parametrize("t", [1, 2, 3, 7, 8, 9, 16, 31, 90])
def test_any_number_of_frames(branch, t):
    with torch.no_grad(): out = branch(clips(2, t)[0])
    assert out.features.shape == (2, 8, 32) and out.frames.shape == (2, t, 32) and out.kept.shape == (2, t, 5)
    assert all(v.isfinite().all() for v in out.values())
    torch.testing.assert_close(out.attention.sum(-1), torch.ones(2, 8))


def test_uint8_and_float_are_the_same(branch):
    video, roi = clips(2, 3)
    with torch.no_grad(): same(branch(video, None, roi), branch(video / 255, None, roi))


def test_one_mask_for_all_frames(branch):
    video, roi = clips(2, 3)
    every = roi[:, :1].expand(-1, 3, -1)
    with torch.no_grad(): same(branch(video, None, roi[:, 0]), branch(video, None, every))


# ---- tokens in place of pictures ----
@few
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99),
    chunk=st.integers(1, 40))
def test_tokens_give_the_same_answer_to_the_last_bit(branch, lengths, seed, chunk):
    lengths = torch.tensor(lengths)
    video, roi = clips(len(lengths), 9, seed)
    video[lengths == 0] = 0  # what the branch sees in place of missing pictures
    real = lengths_to_mask(lengths.clamp(min=1), 9)
    before, branch.config.chunk = branch.config.chunk, chunk
    try:
        with torch.no_grad():
            tokens = torch.full((len(lengths), 9, 16, 32), float("nan"))  # nothing behind the end may matter
            tokens[real] = branch.encode(video[real])
            want, got = branch(video, lengths, roi), branch(lengths=lengths, roi_mask=roi, tokens=tokens)
    finally: branch.config.chunk = before
    there = lengths > 0
    for name in want: assert torch.equal(want[name][there], got[name][there]), name
    assert all(v.isfinite().all() for v in got.values()) and torch.equal(want.present, got.present)


def test_the_tower_is_not_asked_when_there_are_tokens(branch, monkeypatch):
    monkeypatch.setattr(branch.vision, "forward", lambda *a, **k: pytest.fail("asked"))
    assert branch(tokens=torch.rand(2, 3, 16, 32).half()).logits.dtype == torch.float32


def test_learning_from_tokens_reaches_all_but_the_tower():
    branch = small().train()
    out = branch(tokens=torch.randn(2, 9, 16, 32), roi_mask=clips(2, 9)[1])
    torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 2])).backward()
    silent = {n for n, p in branch.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all(n.startswith("vision.") for n in silent)
    assert all(p.grad is None for p in branch.vision.parameters())


@pytest.mark.parametrize("video, tokens, words", [
    (torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 2, 16, 32), "either video or tokens"),
    (None, None, "either video or tokens"),
    (None, torch.zeros(1, 2, 16, 64), r"tokens have the shape \[1, 2, 16, 64\].*wants \[B, T, 16, 32\]"),
    (None, torch.zeros(1, 2, 12, 32), "encode"), (None, torch.zeros(2, 16, 32), "encode"),
    (None, torch.zeros(1, 0, 16, 32), "encode")])
def test_wrong_tokens_are_refused(branch, video, tokens, words):
    with pytest.raises(MmferError, match=words): branch(video, tokens=tokens)


def test_encode_refuses_frames_of_another_size(branch):
    with pytest.raises(MmferError, match="resize"): branch.encode(torch.zeros(2, 3, 64, 64))


# ---- missing pictures ----
@pytest.mark.parametrize("lengths", [[3, 0], [0, 0]])
def test_length_zero_is_finite_and_marked(lengths):
    branch = small().train().unfreeze()
    video = clips(2, 3)[0] / 255
    video[1] = float("nan")
    out = branch(video, torch.tensor(lengths))
    assert out.present.tolist() == [n > 0 for n in lengths] and out.frame_lengths.tolist() == lengths
    assert all(v.isfinite().all() for v in out.values())
    (out.logits.sum() + out.features.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in branch.parameters())


# ---- learning ----
def test_gradients_reach_every_trainable_parameter():
    branch = small(freeze=False).train()
    out = branch(*clips(2, 9)[:1], torch.tensor([9, 4]), clips(2, 9)[1])
    torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 2])).backward()
    # a key bias shifts all logits of a softmax alike, so its true gradient is zero
    learning = {n for n, p in branch.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    silent = [n for n, _ in branch.named_parameters() if n not in learning and "k_proj.bias" not in n]
    assert silent == []


def test_the_scorer_learns_which_patches_matter():
    "Only the patches on the left carry the class; after training they must be kept more often than chance."
    seed_everything(0)
    roi = visual.ROICompressor(8, k=4)
    head = torch.nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*roi.parameters(), *head.parameters()], lr=0.02)
    def draw(n):
        y, tokens = torch.randint(0, 2, (n,)), torch.randn(n, 16, 8)
        tokens[:, :4, 0], tokens[:, :4, 1] = 4.0, (2.0 * y - 1)[:, None] * 2  # a mark, and the message
        return tokens, y, torch.zeros(n, 16, dtype=torch.bool)
    for _ in range(150):
        tokens, y, none = draw(64)
        loss = torch.nn.functional.cross_entropy(head(roi(tokens, none)[0][:, :4].mean(1)), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    kept = roi(*draw(200)[::2])[2]
    assert (kept < 4).float().mean() > 0.9


def test_roi_raises_scores_even_when_they_are_negative(branch):
    video, _ = clips(1, 4)
    roi = torch.zeros(1, 4, 16, dtype=torch.bool)
    roi[..., 5:8] = True
    with torch.no_grad(): plain, pushed = branch(video).scores, branch(video, None, roi).scores
    torch.testing.assert_close(pushed - plain, branch.roi.roi_bias * roi)
    assert branch.roi.roi_bias > 0


def test_kept_patches_are_sorted_and_the_best(branch):
    with torch.no_grad(): out = branch(clips(2, 3)[0])
    assert (out.kept.diff(dim=-1) > 0).all()
    worst_kept = out.scores.gather(2, out.kept).amin(-1)
    others = out.scores.scatter(2, out.kept, -torch.inf).amax(-1)
    assert (worst_kept >= others).all()


# ---- the gates that are drawn are the gates that were used ----
@few
@given(k=st.integers(1, 16), frames=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_gates_are_what_the_kept_tokens_were_multiplied_with(k, frames, seed):
    seed_everything(seed)
    roi = visual.ROICompressor(8, k)
    tokens = torch.randn(frames, 16, 8)
    with torch.no_grad(): compressed, scores, kept, gates = roi(tokens, torch.rand(frames, 16) < 0.4)
    of_kept = tokens.gather(1, kept[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(compressed[:, :k], gates[..., None] * of_kept)
    torch.testing.assert_close(gates.mean(1), torch.ones(frames))
    torch.testing.assert_close(gates.log().diff(dim=1), scores.gather(1, kept).diff(dim=1), **close)


def test_the_gates_of_the_output_are_those_of_the_compressor(branch):
    "Found in what the pool gets: the kept patches there are the tokens times the gates that come out."
    video, roi = clips(2, 3)
    lengths = torch.tensor([3, 2])
    real = lengths_to_mask(lengths, 3)
    pooled = []
    hook = branch.pool.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    try:
        with torch.no_grad():
            out = branch(video, lengths, roi)
            tokens = branch.encode(video[real])
    finally: hook.remove()
    of_kept = tokens.gather(1, out.kept[real][..., None].expand(-1, -1, 32))
    torch.testing.assert_close(pooled[0][:, :5], out.gates[real][..., None] * of_kept)
    assert out.gates.shape == out.kept.shape and out.gates[~real].count_nonzero() == 0


# ---- freezing, memory ----
def test_freeze_and_unfreeze_count():
    branch = small(layers=3)
    block = count_parameters(branch.vision.encoder.layers[0])
    rest = count_parameters(branch) - count_parameters(branch.vision)
    assert count_parameters(branch, trainable=True) == rest
    assert count_parameters(branch.unfreeze(last_n=2), trainable=True) == rest + 2 * block + 2 * 32
    assert count_parameters(branch.unfreeze(), trainable=True) == count_parameters(branch)
    assert count_parameters(branch.freeze(), trainable=True) == rest
    for n in (0, 4): pytest.raises(MmferError, branch.unfreeze, last_n=n)


def _saved_bytes(branch, frames):
    "Bytes that the vision tower keeps for the backward pass."
    total = []

    def note(x):
        total.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = branch.vision(frames).last_hidden_state
    return sum(total), out


def test_gradient_checkpointing_same_gradients_less_memory():
    frames = torch.rand(2, 3, 32, 32)
    plain = small(freeze=False).train()
    thrifty = enable_gradient_checkpointing(small(freeze=False).train())
    (more, a), (less, b) = _saved_bytes(plain, frames), _saved_bytes(thrifty, frames)
    a.square().sum().backward(), b.square().sum().backward()
    for p, q in zip(plain.vision.parameters(), thrifty.vision.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    assert less < more / 2
    assert _saved_bytes(small(), frames)[0] == 0  # a frozen tower keeps nothing


# ---- files ----
def test_save_and_load(tmp_path, branch):
    branch.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == branch.state_dict().keys()
    again = VisualBranch.from_pretrained(tmp_path)
    assert again.config == branch.config
    with torch.no_grad(): same(again(clips(2, 3)[0]), branch(clips(2, 3)[0]))


def test_a_saved_branch_with_a_lost_weight_or_a_strange_key_is_refused(tmp_path, branch):
    branch.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("roi.roi_bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(MmferError, match="roi.roi_bias"): VisualBranch.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"topk": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmferError, match="topk"): VisualBranch.from_pretrained(tmp_path)


def test_presets_have_their_counts():
    with torch.device("meta"): built = {name: VisualBranch.from_preset(name) for name in VISUAL_PRESETS}
    towers = {n: count_parameters(b.vision) for n, b in built.items() if n != "tiny"}
    assert towers == {"lightweight": 85_797_120, "full": 85_797_120}
    assert count_parameters(built["tiny"]) < 500_000
    kinds = {n: [type(b).__name__ for b in built[n].temporal.blocks] for n in built}
    g, a = "GSCB", "TemporalAttention"
    assert kinds == {"tiny": [g, a], "lightweight": [g, g, g, a], "full": [g, g, a, g, g, a]}
    assert built["full"].config.grid ** 2 == 196


@pytest.mark.parametrize("changes, words", [
    (dict(top_k=17), "17 does not fit 16 patches"), (dict(top_k=0), "top_k"),
    (dict(image_size=30), "no multiple"), (dict(heads=3), "32 cannot be cut into 3 heads"),
    (dict(temporal_heads=5), "32 cannot be cut into 5 temporal_heads"), (dict(topk=3), "topk"),
    (dict(attention_share=1.1), "attention_share"), (dict(n_emotions=-1), "n_emotions")])
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(MmferError, match=words): VisualBranch(VisualConfig(**(SMALL | changes)))


def test_an_unknown_preset_is_told_the_known_ones():
    with pytest.raises(MmferError, match="huge.*tiny, lightweight, full"): VisualBranch.from_preset("huge")


@pytest.mark.parametrize("n", [0, 1, 3, 11])
def test_as_many_logits_as_emotions(n):
    branch = small(n_emotions=n)
    with torch.no_grad(): logits = branch(clips(2, 3)[0]).logits
    assert logits is None if n == 0 else logits.shape == (2, n)
    assert any(name.startswith("head.") for name, _ in branch.named_parameters()) == (n > 0)


@pytest.mark.parametrize("video, words", [
    (torch.zeros(1, 2, 3, 64, 64), "resize"), (torch.zeros(1, 2, 32, 32, 3), "resize"),
    (torch.zeros(1, 0, 3, 32, 32), "resize"),
    (torch.full((1, 2, 3, 32, 32), 200.0), "between 0 and 1")])
def test_wrong_video_is_refused(branch, video, words):
    with pytest.raises(MmferError, match=words): branch(video)


def test_the_chapter_shows_what_the_study_of_roi_has_measured():
    results = ROOT / "benchmarks" / "results" / "roi_study.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    cells = json.loads((ROOT / "nbs" / "07_visual.ipynb").read_text(encoding="utf-8"))["cells"]
    chapter = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for tower in roi_study.TOWERS: assert roi_study.table(rows, tower) in chapter
