"""A prepared set: what it keeps, that nothing changes it, and every way in which a preparation can break off."""
import errno
import hashlib
import json
import logging
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmfer import prepare as P
from mmfer import visual
from mmfer.core import MmferError
from mmfer.datasets import clip_table, collate
from mmfer.media import read_clip, write_clip
from mmfer.prepare import PreparedDataset, clips_of, is_prepared, load_parts, prepare, prepared_table
from mmfer.toy import make_toy

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HOW = dict(n_frames=4, size=64, faces="none", workers=0, progress=False)
KNOWN = ["path", "clip", "emotion", "label", "intensity", "statement", "repetition", "actor", "gender"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), actors=2, clips_per_actor=8, seconds=1.5, workers=1, progress=False)


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
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_sentence(error, *words):
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and all(str(w) in text for w in words), text


# ---- what a set keeps ----
def test_the_table_is_that_of_the_clips(toy, whole):
    ours, theirs = prepared_table(whole), clip_table(toy)
    pd.testing.assert_frame_equal(ours.drop(columns="path"), theirs.drop(columns="path"))
    assert list(ours) == KNOWN and all(Path(p).suffix == ".npz" and Path(p).is_file() for p in ours["path"])


def test_a_set_can_be_moved(copy, tmp_path):
    moved = copy.rename(tmp_path / "elsewhere")
    assert len(PreparedDataset(prepared_table(moved), size=64, grid=8)[0]["audio"]) > 0


def test_items_are_the_clips(toy, whole):
    dataset = PreparedDataset(prepared_table(whole), size=64, grid=8)
    for item, row in zip(dataset, clip_table(toy).itertuples()):
        clip = read_clip(row.path, n_frames=4)
        assert (item["clip"], item["label"]) == (row.clip, row.label)
        assert item["video"].dtype == torch.uint8 and item["video"].shape == (4, 3, 64, 64) and item["video"].is_contiguous()
        error = np.abs(item["video"].permute(0, 2, 3, 1).numpy().astype(int) - clip.frames)
        assert error.mean() < 2.2  # grey levels, from JPEG; less on large pictures
        np.testing.assert_allclose(item["audio"], clip.audio, rtol=0, atol=0.51 / 32767 * np.abs(clip.audio).max())
        assert item["roi_mask"].shape == (4, 64) and not item["roi_mask"].any()


@few
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=50).filter(lambda x: max(map(abs, x)) > 1e-4))
def test_sound_is_off_by_half_a_step_of_its_peak(samples):
    audio = np.array(samples, np.float32)
    back = P.unpack_sound(P.pack_sound(audio))
    assert back.dtype == np.float32 and np.abs(back - audio).max() <= 0.51 / 32767 * np.abs(audio).max()


@few
@given(seed=st.integers(0, 999), grid=st.integers(1, 16))
def test_masks_come_back_exactly_for_any_grid(seed, grid):
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(0, 200, (5, 2, 2)), 1).reshape(5, 4)
    track = visual.FaceTrack(boxes, visual.squares_around(boxes, 240, 320, 0.2), rng.random(5) < 0.7, "")
    want = visual.grid_mask(track.boxes, track.squares, grid) & track.seen[:, None]
    assert np.array_equal(P.unpack_mask(P.pack_faces(track, 5), grid), want)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_pictures_are_resized_to_what_is_asked_for(whole, size):
    item = PreparedDataset(prepared_table(whole), size=size, grid=4)[0]
    stored = PreparedDataset(prepared_table(whole), size=64, grid=4)[0]["video"].permute(0, 2, 3, 1).numpy()
    how = cv2.INTER_AREA if size < 64 else cv2.INTER_CUBIC
    want = stored if size == 64 else np.stack([cv2.resize(np.ascontiguousarray(f), (size, size), interpolation=how) for f in stored])
    assert np.array_equal(item["video"].permute(0, 2, 3, 1).numpy(), want) and item["roi_mask"].shape == (4, 16)


def test_kept_items_are_not_shared(whole):
    dataset = PreparedDataset(prepared_table(whole), size=64, grid=8, keep=True)
    del dataset[0]["audio"]
    assert "audio" in dataset[0] and dataset[0]["video"] is dataset[0]["video"]


def test_loaders_with_processes_give_the_same(whole):
    dataset = PreparedDataset(prepared_table(whole), size=64, grid=8)
    here, there = (list(DataLoader(dataset, 8, collate_fn=collate, num_workers=n)) for n in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert a["clip"] == b["clip"] and torch.equal(a["video"], b["video"]) and torch.equal(a["audio"], b["audio"])


def test_sound_alone(toy, tmp_path):
    source = Path(shutil.copytree(toy, tmp_path / "sound"))
    for p in sorted(source.rglob("01-*.mp4")): p.rename(p.with_name(f"03{p.name[2:]}"))
    assert prepare(source, tmp_path / "out", modality="03", **HOW).empty
    table, make = clips_of(tmp_path / "out", tmp_path / "unused", size=64, grid=8)
    item = make(table)[0]
    assert set(item) == {"label", "clip", "audio"} and "pictures" not in np.load(table["path"][0])
    with pytest.raises(MmferError) as e: PreparedDataset(table)[0]
    one_sentence(e, table["path"][0], "prepared without video")


# ---- faces ----
@pytest.fixture
def fake_faces(monkeypatch):
    "A detector that sees what it is told: one answer for all frames, or one a frame."
    seen = dict(boxes=[[20, 10, 44, 50, 0.9]])
    monkeypatch.setattr(P, "_detector", lambda faces: "fake")
    monkeypatch.setattr(visual, "load_yunet", lambda faces: faces)
    monkeypatch.setattr(visual, "detect_faces", lambda detector, frame: np.array(seen["boxes"], float).reshape(-1, 5))
    return seen


def test_crops_and_masks_are_those_of_crop_faces(toy, tmp_path, fake_faces):
    prepare(toy, tmp_path / "out", **HOW | dict(faces="fake.onnx", size=48))
    item = PreparedDataset(prepared_table(tmp_path / "out"), size=48, grid=6)[3]
    crops = visual.crop_faces(read_clip(clip_table(toy)["path"][3], n_frames=4).frames, "fake", 48, 6)
    assert np.array_equal(item["roi_mask"], crops.roi_mask) and item["roi_mask"].any()
    assert np.abs(item["video"].permute(0, 2, 3, 1).numpy().astype(int) - crops.frames).mean() < 2.2


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
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("16 clips") and "2 faces are in the picture" in caplog.messages[0]


def test_a_missing_detector_stops_before_the_work(toy, tmp_path):
    with pytest.raises(MmferError, match="does not exist"): prepare(toy, tmp_path / "out", **HOW | dict(faces=str(tmp_path / "gone.onnx")))
    assert not list(tmp_path.rglob("*.npz"))


def test_a_detector_that_cannot_be_fetched(monkeypatch):
    def offline(source): raise OSError("no route to host\nand much more")
    monkeypatch.setattr(P, "load_yunet", offline)
    with pytest.raises(MmferError) as e: P._detector("some/hub-id")
    one_sentence(e, "some/hub-id", "no route to host", 'faces="none"')


# ---- bad clips ----
def clips_are(folder): return sorted(p.stem for p in folder.glob("clips/*.npz"))


def spoil(corpus):
    "Break six clips in six ways; clip -> words of the reason."
    paths = [Path(p) for p in clip_table(corpus)["path"][:6]]
    cut, text, silent, deaf, blind, empty = paths
    clip = read_clip(silent)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    text.write_text("no film")
    write_clip(silent, clip.frames, 16, np.zeros(24000, np.float32))
    for path, option in ((deaf, "-an"), (blind, "-vn")): remux(path, option)
    empty.write_bytes(b"")
    reasons = ("cut off", "not a media file", "silent sound track", "no sound track", "no picture track", "not a media file")
    return dict(zip((p.stem for p in paths), reasons))


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
    assert clips_are(out) == prepared_table(out)["clip"].tolist() == good
    for row in clip_table(toy).itertuples(): shutil.copy(row.path, corpus / Path(row.path).relative_to(toy))
    assert prepare(corpus, out, **HOW).empty and digests(out) == digests(whole)  # mended


def test_a_good_clip_that_turned_bad_leaves_the_set(corpus, copy):
    wrong = spoil(corpus)
    assert prepare(corpus, copy, **HOW)["clip"].tolist() == sorted(wrong) and not set(wrong) & set(prepared_table(copy)["clip"])


def test_a_clip_that_was_replaced_is_done_anew(toy, corpus, copy):
    first, second = [Path(p) for p in clip_table(corpus)["path"][:2]]
    shutil.copy(second, first)
    prepare(corpus, copy, **HOW)
    a, b, *_ = PreparedDataset(prepared_table(copy), size=64, grid=8)
    assert torch.equal(a["audio"], b["audio"])


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
    assert [len(prepare(corpus / actor, tmp_path / "out", **HOW)) for actor in ("Actor_01", "Actor_02")] == [3, 3]
    assert sorted(pd.read_csv(tmp_path / "out" / "bad.csv")["clip"]) == sorted(wrong)


@pytest.mark.parametrize("change, words", [(dict(size=32), "size 64, not 32"), (dict(n_frames=8), "n_frames 4, not 8"),
                                           (dict(faces=None), "faces none, not opencv/face_detection_yunet")])
def test_other_settings_are_refused(toy, copy, change, words):
    before = digests(copy)
    change = {k: v or visual.YUNET for k, v in change.items()}
    with pytest.raises(MmferError) as e: prepare(toy, copy, **HOW | change)
    one_sentence(e, copy, words)
    assert digests(copy) == before


def test_settings_bind_nobody_before_the_first_clip(toy, tmp_path, monkeypatch):
    def offline(source): raise OSError("no route to host")
    monkeypatch.setattr(P, "load_yunet", offline)
    P._detector.cache_clear()
    with pytest.raises(MmferError) as e: prepare(toy, tmp_path / "out", **HOW | dict(faces=visual.YUNET))
    one_sentence(e, "no route to host", "--faces none")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(P.to_dict(P.PrepareConfig(faces="other"))))  # of a run that ended here
    assert prepare(toy, tmp_path / "out", **HOW).empty and P.prepared_config(tmp_path / "out").faces == "none"


def test_a_toy_corpus_needs_no_detector(toy, whole, tmp_path):
    prepare(toy, tmp_path / "out", **HOW | dict(faces=None))
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.parametrize("wrong", [dict(n_frames=0), dict(size=0), dict(n_frames=-3), dict(size=64.0), dict(n_frames="16"), dict(size=True), dict(workers=-1)])
def test_impossible_numbers_are_refused_before_anything_is_written(toy, tmp_path, wrong):
    with pytest.raises(MmferError) as e: prepare(toy, tmp_path / "out", **HOW | wrong)
    one_sentence(e, *wrong, "is not possible")
    assert not (tmp_path / "out").exists()


def test_a_lost_clip_of_another_actor_is_never_forgotten(toy, whole, tmp_path, caplog):
    out = tmp_path / "out"
    prepare(toy / "Actor_01", out, **HOW)
    lost = clips_are(out)[2]
    (out / "clips" / f"{lost}.npz").unlink()
    prepare(toy / "Actor_02", out, **HOW)
    assert f"has lost the clip {lost}" in caplog.text
    with pytest.raises(MmferError) as e: prepared_table(out)
    one_sentence(e, out, "has lost the clip", lost)
    prepare(toy / "Actor_01", out, **HOW)
    assert digests(out) == digests(whole)


def test_a_changed_clip_of_the_same_length_is_done_anew(corpus, copy):
    path = Path(clip_table(corpus)["path"][4])
    before = path.stat().st_size
    path.write_bytes(bytes(before))
    assert prepare(corpus, copy, **HOW)["clip"].tolist() == [path.stem] and path.stat().st_size == before


# ---- killed ----
LARGE = HOW | dict(n_frames=16, size=512)  # slow enough to be met in the middle


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


def children(pid):
    "Processes below `pid`, at any depth."
    try: direct = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError: return []
    return direct + [c for d in direct for c in children(d)]


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError: return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")


@needs_proc
def test_kill_9_loses_only_the_clips_in_work(toy, tmp_path):
    out, context = tmp_path / "out", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmfer.prepare"])
    run = context.Process(target=prepare, args=(toy, out), kwargs=LARGE | dict(workers=2))
    run.start()
    wait_for(lambda: len(clips_are(out)) >= 3)
    below = children(run.pid)
    run.kill(), run.join()
    wait_for(lambda: not any(map(alive, below)), 20)  # workers don't outlive the parent
    done, half = clips_are(out), [p for p in (out / "clips").iterdir() if p.suffix != ".npz"]
    assert 3 <= len(done) < 16 and len(half) <= 2
    with pytest.raises(MmferError) as e: prepared_table(out)
    one_sentence(e, out, "half done")
    times = {c: (out / "clips" / f"{c}.npz").stat().st_mtime_ns for c in done}
    prepare(toy, out, **LARGE)
    assert times == {c: (out / "clips" / f"{c}.npz").stat().st_mtime_ns for c in done}
    prepare(toy, tmp_path / "unbroken", **LARGE)
    for p in half: p.unlink()
    assert digests(out) == digests(tmp_path / "unbroken")


@needs_proc
def test_a_worker_that_dies_is_told(toy, tmp_path):
    out, failed = tmp_path / "out", []
    def work():
        try: prepare(toy, out, **LARGE | dict(workers=2))
        except MmferError as e: failed.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: clips_are(out))
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    os.kill(children(server)[0], signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive() and len(failed) == 1
    one_sentence(failed[0], "a worker died while it prepared", ".mp4", "what is finished is kept")
    assert prepare(toy, out, **LARGE).empty and len(prepared_table(out)) == 16


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
    wait_for(lambda: not any(map(alive, children(multiprocessing.forkserver._forkserver._forkserver_pid))), 20)
    assert len(clips_are(out)) < 16 and prepare(toy, out, **LARGE).empty


# ---- disk and folders ----
def test_a_full_disk_is_one_sentence(toy, whole, tmp_path):
    "A limit on the size of a file is the full disk that needs no rights: the write itself fails, in the middle."
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = sorted(p.stat().st_size for p in whole.glob("clips/*.npz"))[8]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(MmferError) as e: prepare(toy, out, **HOW)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_sentence(e, out, "cannot be written", "what is finished is kept")
    assert not [p for p in out.rglob(".*")]  # nothing half written is left
    prepare(toy, out, **HOW)
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("fault", [OSError(code, os.strerror(code)) for code in (errno.EMFILE, errno.EIO, errno.ENOMEM, errno.ENOSPC)] + ["memory", "inside"])
def test_a_failing_machine_is_no_clips_fault(toy, whole, tmp_path, monkeypatch, fault):
    def fails():
        if fault == "memory":
            error = cv2.error("Insufficient memory")
            error.code = cv2.Error.STS_NO_MEM
            raise error
        if fault == "inside": raise MmferError("x cannot be read") from OSError(errno.EMFILE, "Too many open files")
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
    count, pack = iter(range(99)), P.pack_clip
    def packing(*args):
        if next(count) == k: action()
        return pack(*args)
    monkeypatch.setattr(P, "pack_clip", packing)


def test_a_source_that_vanishes_stops_the_work(corpus, tmp_path, monkeypatch):
    at_clip(monkeypatch, 3, lambda: shutil.rmtree(corpus))
    with pytest.raises(MmferError) as e: prepare(corpus, tmp_path / "out", **HOW)
    one_sentence(e, corpus, "is gone", "what is finished is kept")
    assert len(clips_are(tmp_path / "out")) == 3


def test_a_clip_that_vanishes_is_bad(corpus, tmp_path, monkeypatch):
    last = Path(clip_table(corpus)["path"].iloc[-1])
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
    path = Path(prepared_table(copy)["path"][5])
    for keep in (0, 10, path.stat().st_size // 2, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(MmferError) as e: PreparedDataset(prepared_table(copy), size=64, grid=8)[5]
        one_sentence(e, path, "is damaged")
    prepare(toy, copy, **HOW)
    assert digests(copy) == digests(whole)


@few
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes(whole, tmp_path_factory, where, bit):
    row = prepared_table(whole).iloc[0].to_dict()
    raw = bytearray(Path(row["path"]).read_bytes())
    want = P.read_prepared(row, 64, 8)
    raw[int(where * len(raw))] ^= 1 << bit
    row["path"] = tmp_path_factory.mktemp("flip") / "x.npz"
    row["path"].write_bytes(raw)
    try: got = P.read_prepared(row, 64, 8)
    except MmferError as e: return one_sentence(e, row["path"])
    assert torch.equal(got["audio"], want["audio"]) and torch.equal(got["video"], want["video"])  # it hit a date or the like


def test_nothing_is_ever_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path(tmp_path / "exploded").touch, ())
    path = tmp_path / "x.npz"
    np.savez(path, sound=np.array([Bomb()], object))
    with pytest.raises(MmferError, match="is damaged"): load_parts(path, "sound")
    assert not (tmp_path / "exploded").exists()


def test_a_lost_clip_is_told(copy):
    table = prepared_table(copy)
    Path(table["path"][2]).unlink()
    with pytest.raises(MmferError) as e: PreparedDataset(table)[2]
    one_sentence(e, table["path"][2], "does not exist")
    with pytest.raises(MmferError) as e: prepared_table(copy)
    one_sentence(e, copy, "has lost the clip", table["clip"][2])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"colour": 3}', '{"format": 99}'])
def test_damaged_or_foreign_settings_are_refused(toy, copy, text):
    (copy / "prepared.json").write_text(text)
    for call in (lambda: prepared_table(copy), lambda: prepare(toy, copy, **HOW)):
        with pytest.raises(MmferError) as e: call()
        one_sentence(e, copy / "prepared.json", "empty folder")


@pytest.mark.parametrize("text", ["", "path\n\"a"])
def test_a_damaged_table_is_refused(copy, text):
    (copy / "table.csv").write_text(text)
    with pytest.raises(MmferError) as e: prepared_table(copy)
    one_sentence(e, copy / "table.csv", "is damaged")


# ---- clips_of ----
def test_clips_of_a_folder_of_clips(toy, whole, tmp_path):
    table, make = clips_of(toy, tmp_path / "work", size=64, grid=8, progress=False)
    assert table["clip"].tolist() == clips_are(whole) and is_prepared(tmp_path / "work") and not is_prepared(toy)
    assert json.loads((tmp_path / "work" / "prepared.json").read_text())["faces"] == "none"  # a toy corpus
    item = make(table[3:5])[1]
    assert item["clip"] == table["clip"][4] and item["video"].shape == (16, 3, 64, 64) and item["roi_mask"].shape == (16, 64)


def test_clips_of_a_prepared_set(whole, tmp_path):
    table, make = clips_of(whole, tmp_path / "work", size=32, grid=4, keep=True)
    assert len(table) == 16 and not (tmp_path / "work").exists() and make(table)[0]["video"].shape == (4, 3, 32, 32)


def test_clips_of_goes_on_with_a_half_done_folder(toy, tmp_path, monkeypatch):
    def stop(): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_clip(m, 5, stop)
        prepare(toy, tmp_path / "work", **HOW | dict(n_frames=16))
    with pytest.raises(MmferError, match="half done"): clips_of(tmp_path / "work", tmp_path / "unused", 64, 8)
    count = iter(range(99))
    monkeypatch.setattr(P, "save_parts", lambda *args, save=P.save_parts: (next(count), save(*args)))
    monkeypatch.setattr(os, "cpu_count", lambda: 0)  # in this process, so that the count counts
    assert len(clips_of(toy, tmp_path / "work", 64, 8, progress=False)[0]) == 16 and next(count) == 11


def test_clips_of_gives_the_clips_that_were_asked_for(toy, copy, tmp_path, caplog):
    corpus = Path(shutil.copytree(toy, tmp_path / "corpus"))
    clips_of(corpus, tmp_path / "work", 64, 8, progress=False)
    Path(clip_table(corpus)["path"][0]).unlink()
    text = Path(clip_table(corpus)["path"][0])
    text.write_text("no film")
    table, _ = clips_of(corpus, tmp_path / "work", 64, 8, progress=False)
    assert len(table) == 14 and text.stem not in set(table["clip"])
    assert "1 clips are left out" in caplog.text and "not a media file" in caplog.text


# ---- real faces and voices ----
@pytest.fixture
def yunet(shared_data): return shared_data / "yunet" / "yunet_n_dynamic.onnx"


def best_of(n, f):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def test_real_clips_are_small_and_twenty_times_faster(shared_data, yunet, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for p in sorted((shared_data / "ravdess_original" / "Actor_05").glob("*.mp4"))[:2]: (source / p.name).symlink_to(p)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        raw = best_of(1, lambda: prepare(source, tmp_path / "out", faces=yunet, workers=0, progress=False)) / 2
        table = prepared_table(tmp_path / "out")
        dataset = PreparedDataset(table)
        prepared = best_of(5, lambda: dataset[0])
    finally: cv2.setNumThreads(threads)
    assert raw > 20 * prepared, f"{raw:.3f} s and {prepared:.4f} s a clip"
    assert 1440 * np.mean([Path(p).stat().st_size for p in table["path"]]) < 1e9
    clip = read_clip(source / f"{table['clip'][0]}.mp4")
    crops = visual.crop_faces(clip.frames, visual.load_yunet(yunet))
    assert np.array_equal(dataset[0]["roi_mask"], crops.roi_mask) and crops.roi_mask.any(1).all()
    assert np.abs(dataset[0]["video"].permute(0, 2, 3, 1).numpy().astype(int) - crops.frames).mean() < 1
    np.testing.assert_allclose(dataset[0]["audio"], clip.audio, rtol=0, atol=0.51 / 32767 * np.abs(clip.audio).max())


def test_a_real_film_without_a_face_is_bad(shared_data, yunet, tmp_path):
    film, wall = shared_data / "ravdess_original" / "Actor_05" / "01-01-03-01-01-02-05.mp4", tmp_path / "source" / "01-01-04-01-01-02-05.mp4"
    write_clip(wall, np.full((48, 96, 96, 3), 90, np.uint8), 16, read_clip(film, n_frames=1).audio)
    (wall.parent / film.name).symlink_to(film)
    bad = prepare(wall.parent, tmp_path / "out", n_frames=3, faces=yunet, workers=0, progress=False)
    assert bad["clip"].tolist() == [wall.stem] and "no face was found" in bad["reason"][0]
    assert prepared_table(tmp_path / "out")["clip"].tolist() == [film.stem]
