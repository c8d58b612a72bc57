"""The visual branch: invariances, gradients, weights, faces."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from mmfer import visual
from mmfer.core import MmferError, count_parameters, seed_everything
from mmfer.visual import VISUAL_PRESETS, VideoAugment, VisualBranch, VisualConfig, crop_faces, load_siglip, load_yunet, track_face

SMALL = dict(d_model=32, layers=2, heads=2, ffn=64, image_size=32, patch_size=8, top_k=5, temporal_layers=3, temporal_heads=2, attention_share=0.4)
FACE = "01-01-03-01-01-02-05.mp4"
close = dict(atol=1e-5, rtol=0)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small(**changes):
    seed_everything(0)
    branch = VisualBranch(VisualConfig(**(SMALL | changes))).eval()
    for p in branch.parameters(): p.data += 0.05 * torch.randn_like(p)  # away from the zeros and ones of a fresh model
    return branch


@pytest.fixture(scope="module")
def branch(): return small()


def clips(b, t, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, t, 3, 32, 32), generator=g, dtype=torch.uint8), torch.rand(b, t, 16, generator=g) < 0.4


def same(a, b):
    for name in ("features", "logits", "frames", "scores", "attention"): torch.testing.assert_close(a[name], b[name], **close)
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
    with torch.no_grad(): same(branch(video, None, roi[:, 0]), branch(video, None, roi[:, :1].expand(-1, 3, -1)))


# ---- tokens in place of pictures ----
@few
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99), chunk=st.integers(1, 40))
def test_tokens_give_the_same_answer_to_the_last_bit(branch, lengths, seed, chunk):
    lengths = torch.tensor(lengths)
    video, roi = clips(len(lengths), 9, seed)
    video[lengths == 0] = 0  # what the branch sees in place of missing pictures
    real = visual.lengths_to_mask(lengths.clamp(min=1), 9)
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
    assert all(n.startswith("vision.") for n in silent) and not any(p.grad is not None for p in branch.vision.parameters())


@pytest.mark.parametrize("video, tokens, words", [
    (torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 2, 16, 32), "either video or tokens"), (None, None, "either video or tokens"),
    (None, torch.zeros(1, 2, 16, 64), r"tokens have the shape \[1, 2, 16, 64\].*wants \[B, T, 16, 32\]"),
    (None, torch.zeros(1, 2, 12, 32), "encode"), (None, torch.zeros(2, 16, 32), "encode"), (None, torch.zeros(1, 0, 16, 32), "encode")])
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
    silent = [n for n, p in branch.named_parameters() if (p.grad is None or not p.grad.abs().sum() > 0) and "k_proj.bias" not in n]
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
    with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.numel() * x.element_size()) or x, lambda x: x):
        out = branch.vision(frames).last_hidden_state
    return sum(total), out


def test_gradient_checkpointing_same_gradients_less_memory():
    frames = torch.rand(2, 3, 32, 32)
    plain, thrifty = small(freeze=False).train(), small(freeze=False).train().gradient_checkpointing_enable()
    (more, a), (less, b) = _saved_bytes(plain, frames), _saved_bytes(thrifty, frames)
    a.square().sum().backward(), b.square().sum().backward()
    for p, q in zip(plain.vision.parameters(), thrifty.vision.parameters()): torch.testing.assert_close(p.grad, q.grad)
    assert less < more / 2
    assert _saved_bytes(small(), frames)[0] == 0  # a frozen tower keeps nothing


# ---- weights ----
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, bos_token_id=0, eos_token_id=1)
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def _write(folder, weights, config):
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def whole():
    "Weights and config as google/siglip2-base-patch16-224 has them: both towers, `vision_model.` before each vision key."
    seed_everything(1)
    model = SiglipModel(SiglipConfig(vision_config=SIZES, text_config=TEXT))
    weights = model.state_dict()
    assert FC1 in weights and "text_model.head.weight" in weights and "vision_model.head.probe" in weights
    return model, weights, dict(architectures=["SiglipModel"], model_type="siglip", vision_config=SIZES | {"model_type": "siglip_vision_model"}, text_config=TEXT)


@pytest.mark.parametrize("form", ["whole", "vision", "vision with prefix"])
def test_load_a_checkpoint_in_the_real_format(tmp_path, whole, form):
    model, weights, config = whole
    if form != "whole":
        config = SIZES | {"model_type": "siglip_vision_model"}
        weights = {k if "prefix" in form else k.removeprefix("vision_model."): v for k, v in weights.items() if k.startswith("vision_model.")}
    branch = VisualBranch(VisualConfig(**SMALL)).load_siglip(_write(tmp_path / "w", weights, config))
    frames = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): want, got = model.vision_model(frames), branch.vision(frames)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-6, rtol=0)
    assert got.pooler_output is None and not hasattr(branch.vision, "head")
    assert branch.weights_from == str(tmp_path / "w") and not any(p.requires_grad for p in branch.vision.parameters())
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
    Siglip2VisionModel(Siglip2VisionConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}, num_patches=16)).save_pretrained(tmp_path)
    with pytest.raises(MmferError, match="fixed resolution.*embeddings.patch_embedding.weight"): load_siglip(tmp_path)


def test_other_sizes_and_empty_folders_are_refused(tmp_path, whole):
    _, weights, config = whole
    folder = _write(tmp_path / "w", weights, config)
    with pytest.raises(MmferError, match="hidden_size 32 instead of 64"): VisualBranch.from_preset("tiny").load_siglip(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MmferError, match="config.json"): load_siglip(tmp_path / "empty")


def test_save_and_load(tmp_path, branch):
    branch.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == branch.state_dict().keys()
    again = VisualBranch.from_pretrained(tmp_path)
    assert again.config == branch.config and again.weights_from == str(tmp_path)
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
    assert {n: count_parameters(b.vision) for n, b in built.items() if n != "tiny"} == {"lightweight": 85_797_120, "full": 85_797_120}
    assert count_parameters(built["tiny"]) < 500_000
    kinds = {n: [type(b).__name__ for b in built[n].temporal.blocks] for n in built}
    g, a = "GSCB", "TemporalAttention"
    assert kinds == {"tiny": [g, a], "lightweight": [g, g, g, a], "full": [g, g, a, g, g, a]}
    assert built["full"].config.grid ** 2 == 196


@pytest.mark.parametrize("changes, words", [(dict(top_k=17), "17 does not fit 16 patches"), (dict(image_size=30), "no multiple")])
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(MmferError, match=words): VisualBranch(VisualConfig(**(SMALL | changes)))


@pytest.mark.parametrize("video, words", [
    (torch.zeros(1, 2, 3, 64, 64), "resize"), (torch.zeros(1, 2, 32, 32, 3), "resize"), (torch.zeros(1, 0, 3, 32, 32), "resize"),
    (torch.full((1, 2, 3, 32, 32), 200.0), "between 0 and 1")])
def test_wrong_video_is_refused(branch, video, words):
    with pytest.raises(MmferError, match=words): branch(video)


# ---- augmentation ----
def test_one_draw_for_all_frames():
    seed_everything(3)
    still = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(6, -1, -1, -1)
    changed, _ = VideoAugment(32)(still)
    assert changed.shape == still.shape and changed.dtype == torch.uint8 and type(changed) is torch.Tensor
    assert (changed == changed[:1]).all() and not torch.equal(changed, still)
    assert not torch.equal(VideoAugment(32)(still)[0], changed)  # another clip, another draw


def test_augmentation_is_seeded_and_moves_the_mask_with_the_picture():
    "The mask marks the white corner of the picture; after each draw it must still do so."
    video = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    video[..., :16, :16] = 255
    roi = torch.zeros(2, 4, 4, dtype=torch.bool)
    roi[:, :2, :2] = True
    for seed in range(8):
        seed_everything(seed); a, m = VideoAugment(32, colour=0.0)(video, roi.flatten(1))
        seed_everything(seed); b, n = VideoAugment(32, colour=0.0)(video, roi.flatten(1))
        assert torch.equal(a, b) and torch.equal(m, n)
        bright = a[:, 0].unflatten(1, (4, 8)).unflatten(3, (4, 8)).float().mean((2, 4)) > 127.5
        assert torch.equal(bright.flatten(1), m)


# ---- faces, with invented detections ----
class Detector:
    "Answers with the given boxes, one list a frame, in the form of OpenCV."
    def __init__(self, frames): self.frames = iter(frames)
    def setInputSize(self, size): pass
    def detect(self, picture):
        faces = next(self.frames)
        return 1, np.array([[x, y, w, h, *[0] * 10, 0.9] for x, y, w, h in faces], np.float32) if faces else None


BLANK = np.zeros((8, 100, 160, 3), np.uint8)


def test_a_steady_face_gives_a_steady_square():
    track = track_face(Detector([[(60, 30, 30, 40)]] * 8), BLANK, margin=0.25)
    np.testing.assert_allclose(track.boxes, [[60, 30, 90, 70]] * 8)
    assert track.squares.tolist() == [[45, 20, 105, 80]] * 8 and track.seen.all() and track.message == ""


def test_several_faces_the_largest_is_followed_and_the_user_told():
    faces = [[(10, 10, 10, 10), (60 + t, 30, 30, 40)] for t in range(8)]
    faces[3] = faces[3][::-1]  # the detector has no fixed order
    track = track_face(Detector(faces), BLANK, name="two.mp4")
    assert (np.abs(track.boxes[:, 0] - (60 + np.arange(8))) < 1).all()
    assert track.message == "two.mp4: 2 faces are in the picture, the largest is followed"


def test_a_face_that_leaves_is_held_and_has_no_mask(monkeypatch):
    detector = Detector([[(60, 30, 30, 40)]] * 5 + [[]] * 3)
    track = track_face(detector, BLANK, name="gone.mp4")
    assert track.seen.tolist() == [True] * 5 + [False] * 3
    np.testing.assert_allclose(track.boxes, [[60, 30, 90, 70]] * 8)
    assert track.message == "gone.mp4: the face was not found in 3 of 8 frames, its last place is used there without a mask"


def test_a_gap_is_bridged_from_both_sides():
    faces = [[(40, 30, 30, 40)]] * 3 + [[]] * 2 + [[(52, 30, 30, 40)]] * 3
    boxes = track_face(Detector(faces), BLANK).boxes
    assert (np.diff(boxes[:, 0]) >= 0).all() and 40 < boxes[3, 0] < boxes[4, 0] < 52


def test_jitter_is_smoothed():
    jump = [0, 4] * 10
    track = track_face(Detector([[(60 + j, 30, 30, 40)] for j in jump]), np.zeros((20, 100, 160, 3), np.uint8))
    assert np.abs(np.diff(track.boxes[:, 0])).max() < 1.5


def test_squares_stay_inside_the_picture_and_keep_their_size():
    faces = [[(x, 60, 30, 40)] for x in np.linspace(-20, 150, 8)]
    squares = track_face(Detector(faces), BLANK, margin=0.5).squares
    assert (squares[:, :2] >= 0).all() and (squares[:, 2] <= 160).all() and (squares[:, 3] <= 100).all()
    assert len({(x1 - x0, y1 - y0) for x0, y0, x1, y1 in squares.tolist()}) == 1
    huge = track_face(Detector([[(10, -20, 140, 140)]] * 8), BLANK).squares
    assert (huge[:, 3] - huge[:, 1] == 100).all()  # never larger than the picture


def test_no_face_is_an_error_that_says_what_to_do():
    with pytest.raises(MmferError, match='empty.mp4: no face was found in any of 8 frames; pass faces="none"'):
        track_face(Detector([[]] * 8), BLANK, name="empty.mp4")


def test_crop_faces_warns_of_two_faces_and_refuses_none():
    two = [[(60, 30, 30, 40), (10, 10, 10, 10)]] * 8
    with pytest.warns(UserWarning, match="two.mp4: 2 faces are in the picture"): crops = crop_faces(BLANK, Detector(two), name="two.mp4")
    np.testing.assert_allclose(crops.track.boxes, [[60, 30, 90, 70]] * 8)
    assert crops.roi_mask.any(1).all() and not crops.roi_mask.all(1).any()
    with pytest.raises(MmferError, match="empty.mp4: no face"): crop_faces(BLANK, Detector([[]] * 8), name="empty.mp4")


def test_faces_none_keeps_the_middle_square():
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
    crops = crop_faces(frames, "none", size=40, grid=4)
    assert np.array_equal(crops.frames, frames[:, :, 10:50]) and not crops.roi_mask.any() and crops.track is None


def test_bad_detector_files_are_refused(tmp_path):
    with pytest.raises(MmferError, match="does not exist"): load_yunet(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(MmferError, match="is no YuNet"): load_yunet(tmp_path / "bad.onnx")


# ---- faces, real ones ----
@pytest.fixture
def yunet(shared_data): return load_yunet(shared_data / "yunet" / "yunet_n_dynamic.onnx")


@pytest.mark.parametrize("name, want", [
    (f"ravdess_original/Actor_05/{FACE}", (485, 161, 819, 635)), ("cremad/1001_DFA_ANG_XX.flv", (166, 70, 262, 205))])
def test_real_faces_are_found(shared_data, yunet, name, want):
    "The boxes of the first frame were checked by eye."
    from mmfer.media import read_clip
    frames = read_clip(shared_data / name).frames
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crops = crop_faces(frames, yunet, name=name)
    track = crops.track
    np.testing.assert_allclose(track.boxes[0], want, atol=0.02 * frames.shape[2])
    assert track.seen.all() and crops.frames.shape == (16, 224, 224, 3)
    inside = track.boxes - np.tile(track.squares[:, :2], 2)
    side = (track.squares[:, 2] - track.squares[:, 0])[:, None]
    assert (inside >= 0).all() and (inside <= side).all()
    covered = crops.roi_mask.sum(1) / 196
    area = (inside[:, 2:] - inside[:, :2]).prod(1) / side[:, 0] ** 2
    assert np.abs(covered - area).max() < 0.08 and covered.min() > 0.2


def test_two_real_faces_in_one_picture(shared_data, yunet):
    from mmfer.media import read_clip
    frames = read_clip(shared_data / "cremad" / "1001_DFA_HAP_XX.flv", n_frames=4).frames
    small = np.stack([f[::2, ::2] for f in frames])
    both = np.concatenate([frames, np.pad(small, ((0, 0), (0, frames.shape[1] - small.shape[1]), (0, 0), (0, 0)))], 2)
    with pytest.warns(UserWarning, match="pair.flv: 2 faces are in the picture"): crops = crop_faces(both, yunet, name="pair.flv")
    assert (crops.track.boxes[:, 2] < frames.shape[2]).all()  # the large one, on the left


def test_a_real_face_that_leaves(shared_data, yunet):
    from mmfer.media import read_clip
    frames = read_clip(shared_data / "cremad" / "1001_DFA_SAD_XX.flv", n_frames=8).frames.copy()
    frames[5:] = frames[0, :1, :1]  # an empty wall
    with pytest.warns(UserWarning, match="not found in 3 of 8 frames"): crops = crop_faces(frames, yunet, name="gone.flv")
    assert crops.roi_mask[:5].any(1).all() and not crops.roi_mask[5:].any()
