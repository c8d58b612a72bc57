"""Names, tables and splits: what must hold for any folder, any CSV file and any set of speakers."""
import itertools
import random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfer.core import MmferError
from mmfer.corpus import (
    LUNA_FOLDS, RAVDESS_EMOTIONS, RAVDESS_SPEAKERS, SCHEMES, Corpus, Split, find_media, make_splits,
    parse_name)


def up_to(most): return st.integers(1, most)


speaker_sets = st.sets(st.text("abcdefgh0123456789 _-", min_size=1, max_size=8), min_size=3, max_size=60)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def name(emotion=3, intensity=1, statement=1, repetition=1, actor=5, modality=1, channel=1, suffix=".mp4"):
    numbers = modality, channel, emotion, intensity, statement, repetition, actor
    return "-".join(f"{v:02d}" for v in numbers) + suffix


def table_of(folder, **how): return Corpus.from_folder(folder, **how).table


def csv_in(folder, *lines, header="path,emotion,speaker"):
    path = folder / "mine.csv"
    path.write_text("\n".join((header, *lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ravdess(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ravdess")
    numbers = itertools.product(range(1, 9), (1, 2), (1, 2), (1, 2), range(1, 25))
    return Corpus.from_folder(touch(folder, *(name(*n) for n in numbers if n[:2] != (1, 2))))


# names

@given(st.tuples(*map(up_to, (3, 2, 8, 2, 2, 99, 99))))
def test_every_valid_name_round_trips(fields):
    stem = "-".join(f"{v:02d}" for v in fields)
    assert tuple(vars(parse_name(f"some/folder/{stem}.mp4")).values()) == fields


@pytest.mark.parametrize("bad", ["holiday.mp4", "1001_DFA_ANG_XX.flv", "01-01-03-01-01-01.mp4",
                                 "01-01-03-01-01-01-05-01.mp4",
                                 "01-01-03-01-01-01-5.mp4", "01-01-00-01-01-01-05.mp4",
                                 "01-01-09-01-01-01-05.mp4", "04-01-03-01-01-01-05.mp4",
                                 "01-03-03-01-01-01-05.mp4", "01-01-03-03-01-01-05.mp4",
                                 "01-01-03-01-01-01-00.mp4", "01-01-03-01-01-01-05 (1).mp4"])
def test_a_foreign_name_is_refused_by_name(bad, tmp_path):
    with pytest.raises(MmferError, match="rename it") as error:
        table_of(touch(tmp_path, name(), f"Actor_05/{bad}"))
    assert bad in str(error.value) and "\n" not in str(error.value)


# tables

def test_the_table_says_what_the_name_says(tmp_path):
    clip = name(emotion=8, intensity=2, statement=2, repetition=2, actor=12)
    row = table_of(touch(tmp_path, f"deep/er/{clip}")).iloc[0]
    assert (row.emotion, row.label, row.intensity, row.statement, row.repetition) == ("surprised", 7, 2, 2, 2)
    assert (row.speaker, row.gender, row["clip"]) == ("12", "female", "01-01-08-02-02-02-12")


PUBLISHED = {1: "neutral", 2: "calm", 3: "happy", 4: "sad", 5: "angry", 6: "fearful", 7: "disgust",
             8: "surprised"}


@pytest.mark.parametrize("number", PUBLISHED)
def test_every_emotion_has_the_number_that_its_authors_published(tmp_path, number):
    row = table_of(touch(tmp_path, name(emotion=number))).iloc[0]
    assert row.emotion == PUBLISHED[number] == RAVDESS_EMOTIONS[row.label]


def test_twins_and_song_are_dropped(tmp_path):
    both = [name(emotion=e) for e in (1, 2)]
    sound = [name(modality=3, suffix=".wav"), name(modality=3, channel=2, suffix=".wav")]
    twins = [name(modality=2), name(modality=1, channel=2), *sound]
    table = table_of(touch(tmp_path, *both, *twins))
    assert table["clip"].tolist() == [n[:-4] for n in both]
    assert table_of(tmp_path, modality="03")["clip"].tolist() == [name(modality=3)[:-4]]
    assert table_of(tmp_path, channel="song")["clip"].tolist() == [name(channel=2)[:-4]]


def test_the_order_on_disk_and_the_layout_do_not_matter(tmp_path, monkeypatch):
    names = [name(emotion=e, actor=a) for e in (1, 4, 7) for a in (2, 1, 10)]
    tables = []
    for layout in ("{n}", "Actor_{a}/{n}", "x/y{a}/z/{n}"):
        random.Random(layout).shuffle(names)
        folder = touch(tmp_path / str(len(tables)), *(layout.format(n=n, a=n[-6:-4]) for n in names))
        real = type(folder).rglob
        monkeypatch.setattr(type(folder), "rglob", lambda self, p: reversed(sorted(real(self, p))))
        tables.append(table_of(folder).drop(columns="path"))
        monkeypatch.undo()
    assert tables[0].equals(tables[1]) and tables[1].equals(tables[2])
    assert tables[0]["clip"].is_monotonic_increasing


def test_other_and_hidden_files_do_not_count(tmp_path):
    touch(tmp_path, name(), f"._{name()}", ".cache/copy.mp4", "truth.json", "README.txt", "Actor_01.zip")
    assert [p.name for p in find_media(tmp_path)] == [name()]


def test_the_same_clip_twice_is_refused_with_both_paths(tmp_path):
    touch(tmp_path, f"Actor_05/{name()}", f"again/{name()}")
    with pytest.raises(MmferError, match="Actor_05.*again.*same clip"): table_of(tmp_path)


@pytest.mark.parametrize("files, how, says", [
    ([], {}, "folder with sound or video"),
    ([name(modality=3, suffix=".wav")], {}, r"speech with sound only \(03-\)"),
    ([name()], {"channel": "song"}, r"speech with sound and pictures \(01-\)"),
    ([name()], {"channel": "opera"}, "speech, song"),
    ([name()], {"modality": "1"}, "01, 02, 03")])
def test_nothing_found_says_what_is_there(tmp_path, files, how, says):
    with pytest.raises(MmferError, match=says): table_of(touch(tmp_path, *files), **how)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(MmferError, match="nowhere is not a folder"): table_of(tmp_path / "nowhere")


# a corpus

def frame(*rows): return pd.DataFrame(rows, columns=["path", "clip", "emotion", "speaker"])


rows = st.lists(st.tuples(st.sampled_from(("keen", "bored", "glad")), st.sampled_from("abcd")), min_size=1,
                max_size=30)


@given(rows, st.permutations(["keen", "bored", "glad"]), st.randoms())
def test_labels_are_places_among_the_emotions_in_any_order_of_rows(rows, emotions, rng):
    table = frame(*((f"{i}.mp4", f"c{i:02}", e, s) for i, (e, s) in enumerate(rows)))
    corpus = Corpus(table, emotions)
    shuffled = Corpus(table.sample(frac=1, random_state=rng.randrange(99)), emotions)
    assert shuffled.table.equals(corpus.table) and corpus.table["clip"].is_monotonic_increasing
    assert [emotions[label] for label in corpus.table.label] == corpus.table.emotion.tolist()
    again = corpus.with_emotions(emotions[::-1])
    assert [emotions[::-1][label] for label in again.table.label] == again.table.emotion.tolist()


def test_parts_of_a_corpus_keep_emotions_and_name(ravdess):
    few = ravdess.of(["03", "07"])
    assert (few.speakers, few.name, len(few)) == (["03", "07"], "RAVDESS", 120)
    assert few.emotions == RAVDESS_EMOTIONS
    assert set(ravdess.where(ravdess.table.emotion == "sad").table.label) == {3}


def test_an_emotion_that_a_model_lacks_is_refused_with_the_clip(ravdess):
    with pytest.raises(MmferError,
                       match=r"01-01-02-.* has the emotion 'calm', which is not one of neutral, happy"):
        ravdess.with_emotions([e for e in RAVDESS_EMOTIONS if e != "calm"])


def test_the_toy_is_not_ravdess(tmp_path):
    touch(tmp_path, name(), "truth.json")
    assert Corpus.from_folder(tmp_path).name == "toy"


# CSV files

def test_a_csv_file_is_read_as_it_stands(tmp_path):
    touch(tmp_path, "a/x 1.mov", "b/y.wav")
    lines = '"a/x 1.mov",keen,7,kitchen', "b/y.wav,bored,007,office"
    corpus = Corpus.open(csv_in(tmp_path, *lines, header="path,emotion,speaker,room"))
    assert corpus.emotions == ("bored", "keen") and corpus.speakers == ["007", "7"] and corpus.name == "csv"
    assert corpus.table["clip"].tolist() == ["x 1", "y"]
    assert corpus.table.room.tolist() == ["kitchen", "office"]
    assert corpus.table.path.tolist() == [str(tmp_path / "a/x 1.mov"), str(tmp_path / "b/y.wav")]
    assert corpus.table.label.tolist() == [1, 0]


def test_a_csv_file_may_name_its_clips_and_the_caller_the_emotions(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/1.mp4")
    path = csv_in(tmp_path, "a/1.mp4,keen,x,one", "b/1.mp4,keen,y,two", header="path,emotion,speaker,clip")
    corpus = Corpus.from_csv(path, emotions=("sad", "keen"))
    assert corpus.table["clip"].tolist() == ["one", "two"] and corpus.table.label.tolist() == [1, 1]


@pytest.mark.parametrize("header, lines, says", [
    ("path,emotion,who", ["a.mp4,keen,x"], "mine.csv has no column 'speaker': give it the columns"),
    ("path,emotion,speaker", ["a.mp4,keen,x", "a.mp4,,x"], "mine.csv has no emotion in line 3"),
    ("path,emotion,speaker", ["gone.mp4,keen,x"], "mine.csv lists .*gone.mp4, which is not there"),
    ("path,emotion,speaker", [], "mine.csv lists no clip"),
    ("path,emotion,speaker,clip", ["a.mp4,keen,x,../a"], "mine.csv names a clip '../a': use letters"),
    ("path,emotion,speaker", ["a.mp4,keen,x", "b/a.mp4,keen,x"],
     "are the same clip: remove one of them, or name them apart")])
def test_a_wrong_csv_file_is_told_in_one_sentence(tmp_path, header, lines, says):
    touch(tmp_path, "a.mp4", "b/a.mp4")
    with pytest.raises(MmferError, match=says) as error: Corpus.open(csv_in(tmp_path, *lines, header=header))
    assert "\n" not in str(error.value)


def test_no_csv_file_and_one_that_is_none(tmp_path):
    with pytest.raises(MmferError, match="gone.csv cannot be read"): Corpus.open(tmp_path / "gone.csv")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)))
    with pytest.raises(MmferError, match="bytes.csv cannot be read"): Corpus.open(tmp_path / "bytes.csv")


def test_an_unknown_emotion_is_refused_by_file(tmp_path):
    path = csv_in(touch(tmp_path, "a.mp4"), "a.mp4,kene,x")
    with pytest.raises(MmferError, match="a.mp4 has the emotion 'kene', which is not one of bored, keen"):
        Corpus.from_csv(path, emotions=("bored", "keen"))


def own_split(tmp_path, *parts):
    people = [f"{n}.mp4,keen,{speaker},{part}" for n, (speaker, part) in enumerate(parts)]
    touch(tmp_path, *(f"{n}.mp4" for n in range(len(parts))))
    return Corpus.open(csv_in(tmp_path, *people, header="path,emotion,speaker,split"))


def test_a_csv_file_may_bring_its_split(tmp_path):
    corpus = own_split(tmp_path, ("a", "test"), ("b", "train"), ("c", "val"), ("a", "test"))
    assert corpus.folds("single") == [Split(["b"], ["c"], ["a"])]
    parts, unseen = corpus.split(seed=3)
    assert unseen
    assert {k: v.speakers for k, v in parts.items()} == {"train": ["b"], "val": ["c"], "test": ["a"]}


def test_a_split_of_ones_own_with_a_speaker_in_two_parts_is_refused(tmp_path):
    corpus = own_split(tmp_path, ("a", "test"), ("b", "train"), ("c", "val"), ("a", "train"))
    with pytest.raises(MmferError, match="speaker a is in train and in test"): corpus.split()
    corpus = own_split(tmp_path, ("a", "tset"), ("b", "train"), ("c", "val"))
    with pytest.raises(MmferError, match="the column split holds train, tset, val: write train, val or test"):
        corpus.split()


# splits

@settings(deadline=None)
@given(speaker_sets, st.sampled_from(SCHEMES), st.integers(0, 99))
def test_no_speaker_is_in_two_parts_and_none_is_lost(speakers, scheme, seed):
    for split in make_splits(speakers, scheme, seed):
        assert sorted([*split.train, *split.val, *split.test]) == sorted(speakers)
        assert split.train and split.val and split.test


@settings(deadline=None)
@given(speaker_sets, st.sampled_from(("hicmae", "luna")), st.integers(0, 99))
def test_folds_test_each_speaker_once(speakers, scheme, seed):
    assert sorted(s for split in make_splits(speakers, scheme, seed) for s in split.test) == sorted(speakers)


@settings(deadline=None)
@given(speaker_sets, st.sampled_from(SCHEMES), st.randoms())
def test_order_and_repeats_of_speakers_do_not_matter(speakers, scheme, rng):
    listed = sorted(speakers) * 2
    assert make_splits(rng.sample(listed, len(listed)), scheme, 3) == make_splits(speakers, scheme, 3)


def test_published_folds(ravdess):
    fours = [RAVDESS_SPEAKERS[i:i + 4] for i in range(0, 24, 4)]
    assert [s.test for s in ravdess.folds("hicmae")] == fours and fours[1] == ["05", "06", "07", "08"]
    assert [s.test for s in ravdess.folds("luna")] == LUNA_FOLDS and LUNA_FOLDS[4] == ["01", "04", "09", "22"]
    single, = ravdess.folds("single")
    assert single == Split(RAVDESS_SPEAKERS[:16], RAVDESS_SPEAKERS[16:20], RAVDESS_SPEAKERS[20:])


def test_validation_speakers_are_men_and_women(ravdess):
    gender = ravdess.table.groupby("speaker").gender.first()
    for split in ravdess.folds("hicmae", seed=5):
        assert gender[split.val].value_counts().to_dict() == {"male": 2, "female": 2}


def test_another_seed_draws_other_validation_speakers(ravdess):
    first = ravdess.folds("hicmae", 0)
    second = ravdess.folds("hicmae", 1)
    assert first != second and [s.test for s in first] == [s.test for s in second]


def test_a_part_of_ravdess_is_told_that_the_scheme_is_adapted(ravdess, caplog):
    few = ravdess.of(RAVDESS_SPEAKERS[:8])
    assert few.folds("single") == [Split(RAVDESS_SPEAKERS[:5], ["06"], ["07", "08"])]
    assert "8 actors" in caplog.text
    caplog.clear()
    ravdess.folds("single")
    assert not caplog.text


def test_overlap_cannot_be_made():
    for parts in (("ab", "b", "c"), ("ab", "c", "a"), ("a", "bc", "c")):
        with pytest.raises(MmferError, match="is in"): Split(*parts)


@pytest.mark.parametrize("speakers, how, says", [
    (["05"] * 60, {}, "3 or more"), ("ab", {}, "3 or more"), ("abc", {"n_val": 2}, "left for train"),
    (RAVDESS_SPEAKERS, {"n_val": 20}, "left for train"),
    (RAVDESS_SPEAKERS, {"scheme": "random"}, "single, hicmae, luna")])
def test_impossible_splits(speakers, how, says):
    with pytest.raises(MmferError, match=says): make_splits(speakers, **how)


def test_a_split_of_other_speakers_is_refused(ravdess):
    three = ravdess.of(["01", "02", "03"])
    parts = three.parts(Split(["01"], ["03"], ["02"]))
    assert {k: v.speakers for k, v in parts.items()} == {"train": ["01"], "val": ["03"], "test": ["02"]}
    for split in (Split(["01"], [], ["02"]), Split(["01"], ["03"], ["02", "04"])):
        with pytest.raises(MmferError, match="make the split from this corpus"): three.parts(split)


def test_one_actor_is_split_by_take(ravdess):
    alone = ravdess.of(["11"])
    parts, unseen = alone.split()
    assert not unseen
    assert sorted(c for part in parts.values() for c in part.table["clip"]) == alone.table["clip"].tolist()
    assert set(parts["train"].table.repetition) == {1} and set(parts["test"].table.repetition) == {2}
    assert all(set(part.table.label) == set(range(8)) for part in parts.values())


@given(st.integers(4, 9), st.integers(2, 5), st.integers(0, 9))
def test_one_speaker_without_takes_is_dealt_out(clips, n, seed):
    emotions = [f"e{i}" for i in range(n)]
    table = frame(*((f"{e}{i}.mp4", f"{e}{i}", e, "me") for e in emotions for i in range(clips)))
    parts, unseen = Corpus(table, emotions).split(seed)
    assert not unseen
    assert sorted(c for part in parts.values() for c in part.table["clip"]) == sorted(table["clip"])
    assert all(set(part.table.emotion) == set(emotions) for part in parts.values())
    assert abs(2 * len(parts["train"]) - len(table)) <= n


def test_one_take_or_too_few_clips_cannot_be_split(tmp_path):
    with pytest.raises(MmferError, match="add second takes"):
        Corpus.from_folder(touch(tmp_path, name())).split()
    with pytest.raises(MmferError, match="add at least four clips"):
        Corpus(frame(("a.mp4", "a", "keen", "me"), ("b.mp4", "b", "keen", "me")), ["keen", "sad"]).split()


# real recordings

def test_sixty_clips_of_one_actor(shared_data):
    corpus = Corpus.from_folder(shared_data / "ravdess_actor05_crops")
    assert len(corpus) == 60 and corpus.speakers == ["05"]
    assert {k: len(v) for k, v in corpus.split()[0].items()} == {"train": 30, "val": 15, "test": 15}


def test_the_silent_twin_is_dropped(shared_data):
    folder = shared_data / "ravdess_original"
    assert len(find_media(folder)) == 7 and len(Corpus.from_folder(folder)) == 6


def test_sound_only_corpus(shared_data):
    folder = shared_data / "ravdess_speech"
    counts = Corpus.from_folder(folder, modality="03").table.emotion.value_counts().to_dict()
    assert counts == {e: 80 if e == "neutral" else 160 for e in RAVDESS_EMOTIONS}
    with pytest.raises(MmferError, match=r"03-\)"): Corpus.from_folder(folder)


def test_another_corpus_is_refused(shared_data):
    with pytest.raises(MmferError, match="1001_DFA_ANG_XX.flv has no RAVDESS name"):
        Corpus.from_folder(shared_data / "cremad")
