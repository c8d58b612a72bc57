"""Names, tables, splits and batches: what must hold for any folder and any set of actors."""
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfer.core import EMOTIONS, MmferError
from mmfer.datasets import (LUNA_FOLDS, RAVDESS_ACTORS, SCHEMES, ClipDataset, Split, clip_table, collate, find_media,
                            file_fingerprint, make_splits, model_inputs, parse_name, split_by_repetition, split_table)
from mmfer.toy import make_toy

def two_digits(most): return st.integers(1, most)


actor_sets = st.sets(st.integers(1, 2000), min_size=3, max_size=60)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def name(emotion=3, intensity=1, statement=1, repetition=1, actor=5, modality=1, channel=1, suffix=".mp4"):
    return "-".join(f"{v:02d}" for v in (modality, channel, emotion, intensity, statement, repetition, actor)) + suffix


# names

@given(st.tuples(*map(two_digits, (3, 2, 8, 2, 2, 99, 99))))
def test_every_valid_name_round_trips(fields):
    stem = "-".join(f"{v:02d}" for v in fields)
    assert tuple(vars(parse_name(f"some/folder/{stem}.mp4")).values()) == fields


@pytest.mark.parametrize("bad", ["holiday.mp4", "1001_DFA_ANG_XX.flv", "01-01-03-01-01-01.mp4", "01-01-03-01-01-01-05-01.mp4",
                                 "01-01-03-01-01-01-5.mp4", "01-01-00-01-01-01-05.mp4", "01-01-09-01-01-01-05.mp4",
                                 "04-01-03-01-01-01-05.mp4", "01-03-03-01-01-01-05.mp4", "01-01-03-03-01-01-05.mp4",
                                 "01-01-03-01-01-01-00.mp4", "01-01-03-01-01-01-05 (1).mp4"])
def test_a_foreign_name_is_refused_by_name(bad, tmp_path):
    with pytest.raises(MmferError, match="rename it") as error: clip_table(touch(tmp_path, name(), f"Actor_05/{bad}"))
    assert bad in str(error.value) and "\n" not in str(error.value)


# tables

def test_the_table_says_what_the_name_says(tmp_path):
    row = clip_table(touch(tmp_path, f"deep/er/{name(emotion=8, intensity=2, statement=2, repetition=2, actor=12)}")).iloc[0]
    assert (row.emotion, row.label, row.intensity, row.statement, row.repetition) == ("surprised", 7, 2, 2, 2)
    assert (row.actor, row.gender, row["clip"]) == (12, "female", "01-01-08-02-02-02-12")
    assert EMOTIONS[row.label] == row.emotion


def test_twins_and_song_are_dropped(tmp_path):
    both = [name(emotion=e) for e in (1, 2)]
    twins = [name(modality=2), name(modality=3, suffix=".wav"), name(modality=1, channel=2), name(modality=3, channel=2, suffix=".wav")]
    table = clip_table(touch(tmp_path, *both, *twins))
    assert table["clip"].tolist() == [n[:-4] for n in both]
    assert clip_table(tmp_path, modality="03")["clip"].tolist() == [name(modality=3)[:-4]]
    assert clip_table(tmp_path, channel="song")["clip"].tolist() == [name(channel=2)[:-4]]


def test_the_order_on_disk_and_the_layout_do_not_matter(tmp_path, monkeypatch):
    names = [name(emotion=e, actor=a) for e in (1, 4, 7) for a in (2, 1, 10)]
    tables = []
    for layout in ("{n}", "Actor_{a}/{n}", "x/y{a}/z/{n}"):
        random.Random(layout).shuffle(names)
        folder = touch(tmp_path / str(len(tables)), *(layout.format(n=n, a=n[-6:-4]) for n in names))
        real = type(folder).rglob
        monkeypatch.setattr(type(folder), "rglob", lambda self, p: reversed(sorted(real(self, p))))
        tables.append(clip_table(folder).drop(columns="path"))
        monkeypatch.undo()
    assert tables[0].equals(tables[1]) and tables[1].equals(tables[2])
    assert tables[0]["clip"].is_monotonic_increasing


def test_other_and_hidden_files_do_not_count(tmp_path):
    touch(tmp_path, name(), f"._{name()}", ".cache/copy.mp4", "truth.json", "README.txt", "Actor_01.zip")
    assert [p.name for p in find_media(tmp_path)] == [name()]


def test_the_same_clip_twice_is_refused_with_both_paths(tmp_path):
    touch(tmp_path, f"Actor_05/{name()}", f"again/{name()}")
    with pytest.raises(MmferError, match="Actor_05.*again.*same clip"): clip_table(tmp_path)


@pytest.mark.parametrize("files, how, says", [
    ([], {}, "folder with sound or video"),
    ([name(modality=3, suffix=".wav")], {}, r"speech with sound only \(03-\)"),
    ([name()], {"channel": "song"}, r"speech with sound and pictures \(01-\)"),
    ([name()], {"channel": "opera"}, "speech, song"),
    ([name()], {"modality": "1"}, "01, 02, 03")])
def test_nothing_found_says_what_is_there(tmp_path, files, how, says):
    with pytest.raises(MmferError, match=says): clip_table(touch(tmp_path, *files), **how)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(MmferError, match="nowhere is not a folder"): clip_table(tmp_path / "nowhere")


# splits

@settings(deadline=None)
@given(actor_sets, st.sampled_from(SCHEMES), st.integers(0, 99))
def test_no_actor_is_in_two_parts_and_none_is_lost(actors, scheme, seed):
    for split in make_splits(actors, scheme, seed):
        parts = [*split.train, *split.val, *split.test]
        assert sorted(parts) == sorted(actors)
        assert split.train and split.val and split.test


@settings(deadline=None)
@given(actor_sets, st.sampled_from(("hicmae", "luna")), st.integers(0, 99))
def test_folds_test_each_actor_once(actors, scheme, seed):
    assert sorted(a for split in make_splits(actors, scheme, seed) for a in split.test) == sorted(actors)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=3).filter(lambda a: len(set(a)) >= 3), st.sampled_from(SCHEMES), st.randoms())
def test_order_and_repeats_of_actors_do_not_matter(actors, scheme, rng):
    shuffled = rng.sample(actors * 2, 2 * len(actors))
    assert make_splits(shuffled, scheme, 3) == make_splits(actors, scheme, 3)


def test_published_folds():
    assert [s.test for s in make_splits(RAVDESS_ACTORS, "hicmae")] == [list(range(i, i + 4)) for i in range(1, 25, 4)]
    assert [s.test for s in make_splits(RAVDESS_ACTORS, "luna")] == LUNA_FOLDS
    assert make_splits(RAVDESS_ACTORS) == [Split(list(range(1, 17)), [17, 18, 19, 20], [21, 22, 23, 24])]


def test_validation_actors_are_men_and_women():
    for split in make_splits(RAVDESS_ACTORS, "hicmae", seed=5):
        assert sum(a % 2 for a in split.val) == 2 and len(split.val) == 4


def test_another_seed_draws_other_validation_actors():
    first, second = (make_splits(RAVDESS_ACTORS, "hicmae", seed) for seed in (0, 1))
    assert first != second and [s.test for s in first] == [s.test for s in second]


def test_other_corpora_are_told_that_the_scheme_is_adapted(caplog):
    assert make_splits(range(1, 9)) == [Split([1, 2, 3, 4, 5], [6], [7, 8])]
    assert "8 actors" in caplog.text
    caplog.clear()
    make_splits(RAVDESS_ACTORS)
    assert not caplog.text


def test_overlap_cannot_be_made():
    for parts in (([1, 2], [2], [3]), ([1, 2], [3], [1]), ([1], [2, 3], [3])):
        with pytest.raises(MmferError, match="is in"): Split(*parts)


@pytest.mark.parametrize("actors, how, says", [
    ([5] * 60, {}, "split_by_repetition"), ([1, 2], {}, "3 or more"), ([1, 2, 3], {"n_val": 2}, "left for train"),
    (RAVDESS_ACTORS, {"n_val": 20}, "left for train"), (RAVDESS_ACTORS, {"scheme": "random"}, "single, hicmae, luna")])
def test_impossible_splits(actors, how, says):
    with pytest.raises(MmferError, match=says): make_splits(actors, **how)


def test_a_split_of_other_actors_is_refused(tmp_path):
    table = clip_table(touch(tmp_path, *(name(actor=a) for a in (1, 2, 3))))
    assert {k: v.actor.tolist() for k, v in split_table(table, Split([1], [3], [2])).items()} == {"train": [1], "val": [3], "test": [2]}
    for split in (Split([1], [], [2]), Split([1], [3], [2, 4])):
        with pytest.raises(MmferError, match="make the split from this table"): split_table(table, split)


def test_one_actor_is_split_by_take(tmp_path):
    names = [name(emotion=e, statement=s, repetition=r) for e in range(1, 9) for s in (1, 2) for r in (1, 2)]
    parts = split_by_repetition(clip_table(touch(tmp_path, *names)))
    assert sorted(c for rows in parts.values() for c in rows["clip"]) == sorted(n[:-4] for n in names)
    assert set(parts["train"].repetition) == {1} and set(parts["test"].repetition) == {2}
    assert all(set(rows.label) == set(range(8)) for rows in parts.values())


def test_one_take_only_cannot_be_split(tmp_path):
    with pytest.raises(MmferError, match="add second takes"): split_by_repetition(clip_table(touch(tmp_path, name())))


# items and batches

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return clip_table(make_toy(tmp_path_factory.mktemp("toy"), actors=1, clips_per_actor=4, workers=1, progress=False))


def test_an_item_is_read_once_and_handed_out_fresh(toy, monkeypatch):
    dataset = ClipDataset(toy, n_frames=4)
    first = dataset[0]
    first.pop("audio")
    monkeypatch.setattr("mmfer.datasets.read_clip", lambda *a, **k: pytest.fail("read again"))
    assert set(dataset[0]) == {"audio", "video", "label", "clip"}
    assert dataset[0]["video"].shape == (4, 3, 64, 64) and dataset[0]["video"].dtype == torch.uint8


def test_only_what_was_asked_for(toy):
    assert set(ClipDataset(toy, modalities=("audio",))[0]) == {"audio", "label", "clip"}
    assert set(ClipDataset(toy, modalities=("video",), keep=False)[0]) == {"video", "label", "clip"}


@settings(deadline=None)
@given(st.lists(st.tuples(st.none() | st.integers(1, 9), st.none() | st.integers(1, 5)), min_size=1, max_size=6))
def test_collate_keeps_every_value_and_length(sizes):
    items = [dict(label=i % 8, clip=str(i)) | ({"audio": torch.rand(a)} if a else {})
             | ({"video": torch.randint(256, (v, 3, 2, 2), dtype=torch.uint8)} if v else {}) for i, (a, v) in enumerate(sizes)]
    batch = collate(items)
    for key in ("audio", "video"):
        assert batch[f"{key}_lengths"].tolist() == [len(x.get(key, ())) for x in items]
        for i, x in enumerate(items):
            if key in x: assert torch.equal(batch[key][i, : len(x[key])], x[key])
        assert (batch[key] is None) == (not any(key in x for x in items))
    assert batch["labels"].tolist() == [x["label"] for x in items] and batch["clip"] == [x["clip"] for x in items]


masks = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=5)


@settings(deadline=None)
@given(masks)
def test_masks_are_padded_and_false_where_there_is_none(sizes):
    items = [dict(label=0, clip=str(i)) | ({"video": torch.zeros(n, 3, 2, 2, dtype=torch.uint8)} if n else {})
             | ({"roi_mask": torch.ones(n, 4, dtype=torch.bool)} if n and mask else {}) for i, (n, mask) in enumerate(sizes)]
    batch = collate(items)
    if not any(n and mask for n, mask in sizes): assert "roi_mask" not in batch; return
    assert batch["roi_mask"].shape == (*batch["video"].shape[:2], 4) and batch["roi_mask"].dtype == torch.bool
    for row, (n, mask) in zip(batch["roi_mask"], sizes): assert row[:n].all() == (mask or not n) and not row[n:].any() and (mask or not row.any())
    assert model_inputs(batch)["roi_mask"] is batch["roi_mask"]


def test_tokens_take_the_place_of_pictures():
    items = [dict(label=i, clip=str(i), video_tokens=torch.rand(n, 4, 2).half()) for i, n in enumerate((3, 5))] + [dict(label=2, clip="2")]
    batch = collate(items)
    assert batch["video"] is None and batch["video_tokens"].shape == (3, 5, 4, 2) and batch["video_tokens"].dtype == torch.float16
    assert batch["video_lengths"].tolist() == [3, 5, 0]
    for i in (0, 1): assert torch.equal(batch["video_tokens"][i, : len(items[i]["video_tokens"])], items[i]["video_tokens"])
    assert set(model_inputs(batch)) == {"audio_lengths", "video_lengths", "video_tokens"}


def test_tokens_and_pictures_in_one_batch_are_refused():
    items = [dict(label=0, clip="a.mp4", video=torch.zeros(1, 3, 2, 2)), dict(label=0, clip="b.mp4", video_tokens=torch.zeros(1, 4, 2))]
    with pytest.raises(MmferError, match="b.mp4 comes as tokens and a.mp4 as pictures"): collate(items)


# what later chapters ask a dataset without decoding

def test_labels_and_fingerprints_need_no_decoding(toy, monkeypatch):
    dataset = ClipDataset(toy, n_frames=4)
    monkeypatch.setattr("mmfer.datasets.read_clip", lambda *a, **k: pytest.fail("decoded"))
    assert dataset.labels == toy.label.tolist() and all(type(label) is int for label in dataset.labels)
    names = [dataset.fingerprint(i) for i in range(4)]
    assert len(set(names)) == 4 and all(n.startswith(c) for n, c in zip(names, toy["clip"]))
    assert ClipDataset(toy, n_frames=5).fingerprint(0) != names[0] != ClipDataset(toy, n_frames=4, size=32).fingerprint(0)


def test_a_fingerprint_follows_the_bytes_not_the_place_or_the_date(tmp_path):
    for folder, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").write_bytes(content)
        os.utime(tmp_path / folder / "x.mp4", (ord(folder) if folder != "c" else ord("a"),) * 2)
    a, b, c = (file_fingerprint(tmp_path / folder / "x.mp4", 16) for folder in "abc")
    assert a == b != c and a != file_fingerprint(tmp_path / "a" / "x.mp4", 17)
    with pytest.raises(MmferError, match="gone.mp4 cannot be read"): file_fingerprint(tmp_path / "gone.mp4")


def test_without_video(toy):
    dataset = ClipDataset(toy, n_frames=4, keep=False)
    rest = dataset.without_video()
    assert set(rest[1]) == {"audio", "label", "clip"} and rest.labels == dataset.labels
    assert torch.equal(rest[1]["audio"], dataset[1]["audio"]) and "video" in dataset[1]


# real recordings

def test_sixty_clips_of_one_actor(shared_data):
    table = clip_table(shared_data / "ravdess_actor05_crops")
    assert len(table) == 60 and set(table.actor) == {5}
    assert {k: len(v) for k, v in split_by_repetition(table).items()} == {"train": 30, "val": 15, "test": 15}
    batch = collate([ClipDataset(table, n_frames=4, size=32)[i] for i in (0, 59)])
    assert batch["video"].shape == (2, 4, 3, 32, 32) and (batch["audio_lengths"] > 2 * 16000).all()


def test_the_silent_twin_is_dropped(shared_data):
    folder = shared_data / "ravdess_original"
    assert len(find_media(folder)) == 7 and len(clip_table(folder)) == 6
    silent = clip_table(folder, modality="02")
    with pytest.raises(MmferError, match="02-01-03-01-01-02-05.mp4.*silent"): ClipDataset(silent, n_frames=2)[0]


def test_sound_only_corpus(shared_data):
    folder = shared_data / "ravdess_speech"
    table = clip_table(folder, modality="03")
    assert len(table) == 1200 and table.emotion.value_counts().to_dict() == {e: 80 if e == "neutral" else 160 for e in EMOTIONS}
    assert ClipDataset(table, modalities=("audio",))[0]["audio"].dtype == torch.float32
    with pytest.raises(MmferError, match=r"03-\)"): clip_table(folder)
    with pytest.raises(MmferError, match="no picture"): ClipDataset(table)[0]


def test_another_corpus_is_refused(shared_data):
    with pytest.raises(MmferError, match="1001_DFA_ANG_XX.flv has no RAVDESS name"): clip_table(shared_data / "cremad")
