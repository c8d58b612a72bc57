"""A prepared set: what it keeps, that nothing changes it, and every way in which preparing can break off."""
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import wavfile
from torch.utils.data import DataLoader

from mmfer import faces, prepare as P, processor
from mmfer.core import MmferError
from mmfer.corpus import RAVDESS_EMOTIONS, Corpus
from mmfer.faces import FaceTrack, squares_around
from mmfer.media import read_clip, write_clip
from mmfer.model import preset_config
from mmfer.prepare import PreparedDataset, corpus_of, open_clips, prepare, prepared_corpus
from mmfer.processor import ClipDataset, Processor, collate
from mmfer.toy import make_toy


few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HOW = dict(n_frames=4, crop_size=64, faces="none", workers=0, progress=False)
PROCESSOR = Processor(image_size=64, grid=8, crop_size=64, n_frames=4, faces="none")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Cartoons that do not say that they are: what is tested is the road of RAVDESS."
    folder = make_toy(tmp_path_factory.mktemp("toy"), actors=2, clips_per_actor=8, seconds=1.5, workers=1,
                      progress=False)
    (folder / "truth.json").unlink()
    return folder


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    "The toy corpus prepared without a break; tests that change a set work on a copy."
    out = tmp_path_factory.mktemp("whole")
    assert prepare(toy, out, **HOW).empty
    return out


@pytest.fixture
def corpus(toy, tmp_path): return Path(shutil.copytree(toy, tmp_path / "corpus"))


@pytest.fixture
def copy(whole, tmp_path): return Path(shutil.copytree(whole, tmp_path / "copy"))


def digests(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def films(folder): return Corpus.from_folder(folder).table


def paths(folder): return [Path(p) for p in films(folder)["path"]]


def dataset(folder, **changes):
    "The clips of a prepared set, as the settings of these tests make them."
    return PreparedDataset(prepared_corpus(folder), Processor(**vars(PROCESSOR) | changes))


def one_sentence(error, *words):
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and all(str(w) in text for w in words), text


# ---- what a set keeps ----
def test_the_corpus_is_that_of_the_clips(toy, whole):
    ours, theirs = prepared_corpus(whole), Corpus.from_folder(toy)
    pd.testing.assert_frame_equal(ours.table.drop(columns="path"), theirs.table.drop(columns="path"))
    assert (ours.emotions, ours.name, ours.speakers) == (theirs.emotions, "RAVDESS", ["01", "02"])
    assert all(Path(p).suffix == ".npz" and Path(p).is_file() for p in ours.table["path"])


def test_a_set_can_be_moved(copy, tmp_path):
    moved = copy.rename(tmp_path / "elsewhere")
    assert len(dataset(moved)[0]["audio"]) > 0


@pytest.mark.parametrize("image_size, grid", [(64, 8), (32, 4), (96, 3)])
def test_items_are_those_of_the_films(toy, whole, image_size, grid):
    processor = Processor(**vars(PROCESSOR) | dict(image_size=image_size, grid=grid))
    raw = ClipDataset(Corpus.from_folder(toy), processor)
    prepared = PreparedDataset(prepared_corpus(whole), processor)
    assert len(prepared) == 16 and prepared.labels == raw.labels
    for got, want in zip(prepared, raw):
        assert got.keys() == want.keys() and (got["clip"], got["label"]) == (want["clip"], want["label"])
        assert got["video"].dtype == torch.uint8 and got["video"].is_contiguous()
        error = (got["video"].int() - want["video"].int()).abs().float()
        assert error.mean() < 2.2  # grey levels, from JPEG; less on large pictures
        peak = want["audio"].abs().max()
        torch.testing.assert_close(got["audio"], want["audio"], rtol=0, atol=float(0.51 / 32767 * peak))
        assert torch.equal(got["roi_mask"], want["roi_mask"]) and got["roi_mask"].shape == (4, grid**2)


def test_clips_keep_their_times(toy, whole):
    clip, film = dataset(whole).read(prepared_corpus(whole).table["path"][2]), PROCESSOR.read(paths(toy)[2])
    assert clip.duration == film.duration
    np.testing.assert_allclose(clip.times, film.times)


@few
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=50).filter(lambda x: np.abs(x).max() > 1e-4))
def test_sound_is_off_by_half_a_step_of_its_peak(samples):
    audio = np.array(samples, np.float32)
    back = P._unpack_sound(P._pack_sound(audio))
    assert back.dtype == np.float32 and np.abs(back - audio).max() <= 0.51 / 32767 * np.abs(audio).max()


@few
@given(seed=st.integers(0, 999), grid=st.integers(1, 16))
def test_masks_come_back_exactly_for_any_grid(tmp_path_factory, seed, grid):
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(0, 200, (5, 2, 2)), 1).reshape(5, 4)
    track = FaceTrack(boxes, squares_around(boxes, 240, 320, 0.2), rng.random(5) < 0.7)
    path = tmp_path_factory.mktemp("one") / "x.npz"
    P._save_parts(path, dict(duration=1.0, boxes=track.boxes, squares=track.squares, seen=track.seen))
    assert np.array_equal(P._unpack_clip(path).track.mask(grid), track.mask(grid))


def test_kept_items_are_not_shared(whole):
    kept = PreparedDataset(prepared_corpus(whole), PROCESSOR, keep=True)
    del kept[0]["audio"]
    assert "audio" in kept[0] and kept[0]["video"] is kept[0]["video"]


def test_without_pictures_none_is_decoded_and_the_mask_stays(whole, monkeypatch):
    want = dataset(whole)[1]
    monkeypatch.setattr(P, "_unpack_pictures", lambda parts: pytest.fail("decoded"))
    got = dataset(whole).without_video()[1]
    assert set(got) == {"label", "clip", "audio", "roi_mask"}
    assert torch.equal(got["roi_mask"], want["roi_mask"])


def test_what_a_model_does_not_use_is_not_read(whole, monkeypatch):
    monkeypatch.setattr(P, "_unpack_pictures", lambda parts: pytest.fail("decoded"))
    assert set(dataset(whole, modalities=("audio",))[0]) == {"label", "clip", "audio"}


def test_pictures_are_known_by_what_decides_them(whole):
    name = dataset(whole).fingerprint(0)
    assert name == dataset(whole, grid=4, modalities=("video",)).fingerprint(0)  # a mask is no picture
    assert name != dataset(whole, image_size=32).fingerprint(0) and name != dataset(whole).fingerprint(1)


def test_loaders_with_processes_give_the_same(whole):
    here, there = (list(DataLoader(dataset(whole), 8, collate_fn=collate, num_workers=n)) for n in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert a["clip"] == b["clip"]
        assert torch.equal(a["video"], b["video"]) and torch.equal(a["audio"], b["audio"])


@pytest.fixture
def sound(toy, tmp_path):
    "A folder of `03-` clips."
    source = Path(shutil.copytree(toy, tmp_path / "sound"))
    for p in sorted(source.rglob("01-*.mp4")): p.rename(p.with_name(f"03{p.name[2:]}"))
    return source


def test_sound_alone(sound, tmp_path):
    out = tmp_path / "out"
    assert prepare(sound, out, modality="03", **HOW).empty
    assert set(dataset(out, modalities=("audio",))[0]) == {"label", "clip", "audio"}
    assert "pictures" not in np.load(prepared_corpus(out).table["path"][0])
    with pytest.raises(MmferError) as e: dataset(out)[0]
    one_sentence(e, prepared_corpus(out).table["path"][0], "prepared without pictures")


# ---- faces ----
@pytest.fixture
def fake_faces(monkeypatch, tmp_path):
    "A detector that sees what it is told in every frame."
    seen = dict(boxes=[[20, 10, 44, 50, 0.9]])
    for module in (P, processor): monkeypatch.setattr(module, "face_detector", lambda faces: "fake")
    boxes = lambda detector, frame: np.array(seen["boxes"], float).reshape(-1, 5)
    monkeypatch.setattr(faces, "detect_faces", boxes)
    return seen


def test_crops_and_masks_are_those_of_the_processor(toy, tmp_path, fake_faces):
    prepare(toy, tmp_path / "out", **HOW | dict(faces="fake.onnx", crop_size=48))
    same = Processor(**vars(PROCESSOR) | dict(faces="fake.onnx", image_size=48, crop_size=48, grid=6))
    got = PreparedDataset(prepared_corpus(tmp_path / "out"), same)[3]
    want = ClipDataset(Corpus.from_folder(toy), same)[3]
    assert torch.equal(got["roi_mask"], want["roi_mask"]) and got["roi_mask"].any()
    assert (got["video"].int() - want["video"].int()).abs().float().mean() < 2.2


def test_the_margin_is_kept(toy, tmp_path, fake_faces):
    how = HOW | dict(faces="fake.onnx")
    prepare(toy, tmp_path / "out", margin=0.4, **how)
    clips = open_clips(tmp_path / "out", tiny(), tmp_path / "unused")
    wide = Processor(**vars(PROCESSOR) | dict(faces="fake.onnx", margin=0.4)).read(paths(toy)[0])
    squares = clips.read(clips.rows[0]["path"]).track.squares
    assert clips.processor.margin == 0.4 and np.array_equal(squares, wide.track.squares)
    with pytest.raises(MmferError, match="margin 0.4, not 0.2"): prepare(toy, tmp_path / "out", **how)


def test_clips_without_a_face_are_bad(toy, tmp_path, fake_faces):
    fake_faces["boxes"] = []
    with pytest.raises(MmferError) as e: prepare(toy, tmp_path / "out", **HOW | dict(faces="fake.onnx"))
    one_sentence(e, "none of 16 clips", "no face was found in any of 4 frames")
    bad = pd.read_csv(tmp_path / "out" / "bad.csv")
    assert len(bad) == 16 and bad["reason"].str.contains("no face was found").all()
    assert clips_are(tmp_path / "out") == []


def test_several_faces_are_told_once(toy, tmp_path, fake_faces, caplog):
    fake_faces["boxes"] = [[20, 10, 44, 50, 0.9], [0, 0, 8, 8, 0.8]]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "mmfer"):
        warnings.simplefilter("error")
        prepare(toy, tmp_path / "out", **HOW | dict(faces="fake.onnx"))
    (told,) = caplog.messages
    assert told.startswith("16 clips") and "2 faces are in the picture" in told


def test_a_missing_detector_stops_before_the_work(toy, tmp_path):
    how = HOW | dict(faces=str(tmp_path / "gone.onnx"))
    with pytest.raises(MmferError, match="does not exist"): prepare(toy, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


# ---- bad clips ----
def clips_are(folder): return sorted(p.stem for p in folder.glob("clips/*.npz"))


def spoil(corpus):
    "Break six clips in six ways; clip -> words of the reason."
    spoiled = paths(corpus)[:6]
    cut, text, silent, deaf, blind, empty = spoiled
    clip = read_clip(silent)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    text.write_text("no film")
    write_clip(silent, clip.frames, 16, np.zeros(24000, np.float32))
    for path, option in ((deaf, "-an"), (blind, "-vn")): remux(path, option)
    empty.write_bytes(b"")
    reasons = ("cut off", "not a media", "silent sound", "no sound track", "no picture track", "not a media")
    return dict(zip((p.stem for p in spoiled), reasons))


def remux(path, without):
    "Take one track out of a film."
    import av
    kind, target = ("video" if without == "-an" else "audio"), path.with_suffix(".tmp.mp4")
    with av.open(str(path)) as box, av.open(str(target), "w") as out:
        stream = getattr(box.streams, kind)[0]
        copied = out.add_stream_from_template(stream)
        for packet in box.demux(stream):
            if packet.dts is None: continue
            packet.stream = copied
            out.mux(packet)
    target.replace(path)


def test_bad_clips_are_listed_and_left_out(toy, whole, corpus, tmp_path):
    wrong, out = spoil(corpus), tmp_path / "out"
    bad = prepare(corpus, out, **HOW)
    assert bad["clip"].tolist() == sorted(wrong)
    for row in bad.itertuples():
        assert row.path in row.reason and wrong[row.clip] in row.reason and "\n" not in row.reason
    pd.testing.assert_frame_equal(pd.read_csv(out / "bad.csv"), bad)
    good = sorted(set(clips_are(whole)) - set(wrong))
    assert clips_are(out) == prepared_corpus(out).table["clip"].tolist() == good
    for path in paths(toy): shutil.copy(path, corpus / path.relative_to(toy))
    assert prepare(corpus, out, **HOW).empty and digests(out) == digests(whole)  # mended


def test_a_good_clip_that_turned_bad_leaves_the_set(corpus, copy):
    wrong = spoil(corpus)
    assert prepare(corpus, copy, **HOW)["clip"].tolist() == sorted(wrong)
    assert not set(wrong) & set(prepared_corpus(copy).table["clip"])


def test_a_clip_that_was_replaced_is_done_anew(toy, corpus, copy):
    first, second = paths(corpus)[:2]
    shutil.copy(second, first)
    prepare(corpus, copy, **HOW)
    clips = dataset(copy)
    assert torch.equal(clips[0]["audio"], clips[1]["audio"])


# ---- the same bytes, however it came about ----
def test_workers_change_nothing(toy, whole, tmp_path):
    assert prepare(toy, tmp_path / "two", **HOW | dict(workers=2)).empty
    assert digests(tmp_path / "two") == digests(whole)


def test_what_is_finished_is_not_done_again(toy, whole, copy):
    lost = clips_are(copy)[::3]
    for clip in lost: (copy / "clips" / f"{clip}.npz").unlink()
    (copy / "table.csv").unlink()
    times = {p: p.stat().st_mtime_ns for p in copy.glob("clips/*.npz")}
    prepare(toy, copy, **HOW)
    assert digests(copy) == digests(whole) and times == {p: p.stat().st_mtime_ns for p in times}


def test_actor_by_actor_is_all_at_once(toy, whole, tmp_path):
    for actor in ("Actor_02", "Actor_01"): prepare(toy / actor, tmp_path / "out", **HOW)
    assert digests(tmp_path / "out") == digests(whole)


def test_bad_clips_of_earlier_actors_stay_listed(corpus, tmp_path):
    wrong = spoil(corpus)
    for actor in ("Actor_01", "Actor_02"): assert len(prepare(corpus / actor, tmp_path / "out", **HOW)) == 3
    assert sorted(pd.read_csv(tmp_path / "out" / "bad.csv")["clip"]) == sorted(wrong)


def test_a_csv_file_adds_its_clips(corpus, tmp_path):
    "The columns stay, the speakers stay text, and a second file of the same emotions is added."
    table = films(corpus)[["path", "emotion"]].assign(mood="plain", speaker=["007", "2e3"] * 8)
    two = table[table.emotion.isin(["happy", "sad"])].reset_index(drop=True)
    parts = dict(some=two.drop_duplicates("emotion"), all=table, two=two)
    for name, rows in parts.items(): rows.to_csv(tmp_path / f"{name}.csv", index=False)
    out = tmp_path / "out"
    prepare(tmp_path / "some.csv", out, **HOW)
    with pytest.raises(MmferError, match="emotions .*, not .*"): prepare(tmp_path / "all.csv", out, **HOW)
    assert len(prepared_corpus(out)) == 2
    prepare(tmp_path / "two.csv", out, **HOW)
    got, want = prepared_corpus(out), Corpus.from_csv(tmp_path / "two.csv")
    assert len(got) == len(two) == 4
    pd.testing.assert_frame_equal(got.table.drop(columns="path"), want.table.drop(columns="path"))
    assert (got.speakers, got.emotions, got.name) == (["007", "2e3"], ("happy", "sad"), "csv")


def csv_of(folder, toy, take):
    "A CSV file of two films, 1.mp4 and 2.mp4, in a folder of its own."
    folder.mkdir()
    rows = films(toy).iloc[2 * take:2 * take + 2]
    for i, path in enumerate(rows["path"], 1): shutil.copy(path, folder / f"{i}.mp4")
    table = rows[["emotion", "speaker"]].assign(path=["1.mp4", "2.mp4"], emotion=["happy", "sad"])
    table.to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


def test_a_name_that_two_csv_files_give_is_refused(toy, tmp_path):
    first, second, out = csv_of(tmp_path / "a", toy, 0), csv_of(tmp_path / "b", toy, 1), tmp_path / "out"
    prepare(first, out, **HOW)
    before = digests(out)
    with pytest.raises(MmferError) as e: prepare(second, out, **HOW)
    one_sentence(e, tmp_path / "a" / "1.mp4", tmp_path / "b" / "1.mp4", "are both the clip 1", "column clip")
    assert digests(out) == before
    pd.read_csv(second).assign(clip=["b1", "b2"]).to_csv(second, index=False)
    prepare(second, out, **HOW)
    assert prepared_corpus(out).table["clip"].tolist() == ["1", "2", "b1", "b2"]


def test_a_film_of_a_csv_file_may_be_replaced_and_moved(toy, tmp_path):
    mine, out = csv_of(tmp_path / "a", toy, 0), tmp_path / "out"
    prepare(mine, out, **HOW)
    before = digests(out)
    shutil.copy(paths(toy)[4], tmp_path / "a" / "1.mp4")  # mended
    prepare(mine, out, **HOW)
    changed = digests(out)
    assert {name for name in before if before[name] != changed[name]} == {"clips/1.npz"}
    prepare((tmp_path / "a").rename(tmp_path / "moved") / "mine.csv", out, **HOW)
    again = digests(out)
    assert all(again[name] == changed[name] for name in changed if name.endswith("npz"))
    assert list(prepared_corpus(out).table["clip"]) == ["1", "2"]


def test_clips_of_another_corpus_are_refused(toy, copy, tmp_path):
    films(toy).to_csv(tmp_path / "mine.csv", index=False)
    before = digests(copy)
    with pytest.raises(MmferError) as e: prepare(tmp_path / "mine.csv", copy, **HOW)
    one_sentence(e, copy, "corpus RAVDESS, not csv")
    assert digests(copy) == before


@pytest.mark.parametrize("change, words", [
    (dict(crop_size=32), "crop_size 64, not 32"), (dict(n_frames=8), "n_frames 4, not 8"),
    (dict(faces=faces.YUNET), "faces none, not opencv/face_detection_yunet")])
def test_other_settings_are_refused(toy, copy, change, words):
    before = digests(copy)
    with pytest.raises(MmferError) as e: prepare(toy, copy, **HOW | change)
    one_sentence(e, copy, words)
    assert digests(copy) == before


def test_settings_bind_nobody_before_the_first_clip(toy, tmp_path, monkeypatch):
    def offline(source, file): raise OSError("no route to host")
    monkeypatch.setattr(faces, "hf_hub_download", offline)
    with pytest.raises(MmferError) as e: prepare(toy, tmp_path / "out", **HOW | dict(faces="some/hub-id"))
    one_sentence(e, "no route to host", "--faces none")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    other = P.PrepareConfig("RAVDESS", ("a", "b"), faces="other")  # of a run that ended here
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(P.to_dict(other)))
    assert prepare(toy, tmp_path / "out", **HOW).empty and P.prepared_config(tmp_path / "out").faces == "none"


def test_a_toy_corpus_needs_no_detector(corpus, tmp_path):
    (corpus / "truth.json").write_text("{}")
    prepare(corpus, tmp_path / "out", **HOW | dict(faces=None))
    config = P.prepared_config(tmp_path / "out")
    assert config.faces == "none" and config.corpus == prepared_corpus(tmp_path / "out").name == "toy"


@pytest.mark.parametrize("wrong", [
    dict(n_frames=0), dict(n_frames=-3), dict(n_frames="16"), dict(n_frames=None), dict(crop_size=0),
    dict(crop_size=64.0), dict(crop_size=True), dict(workers=-1), dict(workers=1.5), dict(margin=-0.1),
    dict(modality="04")])
@pytest.mark.parametrize("workers", [0, None])
def test_impossible_settings_are_refused_before_anything_is_written(toy, tmp_path, wrong, workers):
    with pytest.raises(MmferError) as e: prepare(toy, tmp_path / "out", **HOW | dict(workers=workers) | wrong)
    one_sentence(e, *wrong)
    assert not (tmp_path / "out").exists()


def test_a_lost_clip_of_another_actor_is_never_forgotten(toy, whole, tmp_path, caplog):
    out = tmp_path / "out"
    prepare(toy / "Actor_01", out, **HOW)
    lost = clips_are(out)[2]
    (out / "clips" / f"{lost}.npz").unlink()
    prepare(toy / "Actor_02", out, **HOW)
    assert f"has lost the clip {lost}" in caplog.text
    with pytest.raises(MmferError) as e: prepared_corpus(out)
    one_sentence(e, out, "has lost the clip", lost)
    prepare(toy / "Actor_01", out, **HOW)
    assert digests(out) == digests(whole)


def test_a_changed_clip_of_the_same_length_is_done_anew(corpus, copy):
    path = paths(corpus)[4]
    before = path.stat().st_size
    path.write_bytes(bytes(before))
    assert prepare(corpus, copy, **HOW)["clip"].tolist() == [path.stem] and path.stat().st_size == before


# ---- killed ----
LARGE = HOW | dict(n_frames=16, crop_size=512)  # slow enough to be met in the middle


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


def children(pid):
    "Processes below `pid`, at any depth."
    try: lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError: return []
    direct = [int(c) for c in " ".join(lists).split()]
    return direct + [c for d in direct for c in children(d)]


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError: return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")


@needs_proc
def test_kill_9_loses_only_the_clips_in_work(toy, tmp_path):
    out = tmp_path / "out"
    how = LARGE | dict(workers=2)
    run = multiprocessing.get_context("spawn").Process(target=prepare, args=(toy, out), kwargs=how)
    run.start()
    wait_for(lambda: len(clips_are(out)) >= 3)
    below = children(run.pid)
    assert len(below) >= 2
    run.kill(), run.join()
    wait_for(lambda: not any(map(alive, below)), 60)  # workers don't outlive the parent
    done, half = clips_are(out), [p for p in (out / "clips").iterdir() if p.suffix != ".npz"]
    assert 3 <= len(done) < 16 and len(half) <= 2
    with pytest.raises(MmferError) as e: prepared_corpus(out)
    one_sentence(e, out, "half done")
    times = {c: (out / "clips" / f"{c}.npz").stat().st_mtime_ns for c in done}
    prepare(toy, out, **LARGE)
    assert times == {c: (out / "clips" / f"{c}.npz").stat().st_mtime_ns for c in done}
    prepare(toy, tmp_path / "unbroken", **LARGE)
    for p in half: p.unlink()
    assert digests(out) == digests(tmp_path / "unbroken")


def workers_of_this_process():
    def is_worker(pid): return b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes() and alive(pid)
    return [pid for pid in children(os.getpid()) if is_worker(pid)]


@needs_proc
def test_a_worker_that_dies_is_told(toy, tmp_path):
    out, failed = tmp_path / "out", []
    def work():
        try: prepare(toy, out, **LARGE | dict(workers=2))
        except MmferError as e: failed.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: clips_are(out))
    os.kill(workers_of_this_process()[0], signal.SIGKILL)
    thread.join(120)
    assert not thread.is_alive() and len(failed) == 1
    one_sentence(failed[0], "a worker died while it prepared", ".mp4", "what is finished is kept")
    assert 1 <= str(failed[0]).count(".mp4") <= 2
    assert prepare(toy, out, **LARGE).empty and len(prepared_corpus(out)) == 16


@pytest.fixture
def ctrl_c():
    "Ctrl-C as in a terminal; a process that was started in the background ignores it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@needs_proc
def test_ctrl_c_ends_the_workers_too(toy, tmp_path, ctrl_c):
    out = tmp_path / "out"
    def press():
        wait_for(lambda: clips_are(out))
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt): prepare(toy, out, **LARGE | dict(workers=2))
    thread.join()
    wait_for(lambda: not workers_of_this_process(), 60)
    assert len(clips_are(out)) < 16 and prepare(toy, out, **LARGE).empty


# ---- disk and folders ----
def test_a_full_disk_is_one_sentence(toy, whole, tmp_path):
    "A limit on the size of a file is a full disk that needs no rights: the write fails in the middle."
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = sorted(p.stat().st_size for p in whole.glob("clips/*.npz"))[8]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(MmferError) as e: prepare(toy, out, **HOW)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_sentence(e, out, "cannot be read or written", "make room", "what is finished is kept")
    assert not [p for p in out.rglob(".*")]  # nothing half written is left
    prepare(toy, out, **HOW)
    assert digests(out) == digests(whole)


CODES = (errno.EMFILE, errno.EIO, errno.ENOMEM, errno.ENOSPC)


@pytest.mark.parametrize("fault", [OSError(code, os.strerror(code)) for code in CODES] + ["memory", "inside"])
def test_a_failing_machine_is_no_clips_fault(toy, whole, tmp_path, monkeypatch, fault):
    def fails():
        if fault == "memory":
            error = cv2.error("Insufficient memory")
            error.code = cv2.Error.STS_NO_MEM
            raise error
        if fault == "inside": raise MmferError("x") from OSError(errno.EMFILE, "Too many open files")
        raise fault
    out = tmp_path / "out"
    with monkeypatch.context() as m, pytest.raises(MmferError) as e:
        at_clip(m, 3, fails)
        prepare(toy, out, **HOW)
    one_sentence(e, "this machine failed", "what is finished is kept")
    assert len(clips_are(out)) == 3 and not (out / "bad.csv").exists()
    assert prepare(toy, out, **HOW).empty and digests(out) == digests(whole)


def at_clip(monkeypatch, k, action):
    "Do something when the k-th clip comes up."
    count, pack = iter(range(99)), P._pack_clip
    def packing(*args):
        if next(count) == k: action()
        return pack(*args)
    monkeypatch.setattr(P, "_pack_clip", packing)


def test_a_source_that_vanishes_stops_the_work(corpus, tmp_path, monkeypatch):
    at_clip(monkeypatch, 3, lambda: shutil.rmtree(corpus))
    with pytest.raises(MmferError) as e: prepare(corpus, tmp_path / "out", **HOW)
    one_sentence(e, corpus, "is gone", "what is finished is kept")
    assert len(clips_are(tmp_path / "out")) == 3


def test_a_clip_that_vanishes_is_bad(corpus, tmp_path, monkeypatch):
    last = paths(corpus)[-1]
    at_clip(monkeypatch, 3, last.unlink)
    bad = prepare(corpus, tmp_path / "out", **HOW)
    assert bad["clip"].tolist() == [last.stem] and "No such file" in bad["reason"][0]


def test_a_set_that_vanishes_is_never_called_whole(toy, tmp_path, monkeypatch):
    at_clip(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "out"))
    with pytest.raises(MmferError) as e: prepare(toy, tmp_path / "out", **HOW)
    one_sentence(e, tmp_path / "out", "lost the clip")
    assert not (tmp_path / "out" / "table.csv").exists()


def test_the_set_does_not_go_where_the_clips_are(corpus):
    before = digests(corpus)
    with pytest.raises(MmferError, match="choose another folder"): prepare(corpus, corpus, **HOW)
    assert digests(corpus) == before


# ---- damaged sets ----
def test_a_cut_off_clip_is_told_and_mended(toy, whole, copy):
    path = Path(prepared_corpus(copy).table["path"][5])
    for keep in (0, 10, path.stat().st_size // 2, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(MmferError) as e: dataset(copy)[5]
        one_sentence(e, path, "cannot be read", "delete it and prepare the clips again")
    prepare(toy, copy, **HOW)
    assert digests(copy) == digests(whole)


@pytest.mark.parametrize("name", ["names", "sound", "peak", "boxes", "seen", "pictures", "ends"])
def test_a_part_of_another_name_is_told(whole, tmp_path, name):
    raw = Path(prepared_corpus(whole).table["path"][0]).read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(raw.replace(f"{name}.npy".encode(), f"{name[:-1]}~.npy".encode()))
    with pytest.raises(MmferError) as e: P._unpack_clip(path)
    one_sentence(e, path, "is no whole clip of a prepared set", "delete it and prepare the clips again")


@few
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes(whole, tmp_path_factory, where, bit):
    path = Path(prepared_corpus(whole).table["path"][0])
    want = P._unpack_clip(path)
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "x.npz"
    path.write_bytes(raw)
    try: got = P._unpack_clip(path)
    except MmferError as e: return one_sentence(e, path)
    assert np.array_equal(got.audio, want.audio)  # it hit a date or the like
    assert np.array_equal(got.frames, want.frames)


def test_a_foreign_file_is_no_clip(copy):
    path = Path(prepared_corpus(copy).table["path"][0])
    np.savez(path, x=np.ones(3))
    with pytest.raises(MmferError) as e: dataset(copy)[0]
    one_sentence(e, path, "is no whole clip of a prepared set")


def test_nothing_is_ever_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path(tmp_path / "exploded").touch, ())
    path = tmp_path / "x.npz"
    np.savez(path, names=["sound"], sound=np.array([Bomb()], object))
    with pytest.raises(MmferError, match="cannot be read"): P._load_parts(path, ["sound"])
    assert not (tmp_path / "exploded").exists()


def test_a_lost_clip_is_told(copy):
    clips = dataset(copy)
    path = Path(clips.rows[2]["path"])
    path.unlink()
    with pytest.raises(MmferError) as e: clips[2]
    one_sentence(e, path, "No such file", "prepare the clips again")
    with pytest.raises(MmferError) as e: prepared_corpus(copy)
    one_sentence(e, copy, "has lost the clip", path.stem)


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"colour": 3}', '{"corpus": "x", "emotions": ["a"], "format": 1}'])
def test_damaged_or_foreign_settings_are_refused(toy, copy, text):
    (copy / "prepared.json").write_text(text)
    for call in (lambda: prepared_corpus(copy), lambda: prepare(toy, copy, **HOW)):
        with pytest.raises(MmferError) as e: call()
        one_sentence(e, copy / "prepared.json", "empty folder")


@pytest.mark.parametrize("text", ["", "path\n\"a", "path,clip\nx,y\n"])
def test_a_damaged_table_is_refused(copy, text):
    (copy / "table.csv").write_text(text)
    with pytest.raises(MmferError) as e: prepared_corpus(copy)
    one_sentence(e, copy / "table.csv", "delete it and prepare the clips again")


# ---- one function opens a corpus for a model ----
def tiny(emotions=RAVDESS_EMOTIONS, system="lfm2"): return preset_config("tiny", emotions, system)


def test_open_clips_of_a_folder(toy, whole, tmp_path):
    clips = open_clips(toy, tiny(), tmp_path / "work", faces="none", progress=False)
    assert clips.corpus.table["clip"].tolist() == clips_are(whole)
    assert P.is_prepared(tmp_path / "work") and not P.is_prepared(toy)
    config = P.prepared_config(tmp_path / "work")
    assert (config.crop_size, config.n_frames, config.faces) == (64, 16, "none")  # the model's own size
    part = clips.select(clips.corpus.of(["02"]))
    assert type(part) is PreparedDataset and len(part) == 8
    assert part[1]["clip"] == part.corpus.table["clip"][1] and part[1]["video"].shape == (16, 3, 64, 64)


def test_open_clips_of_a_prepared_set(whole, tmp_path):
    clips = open_clips(whole, tiny(), tmp_path / "work", keep=True)
    assert len(clips) == 16 and not (tmp_path / "work").exists() and clips[0]["video"].shape == (4, 3, 64, 64)
    assert (clips.processor.n_frames, clips.processor.crop_size, clips.processor.faces) == (4, 64, "none")
    clips.processor.require_fit(tiny())


def test_labels_are_in_the_order_of_the_model(whole, tmp_path):
    emotions = tuple(reversed(RAVDESS_EMOTIONS))
    clips = open_clips(whole, tiny(emotions), tmp_path)
    assert clips.corpus.emotions == emotions
    assert clips.labels == [7 - label for label in prepared_corpus(whole).table["label"]]


@pytest.mark.parametrize("form", ["set", "folder"])
def test_an_emotion_that_the_model_lacks_is_refused_before_the_work(toy, whole, tmp_path, form):
    data = whole if form == "set" else toy
    two = tiny(("happy", "neutral"))
    with pytest.raises(MmferError) as e: open_clips(data, two, tmp_path / "work", faces="none")
    one_sentence(e, "has the emotion", "which is not one of happy, neutral")
    assert not (tmp_path / "work").exists()


def test_corpus_of_anything(toy, whole, sound, tmp_path):
    films(toy).to_csv(tmp_path / "mine.csv", index=False)
    told = [(c.name, len(c), c.speakers) for c in map(corpus_of, (toy, whole, sound, tmp_path / "mine.csv"))]
    assert told == [(name, 16, ["01", "02"]) for name in ("RAVDESS", "RAVDESS", "RAVDESS", "csv")]


def test_an_audio_model_opens_a_folder_of_sound(sound, tmp_path):
    clips = open_clips(sound, tiny(system="audio_only"), tmp_path / "work", progress=False)
    assert set(clips[0]) == {"label", "clip", "audio"}
    assert P.prepared_config(tmp_path / "work").modality == "03"
    for data in (sound, tmp_path / "work"):
        with pytest.raises(MmferError) as e: open_clips(data, tiny(), tmp_path / "other")
        one_sentence(e, data, "holds sound only", "audio and video")
    assert not (tmp_path / "other").exists()


def test_an_audio_model_opens_a_csv_of_sound(toy, tmp_path):
    "What a CSV lists need not have pictures; RAVDESS says by its names that a `01-` clip has."
    (tmp_path / "wav").mkdir()
    rows = []
    for i, row in enumerate(films(toy).itertuples()):
        wavfile.write(tmp_path / "wav" / f"{i}.wav", 16000, read_clip(row.path, n_frames=1).audio)
        rows.append(dict(path=f"wav/{i}.wav", emotion=row.emotion, speaker=row.speaker))
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    corpus = corpus_of(tmp_path / "mine.csv")
    model_config = tiny(corpus.emotions, "audio_only")
    clips = open_clips(tmp_path / "mine.csv", model_config, tmp_path / "work", progress=False)
    assert len(clips) == 16 and set(clips[0]) == {"label", "clip", "audio"}


def test_open_clips_prepares_as_the_saved_processor_says(toy, tmp_path):
    saved = Processor(**vars(PROCESSOR) | dict(n_frames=3, margin=0.3))
    clips = open_clips(toy, tiny(), tmp_path / "work", processor=saved, progress=False)
    assert clips.processor == saved and len(clips[0]["video"]) == 3
    with pytest.raises(MmferError, match="the model takes pictures of 64"):
        open_clips(toy, tiny(), tmp_path / "other", processor=Processor(32, 8, faces="none"))


def test_open_clips_goes_on_with_a_half_done_folder(toy, tmp_path, monkeypatch):
    def stop(): raise KeyboardInterrupt
    how = HOW | dict(n_frames=16)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_clip(m, 5, stop)
        prepare(toy, tmp_path / "work", **how)
    with pytest.raises(MmferError, match="half done"): open_clips(tmp_path / "work", tiny(), tmp_path)
    count = iter(range(99))
    monkeypatch.setattr(P, "_save_parts", lambda *args, save=P._save_parts: (next(count), save(*args)))
    clips = open_clips(toy, tiny(), tmp_path / "work", faces="none", workers=0, progress=False)
    assert len(clips) == 16 and next(count) == 11


def test_open_clips_gives_the_clips_that_were_asked_for(corpus, tmp_path, caplog):
    how = dict(faces="none", workers=0, progress=False)
    open_clips(corpus, tiny(), tmp_path / "work", **how)
    gone, text = paths(corpus)[:2]
    gone.unlink()
    text.write_text("no film")
    clips = open_clips(corpus, tiny(), tmp_path / "work", **how)
    assert len(clips) == 14 and text.stem not in set(clips.corpus.table["clip"])
    assert "1 clips are left out" in caplog.text and "not a media file" in caplog.text


def open_slowly(toy, work, counted):
    "In a process of its own, as under `accelerate launch`: count the clips that it prepares."
    real = P._pack_clip
    def packing(*args):
        time.sleep(0.02)
        counted.put(args[0])
        return real(*args)
    P._pack_clip = packing
    clips = open_clips(toy, tiny(), work, faces="none", workers=0, progress=False)
    counted.put(len(clips))


def test_processes_that_start_together_prepare_once(toy, tmp_path):
    context = multiprocessing.get_context("fork")
    counted = context.SimpleQueue()
    started = [context.Process(target=open_slowly, args=(toy, tmp_path / "work", counted)) for _ in range(2)]
    for p in started: p.start()
    told = [counted.get() for _ in range(16 + 2)]
    for p in started: p.join()
    assert [p.exitcode for p in started] == [0, 0] and counted.empty()
    assert told.count(16) == 2 and len(set(told) - {16}) == 16


def of_a_group(rank, store, toy, work):
    "One of two processes whose barriers wait for two seconds; the preparation takes four or more."
    torch.set_num_threads(1)  # threads do not survive a fork
    store = torch.distributed.FileStore(str(store), 2)

    def meet(place):
        "So that a slow machine is not taken for a barrier that waits too long."
        store.set(f"{place} {rank}", "here")
        store.wait([f"{place} 0", f"{place} 1"])
    meet("start")
    two_seconds = timedelta(seconds=2)
    torch.distributed.init_process_group("gloo", timeout=two_seconds, store=store, world_size=2, rank=rank)
    real = P._pack_clip
    P._pack_clip = lambda *args: (time.sleep(0.25), real(*args))[1]
    assert len(open_clips(toy, tiny(), work, faces="none", workers=0, progress=False)) == 16
    meet("end")
    torch.distributed.barrier()
    meet("after")
    os._exit(0)


def test_a_preparation_may_outlast_a_barrier(toy, tmp_path):
    context = multiprocessing.get_context("fork")
    store = tmp_path / "store"
    jobs = [context.Process(target=of_a_group, args=(rank, store, toy, tmp_path / "work")) for rank in (0, 1)]
    for job in jobs: job.start()
    for job in jobs: job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(prepared_corpus(tmp_path / "work")) == 16


# ---- a download that is not finished ----
def downloading(folder, asked, came=()):
    "What `download` writes down in the folder that it fills."
    folder.mkdir(exist_ok=True)
    note = dict(asked=list(asked), actors={speaker: ["a clip"] for speaker in came})
    (folder / "downloaded.json").write_text(json.dumps(note))
    return folder


def test_a_set_that_a_download_fills_is_opened_with_those_who_came(toy, tmp_path, monkeypatch, caplog):
    out = downloading(tmp_path / "out", ["01", "02", "03"])
    prepare(toy / "Actor_01", out, **HOW)
    def stop(): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_clip(m, 3, stop)
        prepare(toy / "Actor_02", out, **HOW)
    clips = open_clips(out, tiny(), tmp_path / "unused")
    assert clips.corpus.speakers == ["01"] and len(clips) == 8 and len(clips_are(out)) == 11
    [told] = caplog.messages
    one_sentence(told, out, "is not finished", "02, 03 of RAVDESS", "run it again", "8 clips")
    downloading(out, ["01"])  # all have come: what lies there beside them has another reason
    with pytest.raises(MmferError, match="half done: run its download again"): prepared_corpus(out)


def test_a_finished_download_is_opened_in_silence(toy, tmp_path, caplog):
    out = downloading(tmp_path / "out", ["01", "02"])
    prepare(toy, out, **HOW)
    assert len(open_clips(out, tiny(), tmp_path / "unused")) == 16 and not caplog.messages
    (out / "clips" / f"{clips_are(out)[0]}.npz").unlink()
    with pytest.raises(MmferError, match="has lost the clip .*: run its download again"): prepared_corpus(out)


def test_clips_of_an_unfinished_download_are_prepared(corpus, tmp_path, caplog):
    downloading(corpus, ["01", "02", "07"])
    clips = open_clips(corpus, tiny(), tmp_path / "work", faces="none", workers=0, progress=False)
    [told] = caplog.messages
    assert len(clips) == 16
    one_sentence(told, corpus, "is not finished, 07 of RAVDESS will be missing")


def test_a_download_of_which_nobody_has_come_is_told(tmp_path):
    folder = downloading(tmp_path / "set", ["01"])
    for call in (lambda: open_clips(folder, tiny(), tmp_path / "work"), lambda: corpus_of(folder),
                 lambda: prepare(folder, tmp_path / "work", **HOW)):
        with pytest.raises(MmferError) as e: call()
        one_sentence(e, folder, "a download of which no clip has come yet: run it again")
    assert not (tmp_path / "work" / "prepared.json").exists()


def test_a_prepared_set_is_not_prepared_again(copy, tmp_path):
    with pytest.raises(MmferError, match="is a prepared set already"): prepare(copy, tmp_path / "out", **HOW)


# ---- real faces and voices ----
@pytest.fixture
def yunet(shared_data): return str(shared_data / "yunet" / "yunet_n_dynamic.onnx")


def best_of(n, f):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def test_real_clips_are_small_and_twenty_times_faster(shared_data, yunet, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    originals = sorted((shared_data / "ravdess_original" / "Actor_05").glob("01-*.mp4"))[:2]
    for p in originals: (source / p.name).symlink_to(p)
    raw = best_of(1, lambda: prepare(source, out, faces=yunet, workers=0, progress=False)) / 2
    same = Processor(image_size=224, grid=14, faces=yunet)
    clips = PreparedDataset(prepared_corpus(out), same)
    prepared = best_of(5, lambda: clips[0])
    assert raw > 20 * prepared, f"{raw:.3f} s and {prepared:.4f} s per clip"
    assert 1440 * np.mean([Path(row["path"]).stat().st_size for row in clips.rows]) < 1e9
    got, want = clips[0], ClipDataset(Corpus.from_folder(source), same)[0]
    assert torch.equal(got["roi_mask"], want["roi_mask"]) and want["roi_mask"].any(1).all()
    assert (got["video"].int() - want["video"].int()).abs().float().mean() < 1
    step = float(want["audio"].abs().max()) / 32767
    torch.testing.assert_close(got["audio"], want["audio"], rtol=0, atol=0.51 * step)


def test_a_real_film_without_a_face_is_bad(shared_data, yunet, tmp_path):
    film = shared_data / "ravdess_original" / "Actor_05" / "01-01-03-01-01-02-05.mp4"
    wall = tmp_path / "source" / "01-01-04-01-01-02-05.mp4"
    write_clip(wall, np.full((48, 96, 96, 3), 90, np.uint8), 16, read_clip(film, n_frames=1).audio)
    (wall.parent / film.name).symlink_to(film)
    bad = prepare(wall.parent, tmp_path / "out", n_frames=3, faces=yunet, workers=0, progress=False)
    assert bad["clip"].tolist() == [wall.stem] and "no face was found" in bad["reason"][0]
    assert prepared_corpus(tmp_path / "out").table["clip"].tolist() == [film.stem]
