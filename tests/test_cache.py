"""The cache of patch tokens: the same answer as without it, found by content alone, refused when damaged."""
import errno
import json
import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmfer import cache
from mmfer.cache import CachedTokens, TokenStore, clip_key, encode_clip, entry_bytes, tower_key, use_cache
from mmfer.augment import AugmentedClips
from mmfer.core import MmferError, from_dict, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS, Corpus
from mmfer.model import MultimodalFER, preset_config
from mmfer.prepare import PreparedDataset, prepare, prepared_corpus
from mmfer.processor import ClipDataset, Processor, collate, model_inputs
from mmfer.toy import make_toy
from mmfer.visual import VISUAL_PRESETS, VisualBranch, VisualConfig

CONFIG = replace(VISUAL_PRESETS["tiny"], freeze=True, n_emotions=8)
PROCESSOR = Processor(image_size=64, grid=8, crop_size=64, n_frames=4, faces="none")
CLIPS = 6


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    config = preset_config("tiny", RAVDESS_EMOTIONS)
    config.visual = CONFIG
    model = MultimodalFER(config).eval()
    for p in model.parameters(): p.data += 0.02 * torch.randn_like(p)  # away from zeros and ones
    return model


@pytest.fixture
def branch():
    seed_everything(1)
    return VisualBranch(CONFIG).eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return Corpus.from_folder(make_toy(folder, actors=1, clips_per_actor=CLIPS, workers=1, progress=False))


def clips(corpus, n_frames=4, **changes):
    return ClipDataset(corpus, replace(PROCESSOR, n_frames=n_frames, **changes))


@pytest.fixture
def dataset(corpus): return clips(corpus)


class Masked(ClipDataset):
    "As with real faces: the mask of each clip is another one, and stays when the pictures go."
    def __getitem__(self, i):
        return super().__getitem__(i) | {"roi_mask": torch.arange(64).expand(4, -1) % (i + 2) == 0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    films = make_toy(tmp_path_factory.mktemp("clips"), actors=1, clips_per_actor=3, workers=1, progress=False)
    out = tmp_path_factory.mktemp("prepared")
    prepare(films, out, n_frames=16, crop_size=64, workers=0, progress=False)
    return PreparedDataset(prepared_corpus(out), replace(PROCESSOR, n_frames=16))


def fill(branch, dataset, folder): return use_cache(branch, dataset, folder, progress=False)


def entries(folder): return sorted(folder.rglob("*.npy"))


def batch(dataset): return model_inputs(collate([dataset[i] for i in range(len(dataset))]))


def no_tower(monkeypatch, branch):
    monkeypatch.setattr(branch, "encode", lambda *a: pytest.fail("the tower was asked"))


def no_pictures(monkeypatch):
    monkeypatch.setattr(ClipDataset, "read", lambda *a: pytest.fail("decoded"))


# ---- the same answer ----
def test_items_keep_all_but_the_pictures(model, corpus, tmp_path):
    dataset = Masked(corpus, PROCESSOR)
    cached = fill(model.visual, dataset, tmp_path)
    assert len(cached) == CLIPS and cached.labels == dataset.labels == corpus.table.label.tolist()
    assert cached.corpus is corpus and cached.processor is PROCESSOR
    for i in range(CLIPS):
        want, got = dataset[i], cached[i]
        assert set(got) == set(want) - {"video"} | {"video_tokens"}
        assert got["video_tokens"].dtype == torch.float16
        assert torch.equal(got["audio"], want["audio"]) and torch.equal(got["roi_mask"], want["roi_mask"])
        assert (got["label"], got["clip"]) == (want["label"], want["clip"])


@torch.no_grad()
def test_logits_differ_by_the_rounding_to_float16_and_by_nothing_else(model, corpus, tmp_path):
    dataset = Masked(corpus, PROCESSOR)
    inputs, from_cache = batch(dataset), batch(fill(model.visual, dataset, tmp_path))
    tokens = torch.stack([model.visual.encode(v) for v in inputs.pop("video")])
    kinds = tokens, tokens.half(), from_cache["video_tokens"]
    exact, rounded, cached = (model(**inputs, video_tokens=t) for t in kinds)
    assert torch.equal(cached.logits, rounded.logits)
    assert torch.equal(from_cache["video_tokens"], tokens.half())
    assert ((tokens.half().float() - tokens).abs() <= 2**-11 * tokens.abs().clamp(min=2**-14)).all()
    same = (cached.visual_kept == exact.visual_kept).flatten(1).all(1)  # rounding may swap two of equal rank
    assert same.sum() >= CLIPS - 2
    torch.testing.assert_close(cached.logits[same], exact.logits[same], atol=1e-3, rtol=0)
    torch.testing.assert_close(cached.logits, exact.logits, atol=0.05, rtol=0)


def test_a_training_step_from_the_cache_gives_the_gradients_of_the_rounded_tokens(model, dataset, tmp_path):
    inputs, cached = batch(dataset), batch(fill(model.visual, dataset, tmp_path))
    def gradients(**kwargs):
        model.zero_grad()
        model(**kwargs).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad(): tokens = torch.stack([model.visual.encode(v) for v in inputs.pop("video")]).half()
    want, got = gradients(**inputs, video_tokens=tokens), gradients(**cached)
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    assert "visual.roi.scorer.1.weight" in got and not any(n.startswith("visual.vision.") for n in got)


def test_a_tower_that_learns_is_not_cached(branch, dataset, tmp_path):
    assert fill(branch.unfreeze(last_n=1), dataset, tmp_path / "c") is dataset
    assert not (tmp_path / "c").exists()


# ---- found again, without tower and decoder ----
def test_the_second_start_asks_neither_tower_nor_decoder(branch, corpus, dataset, tmp_path, monkeypatch):
    first = fill(branch, dataset, tmp_path)
    no_tower(monkeypatch, branch)
    with monkeypatch.context() as m:
        no_pictures(m)
        again = fill(branch, clips(corpus), tmp_path)
    assert all(torch.equal(again[i]["video_tokens"], first[i]["video_tokens"]) for i in range(CLIPS))


def test_a_part_shares_the_entries(branch, corpus, dataset, tmp_path, monkeypatch):
    whole = fill(branch, dataset, tmp_path)
    no_tower(monkeypatch, branch)
    part = fill(branch, dataset.select(corpus.where(corpus.table.index >= 4)), tmp_path)
    assert [part[i]["clip"] for i in (0, 1)] == [whole[i]["clip"] for i in (4, 5)]
    assert torch.equal(part[1]["video_tokens"], whole[5]["video_tokens"])


def test_augmented_sound_comes_with_cached_tokens(branch, dataset, tmp_path, monkeypatch):
    cached = fill(branch, dataset, tmp_path)
    no_tower(monkeypatch, branch)
    augmented = AugmentedClips(cached, ["audio"], seed=0)
    for i in range(CLIPS):
        assert torch.equal(augmented[i, 3]["video_tokens"], cached[i]["video_tokens"])
    assert any(not torch.equal(augmented[i, 3]["audio"], cached[i]["audio"]) for i in range(CLIPS))


def test_cached_pictures_cannot_be_augmented(branch, dataset, tmp_path):
    cached = fill(branch, dataset, tmp_path)
    with pytest.raises(MmferError, match="comes as cached tokens.*augment the sound alone"):
        AugmentedClips(cached, ["audio", "video"], seed=0)[0, 0]


def test_a_dataset_without_fingerprints_is_known_by_its_pictures(branch, dataset, tmp_path, monkeypatch):
    plain = [dataset[i] for i in range(3)]
    cached = fill(branch, plain, tmp_path)
    with monkeypatch.context() as m:
        no_tower(m, branch)
        assert set(fill(branch, plain, tmp_path)[2]) == {"audio", "video_tokens", "roi_mask", "label", "clip"}
    changed = [plain[0] | {"video": plain[0]["video"].clone()}]
    changed[0]["video"][3, 2, 63, 63] ^= 1
    assert not torch.equal(fill(branch, changed, tmp_path)[0]["video_tokens"], cached[0]["video_tokens"])


# ---- what changes the key ----
def nudge(branch): branch.vision.encoder.layers[0].mlp.fc1.weight.data[0, 0] += 1e-6


def set_to(name, value): return lambda branch: setattr(branch.vision.config, name, value)


@pytest.mark.parametrize("change", [
    nudge, set_to("num_attention_heads", 2), set_to("layer_norm_eps", 1e-5), set_to("hidden_act", "gelu")])
def test_another_tower_has_another_folder(branch, dataset, tmp_path, change):
    fill(branch, dataset, tmp_path)
    before, key = {p: p.read_bytes() for p in entries(tmp_path)}, tower_key(branch)
    change(branch)
    assert tower_key(branch) != key
    cached = fill(branch, dataset, tmp_path)
    assert len(entries(tmp_path)) == 2 * CLIPS and all(p.read_bytes() == data for p, data in before.items())
    assert all(cached.store.path(n).parent.name == tower_key(branch) for n in cached.names)


def test_what_learns_behind_the_tower_does_not_count(branch):
    key = tower_key(branch)
    for name, p in branch.named_parameters():
        if not name.startswith("vision."): p.data += 1
    branch.config.chunk, branch.config.top_k = 5, 3
    assert tower_key(branch) == key


def on_a_gpu(monkeypatch): monkeypatch.setattr(cache, "_device", lambda branch: torch.device("cuda"))


def test_each_precision_has_a_key_of_its_own(branch, monkeypatch):
    "On a GPU the tower computes in float16. The weights are the same numbers in every format."
    for p in branch.vision.parameters(): p.data = (32 * p.data).round() / 32
    keys = [tower_key(branch)]
    for half in (torch.bfloat16, torch.float16):
        branch.vision.to(half)
        keys.append(tower_key(branch))
    branch.vision.float()
    assert tower_key(branch) == keys[0]
    on_a_gpu(monkeypatch)
    keys.append(tower_key(branch))
    assert len(set(keys)) == 4


def test_entries_of_a_cpu_and_of_a_gpu_are_not_mixed(branch, dataset, tmp_path, monkeypatch):
    "The GPU is played: its tokens are others, and each side gets its own back."
    on_cpu = fill(branch, dataset, tmp_path)
    with monkeypatch.context() as m:
        on_a_gpu(m)
        m.setattr(cache, "encode_clip", lambda *_: np.ones((4, 64, 64), np.float16))
        assert (fill(branch, dataset, tmp_path)[0]["video_tokens"] == 1).all()
    again = fill(branch, dataset, tmp_path)
    assert again.names == on_cpu.names
    assert torch.equal(again[0]["video_tokens"], on_cpu[0]["video_tokens"])


def test_autocast_around_the_filling_changes_nothing(branch, dataset):
    "Else the tokens would have another precision than their key."
    plain = encode_clip(branch, dataset[0])
    with torch.autocast("cpu", torch.bfloat16): inside = encode_clip(branch, dataset[0])
    np.testing.assert_array_equal(inside, plain)


def test_tokens_too_large_for_float16_inside_are_computed_again_in_float32(branch, dataset, monkeypatch):
    encode = branch.encode
    plain = encode_clip(branch, dataset[0])
    asked = []
    def overflow(frames):
        asked.append(torch.is_autocast_enabled("cpu"))
        tokens = encode(frames)
        return tokens.fill_(torch.inf) if len(asked) == 1 else tokens
    monkeypatch.setattr(branch, "encode", overflow)
    with torch.autocast("cpu", torch.bfloat16): again = encode_clip(branch, dataset[0])
    np.testing.assert_array_equal(again, plain)
    assert asked == [False, False]


# ---- folders of other towers ----
def test_a_new_folder_mentions_those_of_other_towers(branch, dataset, tmp_path, capsys):
    fill(branch, dataset, tmp_path)
    old = tmp_path / tower_key(branch)
    size = sum(p.stat().st_size for p in old.iterdir())
    (tmp_path / "something else").mkdir()
    nudge(branch)
    use_cache(branch, dataset, tmp_path)
    [line] = capsys.readouterr().out.splitlines()
    assert f"{tmp_path} also holds {size / 1e9:.3g} GB" in line and old.name in line and "delete" in line
    assert "something else" not in line and tower_key(branch) not in line
    assert len(entries(old)) == CLIPS  # nothing is deleted


def test_the_old_folders_are_mentioned_once_and_only_where_there_are_some(branch, dataset, tmp_path, capsys):
    use_cache(branch, dataset, tmp_path)
    assert capsys.readouterr().out == ""
    nudge(branch)
    use_cache(branch, dataset.select(dataset.corpus.where(dataset.corpus.table.index < 2)), tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1
    use_cache(branch, dataset, tmp_path)  # the folder has begun: the rest is filled without a word
    assert capsys.readouterr().out == "" and len(entries(tmp_path / tower_key(branch))) == CLIPS


def test_a_folder_tells_its_tower(branch, dataset, tmp_path):
    fill(branch, dataset, tmp_path)
    [path] = tmp_path.rglob("tower.json")
    note = json.loads(path.read_text())
    assert note["tower"] == path.parent.name == tower_key(branch)
    assert from_dict(VisualConfig, note["visual"]) == CONFIG


def test_a_changed_clip_and_another_reading_are_computed_anew(branch, corpus, tmp_path):
    table = corpus.table.head(2)
    copy = Corpus(table.assign(path=[str(tmp_path / f"{c}.mp4") for c in table["clip"]]), corpus.emotions)
    def put(sources):
        for source, target in zip(sources, copy.table["path"]):
            with open(source, "rb") as s, open(target, "wb") as t: t.write(s.read())
            os.utime(target, (1, 1))  # date and size alone must not decide
    films = corpus.table["path"]
    put(films[:2])
    first = fill(branch, clips(copy), tmp_path / "c")
    put([films[2], films[1]])
    second = fill(branch, clips(copy), tmp_path / "c")
    assert second.names[0] != first.names[0] and second.names[1] == first.names[1]
    np.testing.assert_array_equal(second[0]["video_tokens"].numpy(), encode_clip(branch, clips(copy)[0]))
    assert len(fill(branch, clips(copy, n_frames=3), tmp_path / "c")[0]["video_tokens"]) == 3
    assert clip_key(clips(copy, margin=0.3), 0) != clip_key(clips(copy), 0)


def test_a_moved_corpus_keeps_its_entries(corpus, dataset, tmp_path):
    moved = corpus.table.assign(path=[str(tmp_path / f"{c}.mp4") for c in corpus.table["clip"]])
    for a, b in zip(corpus.table["path"], moved["path"]): os.symlink(a, b)
    moved = clips(Corpus(moved, corpus.emotions))
    assert [clip_key(moved, i) for i in range(CLIPS)] == [clip_key(dataset, i) for i in range(CLIPS)]


# ---- damage ----
def flip(data): return data[:300] + bytes([data[300] ^ 1]) + data[301:]


@pytest.mark.parametrize("damage", [
    flip, lambda d: d[:-1], lambda d: d[:-40], lambda d: d[:50], lambda d: b"", lambda d: d + b"x",
    lambda d: d[32:], lambda d: d.replace(b"<f2", b"<i2", 1),
    lambda d: d.replace(b"(4, 64, 64)", b"(2, 64, 64)", 1), lambda d: b"\0" * len(d)])
def test_a_damaged_entry_is_refused_by_name(branch, corpus, tmp_path, damage):
    dataset = clips(corpus.where(corpus.table.index == 0))
    fill(branch, dataset, tmp_path)
    (path,) = entries(tmp_path)
    assert (changed := damage(path.read_bytes())) != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(MmferError, match="is damaged.*delete it") as error: fill(branch, dataset, tmp_path)[0]
    assert str(path) in str(error.value)
    path.unlink()
    again = fill(branch, dataset, tmp_path)[0]["video_tokens"]
    np.testing.assert_array_equal(again.numpy(), encode_clip(branch, dataset[0]))


def test_an_entry_of_another_clip_or_tower_is_refused(branch, dataset, tmp_path):
    cached = fill(branch, dataset, tmp_path)
    cached.store.path(cached.names[0]).write_bytes(cached.store.path(cached.names[1]).read_bytes())
    with pytest.raises(MmferError, match=cached.names[0]): cached[0]
    old = cached.store.path(cached.names[2])
    nudge(branch)
    new = fill(branch, dataset, tmp_path)
    new.store.path(new.names[2]).write_bytes(old.read_bytes())
    with pytest.raises(MmferError, match=tower_key(branch)): new[2]


def test_an_entry_that_vanishes_is_told(branch, dataset, tmp_path):
    cached = fill(branch, dataset, tmp_path)
    cached[0]
    for i in (0, 1):
        cached.store.path(cached.names[i]).unlink()
        with pytest.raises(MmferError, match="cannot be read .*No such file.*start again"): cached[i]


# ---- memory ----
def test_an_item_maps_its_own_file_and_writing_to_it_leaves_the_file(branch, dataset, tmp_path):
    cached = fill(branch, dataset, tmp_path)
    before = {p: p.read_bytes() for p in entries(tmp_path)}
    path = cached.store.path(cached.names[3])
    tokens = cached.store.read(cached.names[3])
    assert isinstance(tokens, np.memmap) and os.path.samefile(tokens.filename, path)
    item = cached[3]
    for p in before:
        if p != path: p.rename(p.with_suffix(".away"))
    assert torch.equal(cached[3]["video_tokens"], item["video_tokens"])  # the other files aren't needed
    item["video_tokens"].zero_()
    assert cached[3]["video_tokens"].abs().sum() > 0 and path.read_bytes() == before[path]


def test_a_checked_entry_is_not_hashed_again(branch, dataset, tmp_path, monkeypatch):
    cached = fill(branch, dataset, tmp_path)
    cached[0]
    monkeypatch.setattr(TokenStore, "_require_whole", lambda *a: pytest.fail("checked again"))
    assert cached[0]["video_tokens"].shape == (4, 64, 64)


def test_loaders_with_workers_and_pickling(branch, dataset, tmp_path):
    cached = pickle.loads(pickle.dumps(fill(branch, dataset, tmp_path)))
    loader = DataLoader(cached, 4, collate_fn=collate, num_workers=1, multiprocessing_context="fork")
    with_workers = torch.cat([b["video_tokens"] for b in loader])
    assert torch.equal(with_workers, batch(cached)["video_tokens"])


# ---- filling ----
def test_it_goes_on_where_it_stopped(branch, dataset, tmp_path, monkeypatch):
    encode, done = branch.encode, []
    def encode_three(frames):
        if len(done) == 3: raise KeyboardInterrupt
        done.append(1)
        return encode(frames)
    with monkeypatch.context() as m:
        m.setattr(branch, "encode", encode_three)
        with pytest.raises(KeyboardInterrupt): fill(branch, dataset, tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in entries(tmp_path)}
    assert len(kept) == 3
    fill(branch, dataset, tmp_path)
    assert len(entries(tmp_path)) == CLIPS and {p: p.stat().st_mtime_ns for p in kept} == kept


def slowly_fill(branch, corpus, folder):
    "In a process of its own: slow enough to be killed half way."
    torch.set_num_threads(1)
    encode = branch.encode
    branch.encode = lambda frames: time.sleep(0.1) or encode(frames)
    fill(branch, clips(corpus), folder)


def test_two_processes_at_once_and_one_killed_leave_whole_entries(branch, corpus, dataset, tmp_path):
    process = multiprocessing.get_context("fork").Process
    started = [process(target=slowly_fill, args=(branch, corpus, tmp_path)) for _ in range(3)]
    for p in started: p.start()
    while not entries(tmp_path) and started[0].is_alive(): time.sleep(0.01)
    started[0].kill()
    for p in started: p.join()
    assert [p.exitcode for p in started] == [-signal.SIGKILL, 0, 0]
    names = [clip_key(dataset, i) for i in range(CLIPS)]
    cached = CachedTokens(dataset, TokenStore(tmp_path, tower_key(branch)), names)
    for i in range(CLIPS):
        np.testing.assert_allclose(cached[i]["video_tokens"], encode_clip(branch, dataset[i]), atol=2e-3)


def test_processes_draw_orders_of_their_own(branch, dataset, tmp_path, monkeypatch):
    def order(pid):
        written, store = [], TokenStore(tmp_path / str(pid), "key")
        monkeypatch.setattr(os, "getpid", lambda: pid)
        monkeypatch.setattr(TokenStore, "write", lambda self, name, tokens: written.append(name))
        cache._fill(branch, dataset, store, {clip_key(dataset, i): i for i in range(CLIPS)}, False)
        return written
    one, two = order(1), order(2)
    assert one != two and sorted(one) == sorted(two)


def test_random_numbers_are_left_alone(branch, dataset, tmp_path):
    seed_everything(7)
    fill(branch, dataset, tmp_path)
    drawn = torch.rand(3)
    seed_everything(7)
    assert torch.equal(drawn, torch.rand(3))


# ---- disks ----
def test_a_disk_that_is_too_small_is_refused_before_the_work(branch, dataset, tmp_path, monkeypatch):
    usage = cache.shutil.disk_usage(tmp_path)
    need = CLIPS * 4 * 64 * 64 * 2
    assert need == CLIPS * entry_bytes(CONFIG, 4)
    for free, enough in ((need - 1, False), (need, True)):
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=free))
        if enough: fill(branch, dataset, tmp_path)
        else:
            told = "needs 0.000197 GB.*disk has 0.000197 GB"
            with pytest.raises(MmferError, match=told): fill(branch, dataset, tmp_path)
        assert bool(entries(tmp_path)) == enough


def test_the_size_is_said_before_the_work(branch, dataset, tmp_path, capsys):
    use_cache(branch, dataset, tmp_path)
    assert "caching 0.000197 GB of patch tokens" in capsys.readouterr().err


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half(branch, dataset, tmp_path, monkeypatch):
    real, done = os.replace, []
    def full(a, b):
        if str(b).endswith(".npy") and len(done) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        done.append(b) if str(b).endswith(".npy") else None
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        told = "No space left on device.*what was cached stays"
        with pytest.raises(MmferError, match=told) as error: fill(branch, dataset, tmp_path)
    assert "\n" not in str(error.value)
    assert len(entries(tmp_path)) == 2 and not [p for p in tmp_path.rglob(".*")]
    assert len(fill(branch, dataset, tmp_path)) == CLIPS


# ---- clips that cannot be cached ----
@pytest.mark.parametrize("item", [{}, {"audio": torch.zeros(9)}])
def test_clips_without_pictures_are_named(branch, tmp_path, item):
    mute = [item | {"clip": "mute.wav", "label": 0}]
    with pytest.raises(MmferError, match="mute.wav has no pictures to cache"): fill(branch, mute, tmp_path)


def test_pictures_of_another_size_are_refused(branch, corpus, tmp_path):
    small = clips(corpus, image_size=32)
    with pytest.raises(MmferError, match=r"wants \[B, T, 3, 64, 64\]"): fill(branch, small, tmp_path)


def test_tokens_that_float16_cannot_hold_are_refused(branch, dataset, tmp_path):
    branch.vision.post_layernorm.weight.data *= 1e6
    named = dataset[0]["clip"][:6]
    with pytest.raises(MmferError, match=f"{named}.*cannot hold"): fill(branch, dataset, tmp_path)
    assert entries(tmp_path) == []


def test_a_lost_clip_is_named(branch, corpus, tmp_path):
    lost = clips(Corpus(corpus.table.head(1).assign(path=str(tmp_path / "gone.mp4")), corpus.emotions))
    with pytest.raises(MmferError, match="gone.mp4 cannot be read"): fill(branch, lost, tmp_path)


def test_a_prepared_set_is_decoded_once(branch, prepared, tmp_path, monkeypatch):
    first = fill(branch, prepared, tmp_path)
    monkeypatch.setattr("mmfer.prepare._unpack_pictures", lambda *a: pytest.fail("decoded"))
    again = fill(branch, prepared, tmp_path)
    for i in range(len(prepared)):
        assert torch.equal(again[i]["video_tokens"], first[i]["video_tokens"]) and "video" not in again[i]
        assert again[i]["roi_mask"].shape == (16, 64) and torch.equal(again[i]["audio"], first[i]["audio"])
    assert again.labels == prepared.labels
