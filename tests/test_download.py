"""A download ends with the right bytes or one sentence, whatever the line, the server and the archive do."""
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import struct
import threading
import time
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd
import pooch
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmfer.download
from mmfer.cli import main
from mmfer.core import MmferError
from mmfer.corpus import RAVDESS_EMOTIONS, RAVDESS_SPEAKERS, Corpus
from mmfer.download import (
    LICENCE, _TRIES, archive_name, download, fetch, open_source, parse_actors, resume_download, unpack)
from mmfer.model import preset_config
from mmfer.prepare import open_clips, prepared_corpus
from mmfer.toy import make_toy

ACTORS = ("01", "02", "03")
CLIP, OTHER = "01-01-01-01-01-01-01.mp4", "01-01-02-01-01-01-01.mp4"
HOW = dict(faces="none", crop_size=64, workers=0, progress=False)
KEPT = ["LICENCE.txt", "downloaded.json"]  # what lies beside clips that are kept


class Site(BaseHTTPRequestHandler):
    "Behaves as `plan`, a list of words for the next requests, says; then well."
    def log_message(self, *args): pass

    def do_GET(self):
        s = self.server
        name, have = self.path.strip("/").split("?")[0], int(self.headers.get("Range", "bytes=0-")[6:-1])
        if name == "registry.txt":
            return self.reply(200, s.files[name]) if name in s.files else self.reply(404, b"no such file")
        word = s.plan.pop(0) if s.plan else s.habit
        s.log.append((name, have))
        if word == "429": return self.reply(429, b"slow down", {"Retry-After": "0"})
        if word in ("500", "404"): return self.reply(int(word), b"sorry")
        if word == "hang up": return
        if name not in s.files: return self.reply(404, b"no such file")
        body = s.files[name]
        if have and have >= len(body): return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        if "no range" in word: have = 0
        rest = body[have:]
        more = {"Content-Range": f"bytes {have}-{len(body) - 1}/{len(body)}"} if have else {}
        pause = s.pause if "slow" in word else 0
        self.reply(206 if have else 200, rest, more, len(rest) // 2 if "half" in word else None, pause)

    def reply(self, code, body, headers={}, sent=None, pause=0):
        self.send_response(code)
        for k, v in ({"Content-Length": len(body)} | headers).items(): self.send_header(k, str(v))
        self.end_headers()
        body = body[:sent]
        with suppress(ConnectionError):  # whoever asked may have gone
            for i in range(0, len(body), 4096):
                time.sleep(pause)
                self.wfile.write(body[i:i + 4096])


@pytest.fixture
def site(monkeypatch):
    "A server on this machine; no pauses between requests."
    monkeypatch.setattr(mmfer.download, "_PAUSE", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.files, server.plan, server.habit, server.log = {}, [], "well", []
    server.pause = 0.3  # seconds before each piece of 4 kB, when it is slow
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "{name: bytes} of three actors' archives, laid out as RAVDESS's are, silent twins included."
    root = tmp_path_factory.mktemp("corpus")
    make_toy(root / "toy", actors=3, clips_per_actor=8, size=32, seconds=1.2, workers=1, progress=False)
    for actor in ACTORS:
        with zipfile.ZipFile(root / archive_name(actor), "w") as z:
            for p in sorted((root / "toy" / f"Actor_{actor}").iterdir()):
                z.write(p, f"Actor_{actor}/{p.name}")
                z.write(p, f"Actor_{actor}/02{p.name[2:]}")
    return {archive_name(a): (root / archive_name(a)).read_bytes() for a in ACTORS}


@pytest.fixture
def mirror(site, archives, monkeypatch):
    "The server has all archives and their checksums, and takes Zenodo's place."
    site.files |= archives | registry(archives)
    monkeypatch.setenv("MMFER_RAVDESS_URL", site.url)


def md5(data): return f"md5:{hashlib.md5(data).hexdigest()}"


def registry(files):
    "The list of files and checksums, as a file of its own."
    return {"registry.txt": "".join(f"{name} {md5(data)}\n" for name, data in files.items()).encode()}


def sizes(folder):
    "How many clips of each speaker are in a prepared set."
    return prepared_corpus(folder).table.groupby("speaker").size().to_dict()


def left(folder):
    "What lies in a folder, locks aside."
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("text, wanted", [
    ("1-24", RAVDESS_SPEAKERS), ("7", ["07"]), ("1,3,5-8", ["01", "03", "05", "06", "07", "08"]),
    (" 2 , 1-2", ["01", "02"]), ("09", ["09"])])
def test_actors_are_read(text, wanted):
    assert parse_actors(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "25", "3-1", "1-25", "a", "1;2", "1,,2", "-3", "1-", "1.5", "123"])
def test_other_words_are_no_actors(text):
    with pytest.raises(MmferError, match="1-24 or 1,3,5-8"): parse_actors(text)


DATA = bytes(range(256)) * 400


@pytest.mark.parametrize("plan, starts", [
    ([], [0]),
    (["half"] * 3, [0, 49152, 73728, 86016]),            # whole pieces of 4096 are kept
    (["half", "no range"], [0, 49152]),                  # 200 after a Range: anew, nothing twice
    (["hang up", "hang up"], [0, 0, 0]),
    (["half", "hang up", "half"], [0, 49152, 49152, 73728]),
    (["429", "500", "429"], [0, 0, 0, 0]),
    (["half", "500"], [0, 49152, 49152]),
])
def test_a_broken_download_goes_on(site, tmp_path, plan, starts):
    site.files["x.zip"], site.plan = DATA, list(plan)
    resume_download(site.url + "x.zip", tmp_path / "x.zip.part", progress=False)
    assert (tmp_path / "x.zip.part").read_bytes() == DATA
    assert [have for _, have in site.log] == starts


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from(["half", "no range", "hang up", "429", "500"]), max_size=4),
       have=st.integers(0, len(DATA)))
def test_any_mix_of_faults_ends_with_the_same_bytes(site, tmp_path, plan, have):
    site.files["x.zip"], site.plan = DATA, list(plan)
    (tmp_path / "p.part").write_bytes(DATA[:have])
    resume_download(site.url + "x.zip", tmp_path / "p.part", progress=False)
    assert (tmp_path / "p.part").read_bytes() == DATA


def test_a_killed_download_goes_on_in_the_next_call(site, tmp_path, mirror, archives):
    name = archive_name("01")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f".{name}.part").write_bytes(archives[name][:10_000])
    source = open_source(tmp_path / "raw")
    assert fetch(source, name, progress=False).read_bytes() == archives[name]
    assert site.log == [(name, 10_000)] and left(tmp_path / "raw") == [f".{name}"]


def test_a_part_of_another_file_is_found_out_and_forgotten(site, tmp_path, mirror, archives):
    name = archive_name("01")
    source = open_source(tmp_path / "raw")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f".{name}.part").write_bytes(bytes(10_000))
    told = f"^{name} has a wrong checksum and was deleted"
    with pytest.raises(MmferError, match=told): fetch(source, name, progress=False)
    assert left(tmp_path / "raw") == []
    assert fetch(source, name, progress=False).read_bytes() == archives[name]


@pytest.mark.parametrize("habit, n, sentence", [
    ("404", 1, "answers 404"), ("500", _TRIES, "answers 500"), ("429", _TRIES, "answers 429"),
    ("hang up", _TRIES, r"can't be fetched \(ConnectionError\)"),
])
def test_a_server_that_never_gives_in_ends_with_one_sentence(site, tmp_path, habit, n, sentence):
    site.files["x.zip"], site.habit = DATA, habit
    with pytest.raises(MmferError, match=sentence):
        resume_download(site.url + "x.zip", tmp_path / "x.part", progress=False)
    assert len(site.log) == n and not list(tmp_path.iterdir())


def test_a_server_that_breaks_off_and_ignores_range_ends_with_one_sentence(site, tmp_path):
    site.files["x.zip"], site.habit = DATA, "half, no range"
    with pytest.raises(MmferError, match="can't be fetched .* it goes on at byte 49152"):
        resume_download(site.url + "x.zip", tmp_path / "x.part", progress=False)
    assert len(site.log) == 1 + _TRIES


def test_nobody_answers(tmp_path, site):
    site.shutdown(), site.server_close()
    with pytest.raises(MmferError, match="can't be fetched"):
        resume_download(site.url + "x.zip", tmp_path / "x.part", progress=False)


def test_a_lie_about_the_checksum_leaves_nothing(site, tmp_path, mirror):
    site.files["registry.txt"] = f"{archive_name('01')} md5:{'0' * 32}\n".encode()
    with pytest.raises(MmferError, match="wrong checksum"):
        download(tmp_path / "raw", ["01"], progress=False)
    assert left(tmp_path / "raw") == KEPT


def test_room_is_asked_for_before_the_first_byte(site, tmp_path, mirror, archives, monkeypatch):
    size = len(archives[archive_name("01")])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size - 1))
    told = f"MB free, but fetching and unpacking, starting with {archive_name('01')}, needs"
    with pytest.raises(MmferError, match=told):
        download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)
    assert left(tmp_path / "raw") == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size))
    download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)
    download(tmp_path / "raw", ["02", "03"], tmp_path / "set", **HOW)  # later clips take the place of others
    with pytest.raises(MmferError, match="make room"):  # clips that are kept need room for every actor
        download(tmp_path / "raw", ["01", "02"], progress=False)


@pytest.mark.parametrize("to", [None, "set"])
def test_a_full_disk_is_one_sentence(site, tmp_path, mirror, monkeypatch, to):
    def full(packed, f): raise OSError(errno.ENOSPC, "No space left on device")
    told = r"raw cannot be read or written \(No space left on device\): make room"
    with monkeypatch.context() as m, pytest.raises(MmferError, match=told):
        m.setattr("shutil.copyfileobj", full)
        download(tmp_path / "raw", ["01"], to and tmp_path / to, **HOW)
    assert left(tmp_path / "raw") == [f".{archive_name('01')}", *KEPT * (not to)]
    download(tmp_path / "raw", ["01"], to and tmp_path / to, **HOW)
    assert site.log == [(archive_name("01"), 0)]


def test_a_folder_that_cannot_be(site, tmp_path, mirror):
    (tmp_path / "raw").write_text("a file where the folder should be")
    with pytest.raises(MmferError, match="raw cannot be read or written .*: make room"):
        download(tmp_path / "raw", ["01"], progress=False)


def test_clips_are_kept_as_they_are(site, tmp_path, mirror, archives, capsys):
    bad = download(tmp_path / "raw", ["01", "03"], progress=False)
    assert len(bad) == 0 and left(tmp_path / "raw") == ["Actor_01", "Actor_03", *KEPT]
    assert LICENCE in capsys.readouterr().out
    assert (tmp_path / "raw" / "LICENCE.txt").read_text() == LICENCE + "\n"
    with zipfile.ZipFile(io.BytesIO(archives[archive_name("03")])) as z:
        for info in z.infolist(): assert (tmp_path / "raw" / info.filename).read_bytes() == z.read(info)
    table = Corpus.from_folder(tmp_path / "raw").table
    assert table.groupby("speaker").size().to_dict() == {"01": 8, "03": 8}
    site.log.clear()
    download(tmp_path / "raw", ["01", "02", "03"], progress=False)
    assert site.log == [(archive_name("02"), 0)]


def test_actors_are_prepared_one_by_one(site, tmp_path, mirror):
    download(tmp_path / "raw", ["01", "02"], tmp_path / "set", **HOW)
    assert left(tmp_path / "raw") == [] and (tmp_path / "set" / "LICENCE.txt").exists()
    assert sizes(tmp_path / "set") == {"01": 8, "02": 8}  # without the silent twins
    site.log.clear()
    download(tmp_path / "raw", ["01", "02", "03"], tmp_path / "set", **HOW)
    assert site.log == [(archive_name("03"), 0)]
    assert sizes(tmp_path / "set") == {"01": 8, "02": 8, "03": 8}


# ---- one archive ahead ----
def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def slowly(monkeypatch):
    "`prepare` first does what a test puts here."
    before, real = [], mmfer.download.prepare
    def prepare(clips, *args, **kwargs):
        for do in before: do(clips.name)
        return real(clips, *args, **kwargs)
    monkeypatch.setattr(mmfer.download, "prepare", prepare)
    return before


def test_one_archive_comes_while_an_actor_is_prepared_and_no_further_one(site, tmp_path, mirror, slowly):
    raw, seen = tmp_path / "raw", []
    def look(name):
        following = {".Actor_01": "02", ".Actor_02": "03"}.get(name)
        if following: wait_for(lambda: (raw / f".{archive_name(following)}").exists())
        time.sleep(0.2)  # for whatever else might come
        seen.append((left(raw), [name for name, _ in site.log]))
    slowly.append(look)
    download(raw, ACTORS, tmp_path / "set", **HOW)
    first, second, third = map(archive_name, ACTORS)
    assert seen == [([".Actor_01", f".{second}"], [first, second]),
                    ([".Actor_02", f".{third}"], [first, second, third]),
                    ([".Actor_03"], [first, second, third])]


def test_the_faster_of_both_hides_behind_the_slower(site, tmp_path, mirror, archives, slowly, monkeypatch):
    site.habit, site.pause = "slow", 0.5 / (len(archives[archive_name("01")]) / 4096)
    slowly.append(lambda name: time.sleep(0.4))
    fetching, preparing = [], []
    def timed(work, spans):
        def work_and_note(*args, **kwargs):
            start = time.monotonic()
            result = work(*args, **kwargs)
            spans.append((start, time.monotonic()))
            return result
        return work_and_note
    monkeypatch.setattr(mmfer.download, "fetch", timed(fetch, fetching))
    monkeypatch.setattr(mmfer.download, "_prepare_actor", timed(mmfer.download._prepare_actor, preparing))
    download(tmp_path / "raw", ACTORS, tmp_path / "set", **HOW)
    fetches, preparations = ([end - start for start, end in spans] for spans in (fetching, preparing))
    whole = preparing[-1][1] - fetching[0][0]
    hidden = sum(map(min, fetches[1:], preparations[:-1]))
    assert hidden > 0.7 and whole < sum(fetches) + sum(preparations) - 0.8 * hidden


@pytest.fixture
def ctrl_c():
    "Ctrl-C as in a terminal, as soon as something holds; the function that is returned waits for it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    def press_when(condition):
        def press():
            wait_for(condition)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press, daemon=True).start()
    yield press_when
    signal.signal(signal.SIGINT, before)


def has_come(part): return part.exists() and part.stat().st_size > 0


def of_downloads(): return [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


@pytest.mark.parametrize("coming", ["01", "02"])
def test_ctrl_c_ends_both_sides(site, tmp_path, mirror, slowly, ctrl_c, coming):
    "While the first archive comes, or while the first actor is prepared and the second archive comes."
    raw, name = tmp_path / "raw", archive_name(coming)
    site.plan = ["well"] * (coming == "02") + ["slow"]
    slowly.append(lambda name: time.sleep(60))
    ctrl_c(lambda: has_come(raw / f".{name}.part"))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt): download(raw, ["01", "02"], tmp_path / "set", **HOW)
    assert time.monotonic() - start < 20 and not of_downloads()
    slowly.clear()
    download(raw, ["01", "02"], tmp_path / "set", **HOW)
    starts = [have for asked, have in site.log if asked == name]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]
    assert left(raw) == [] and sizes(tmp_path / "set") == {"01": 8, "02": 8}


def test_an_error_of_one_side_ends_the_other(site, tmp_path, mirror, slowly):
    raw, names = tmp_path / "raw", [archive_name(actor) for actor in ACTORS]
    site.plan = ["well", "404"]
    with pytest.raises(MmferError, match="02.zip answers 404"): download(raw, ACTORS, tmp_path / "set", **HOW)
    assert sizes(tmp_path / "set") == {"01": 8}  # the first is finished before the second is told
    site.plan = ["well", "slow"]
    def fails(name):
        wait_for(lambda: has_come(raw / f".{names[2]}.part"))
        raise MmferError("no good clip")
    slowly.append(fails)
    start = time.monotonic()
    with pytest.raises(MmferError, match="no good clip"): download(raw, ACTORS, tmp_path / "set", **HOW)
    assert time.monotonic() - start < 20 and not of_downloads()
    slowly.clear()
    download(raw, ACTORS, tmp_path / "set", **HOW)
    assert [name for name, _ in site.log] == [names[0], *names[1:2] * 2, *names[2:] * 2]
    assert site.log[-1][1] > 0 and left(raw) == [] and len(prepared_corpus(tmp_path / "set")) == 24


def test_a_bad_clip_is_listed_and_the_rest_goes_on(site, tmp_path, mirror, archives):
    broken = tmp_path / archive_name("01")
    with zipfile.ZipFile(io.BytesIO(archives[archive_name("01")])) as z, zipfile.ZipFile(broken, "w") as out:
        for name in z.namelist(): out.writestr(name, b"no clip" if name.endswith(CLIP) else z.read(name))
    site.files[broken.name] = broken.read_bytes()
    site.files |= registry({name: site.files[name] for name in archives})
    bad = download(tmp_path / "raw", ["01", "02"], tmp_path / "set", **HOW)
    assert list(bad["clip"]) == [CLIP[:-4]] and list(bad.columns) == ["clip", "path", "reason"]
    assert sizes(tmp_path / "set") == {"01": 7, "02": 8}
    site.log.clear()
    again = download(tmp_path / "raw", ["01", "02"], tmp_path / "set", **HOW)
    pd.testing.assert_frame_equal(again, bad)
    assert not site.log


def test_a_lost_clip_is_fetched_again(site, tmp_path, mirror):
    download(tmp_path / "raw", ["01", "02"], tmp_path / "set", **HOW)
    whole = prepared_corpus(tmp_path / "set").table
    for speaker in ("01", "02"): os.unlink(whole[whole.speaker == speaker]["path"].iloc[3])
    site.log.clear()
    with pytest.raises(MmferError, match="has lost the clip .*: run its download again"):
        download(tmp_path / "raw", ["02", "03"], tmp_path / "set", **HOW)
    assert site.log == [(archive_name("02"), 0), (archive_name("03"), 0)]
    download(tmp_path / "raw", ["01", "02", "03"], tmp_path / "set", **HOW)
    assert site.log[2:] == [(archive_name("01"), 0)] and len(prepared_corpus(tmp_path / "set")) == 24


@pytest.mark.parametrize("change, words", [
    (dict(crop_size=96), "crop_size 64, not 96"), (dict(faces=None), "faces none, not opencv"),
    (dict(crop_size=0), "crop_size cannot be 0"), (dict(n_frames=None, crop_size=9), "crop_size 64, not 9")])
def test_other_settings_are_refused_before_anything_is_fetched(site, tmp_path, mirror, change, words):
    download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)
    site.log.clear()
    how = HOW | change
    for actors in (["01"], ["01", "02"]):
        with pytest.raises(MmferError, match=words):
            download(tmp_path / "raw", actors, tmp_path / "set", **how)
    assert not site.log


# ---- archives fetched by hand ----
@pytest.fixture
def by_hand(tmp_path, archives):
    "The archive of actor 01, in the folder of the download."
    mine = tmp_path / "raw" / archive_name("01")
    mine.parent.mkdir()
    mine.write_bytes(archives[mine.name])
    return mine


@pytest.mark.parametrize("to", [None, "set"])
def test_archives_fetched_by_hand_are_used_and_stay(site, tmp_path, mirror, archives, by_hand, to):
    for _ in range(2): download(tmp_path / "raw", ["01", "02"], to and tmp_path / to, **HOW)
    assert site.log == [(archive_name("02"), 0)]
    assert by_hand.read_bytes() == archives[by_hand.name]
    kept = ["Actor_01", "Actor_02", *KEPT] * (not to)
    assert left(tmp_path / "raw") == sorted([*kept, by_hand.name])
    assert len(prepared_corpus(tmp_path / "set") if to else Corpus.from_folder(tmp_path / "raw")) == 16


def test_an_archive_fetched_by_hand_with_a_wrong_checksum_is_told_and_stays(site, tmp_path, mirror, by_hand):
    by_hand.write_bytes(b"half of it")
    with pytest.raises(MmferError) as e: download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)
    assert str(e.value).startswith(f"{by_hand} has a wrong checksum: fetch it again, or move it away")
    assert by_hand.read_bytes() == b"half of it" and not site.log


def test_a_hostile_archive_fetched_by_hand_stays(site, tmp_path, mirror, by_hand):
    hostile("up", by_hand)
    site.files |= registry({by_hand.name: by_hand.read_bytes()})
    with pytest.raises(MmferError, match="is not safe to unpack"): download(tmp_path / "raw", ["01"], **HOW)
    assert by_hand.exists() and not (tmp_path / CLIP).exists()


def test_without_a_connection_archives_fetched_by_hand_will_do(site, tmp_path, mirror, by_hand, caplog):
    site.shutdown(), site.server_close()
    download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)
    [told] = caplog.messages
    assert "no list of checksums can be had (ConnectionError): archives are checked for damage" in told
    assert sizes(tmp_path / "set") == {"01": 8} and by_hand.exists()
    with pytest.raises(MmferError) as e: download(tmp_path / "raw", ["01", "02"], tmp_path / "set", **HOW)
    ways = f"name another server in MMFER_RAVDESS_URL, or fetch the archive by hand into {by_hand.parent}"
    assert str(e.value).endswith(ways) and "\n" not in str(e.value)


# ---- a server without checksums ----
def test_a_server_without_checksums_is_told(site, tmp_path, mirror, caplog):
    del site.files["registry.txt"]
    download(tmp_path / "raw", ["01", "02"], tmp_path / "set", **HOW)
    [told] = caplog.messages
    assert "registry.txt is not there" in told and "nothing proves that they are RAVDESS's" in told
    assert sizes(tmp_path / "set") == {"01": 8, "02": 8}


def test_damage_is_found_without_checksums(site, tmp_path, mirror, archives):
    del site.files["registry.txt"]
    name = archive_name("01")
    broken = bytearray(archives[name])
    broken[len(broken) // 2] ^= 1
    for damaged in (broken, broken[:len(broken) // 2]):
        site.files[name] = bytes(damaged)
        with pytest.raises(MmferError, match=f"{name}.* cannot be read or written .*fetch it again"):
            download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)
        assert left(tmp_path / "raw") == []


@pytest.mark.parametrize("text", ["<!DOCTYPE html>\n<p>There is no such page.</p>", "only-a-name"])
def test_a_list_of_another_form_is_told(site, tmp_path, mirror, text):
    site.files["registry.txt"] = text.encode()
    told = "the list of files at http.* cannot be read .*MMFER_RAVDESS_URL"
    with pytest.raises(MmferError, match=told) as e:
        download(tmp_path / "raw", ["01"], progress=False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("habit, n", [("404", 1), ("hang up", _TRIES)])
def test_errors_of_the_line_name_the_other_ways(site, tmp_path, mirror, habit, n):
    site.habit = habit
    with pytest.raises(MmferError) as e: download(tmp_path / "raw", ["01"], progress=False)
    ways = f"name another server in MMFER_RAVDESS_URL, or fetch the archive by hand into {tmp_path / 'raw'}"
    assert str(e.value).endswith(ways) and len(site.log) == n


def test_the_command_line_asks_the_same_server(site, tmp_path, mirror):
    main(["download", "ravdess", str(tmp_path / "set"), "--actors", "1", "--faces", "none", "--workers", "0"])
    assert site.log == [(archive_name("01"), 0)] and sizes(tmp_path / "set") == {"01": 8}


def test_an_empty_folder_of_an_actor_is_not_done(site, tmp_path, mirror):
    (tmp_path / "raw" / "Actor_01").mkdir(parents=True)
    download(tmp_path / "raw", ["01"], progress=False)
    assert len(Corpus.from_folder(tmp_path / "raw")) == 8


def test_a_server_that_sends_another_part_is_told(site, tmp_path, monkeypatch):
    reply = Site.reply
    def lies(self, code, body, more={}, *how):
        reply(self, code, body, more and {"Content-Range": "bytes 5-9/10"}, *how)
    monkeypatch.setattr(Site, "reply", lies)
    site.files["x.zip"], part = DATA, tmp_path / "x.part"
    part.write_bytes(DATA[:100])
    with pytest.raises(MmferError, match="sends another part than was asked for"):
        resume_download(site.url + "x.zip", part, progress=False)
    assert part.read_bytes() == DATA[:100]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
@pytest.mark.parametrize("where, call, after", [
    ("_stream", 2, True),           # the archive has come, but has no name yet
    ("unpack", 2, False), ("unpack", 2, True),
    ("copyfileobj", 20, False),     # the fourth of 16 clips
    ("prepare", 2, False), ("prepare", 2, True),
    ("_write_note", 3, False),      # just before it is written down
    ("_clear", 2, False),           # written down, but the clips are still there
    ("_clear", 2, True),
])
def test_killed_at_any_point_nothing_is_fetched_twice(site, tmp_path, mirror, archives, where, call, after):
    "A process dies, as with kill -9, before or after one of the steps with the second actor."
    raw = tmp_path / "raw"
    place = mmfer.download if hasattr(mmfer.download, where) else shutil
    real, calls = getattr(place, where), []
    ahead = where in ("prepare", "_write_note", "_clear")  # the third archive comes meanwhile
    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) < call: return real(*args, **kwargs)
        if after: real(*args, **kwargs)
        if ahead: wait_for(lambda: (raw / f".{archive_name('03')}").exists())
        os._exit(9)
    child = os.fork()
    if not child:
        setattr(place, where, dies)
        try: download(raw, ACTORS, tmp_path / "set", **HOW)
        finally: os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    download(raw, ACTORS, tmp_path / "set", **HOW)
    name = archive_name("02")
    again = [(name, len(archives[name]))] * (where == "_stream")  # "is there more?" "no"
    assert sorted(site.log) == sorted([(archive_name(a), 0) for a in ACTORS] + again)
    assert left(raw) == [] and len(prepared_corpus(tmp_path / "set")) == 24


@needs_fork
def test_killed_while_an_archive_comes_ahead_it_goes_on(site, tmp_path, mirror):
    raw, name = tmp_path / "raw", archive_name("02")
    site.plan = ["well", "slow"]
    child = os.fork()
    if not child:
        try: download(raw, ACTORS, tmp_path / "set", **HOW)
        finally: os._exit(0)
    wait_for(lambda: has_come(raw / f".{name}.part"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    come = (raw / f".{name}.part").stat().st_size
    download(raw, ACTORS, tmp_path / "set", **HOW)
    assert [have for asked, have in site.log if asked == name] == [0, come] and come > 0
    assert left(raw) == [] and len(prepared_corpus(tmp_path / "set")) == 24


def test_two_downloads_into_one_folder(site, tmp_path, mirror):
    (tmp_path / "raw").mkdir()
    lock = FileLock(tmp_path / "raw" / ".download.lock")
    with lock, pytest.raises(MmferError, match="in use by another download"):
        download(tmp_path / "raw", ["01"], progress=False)
    assert not site.log


def test_unknown_actors_and_addresses(site, tmp_path, mirror, monkeypatch):
    with pytest.raises(MmferError, match="Actor_09.zip is not in the list"):
        download(tmp_path / "raw", ["09"], progress=False)
    monkeypatch.setenv("MMFER_RAVDESS_URL", "example.org/ravdess")
    told = "the list of files at example.org/ravdess cannot be read .*Invalid URL"
    with pytest.raises(MmferError, match=told):
        download(tmp_path / "raw", ["01"], progress=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"asked": []}', '{"actors": 1}'])
def test_a_damaged_list_of_what_is_done(tmp_path, mirror, text):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "downloaded.json").write_text(text)
    with pytest.raises(MmferError, match="downloaded.json cannot be read .*: delete it"):
        download(tmp_path / "raw", ["01"], tmp_path / "set", **HOW)


def test_a_download_that_was_broken_off_says_so_when_it_is_opened(site, tmp_path, mirror, slowly, caplog):
    def fails(name):
        if name == ".Actor_02": raise KeyboardInterrupt
    slowly.append(fails)
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt): download(tmp_path / "raw", ACTORS, out, **HOW)
    tiny = preset_config("tiny", RAVDESS_EMOTIONS)
    assert open_clips(out, tiny, tmp_path / "work").corpus.speakers == ["01"]
    assert "02, 03 of RAVDESS will be missing: run it again" in caplog.text
    slowly.clear(), caplog.clear()
    download(tmp_path / "raw", ACTORS, out, **HOW)
    assert len(open_clips(out, tiny, tmp_path / "work")) == 24 and not caplog.text


def test_names_and_checksums_come_from_the_doi(site, tmp_path, archives, monkeypatch):
    "Zenodo's answer, as pooch reads it, from the server on this machine."
    name = archive_name("02")
    (tmp_path / name).write_bytes(archives[name])
    entry = dict(key=name, checksum=md5(archives[name]), links=dict(self=site.url + name))
    site.files |= archives | {"records/1188976": json.dumps(dict(id=1188976, files=[entry])).encode()}
    zenodo = pooch.downloaders.ZenodoRepository
    monkeypatch.setattr(zenodo, "base_api_url", site.url + "records")
    def of_doi(doi, **how): return zenodo(doi, f"https://zenodo.org/records/{doi.split('.')[-1]}", **how)
    monkeypatch.setattr(mmfer.download, "doi_to_repository", of_doi)
    download(tmp_path / "raw", ["02"], progress=False)
    both = sorted(kind + clip[2:] for clip in clip_names(archives[name]) for kind in ("01", "02"))
    assert left(tmp_path / "raw" / "Actor_02") == both
    site.habit = "429"  # its answer is no JSON then
    with pytest.raises(MmferError, match="the list of files at doi:10.5281/zenodo.1188976 cannot be read"):
        download(tmp_path / "raw", ["03"], progress=False)


def clip_names(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as z: names = z.namelist()
    return [n.split("/")[1] for n in names if "/01-" in n]


def member(name, mode=None, **fields):
    info = zipfile.ZipInfo(CLIP)
    info.filename = name
    if mode is not None: info.external_attr = (mode | 0o644) << 16
    for k, v in fields.items(): setattr(info, k, v)
    return info


def patched(path, offset, old, new):
    "Change a field of the central directory and of the header before the contents."
    data = path.read_bytes()
    assert old in data
    for signature, at in ((b"PK\x01\x02", offset + 2), (b"PK\x03\x04", offset)):
        i = data.index(signature) + at
        data = data[:i] + new + data[i + len(new):]
    path.write_bytes(data)


def hostile(kind, path):
    "One bad archive of each kind; the harmless clip comes first: it could be written before the bad one."
    names = dict(up=f"../{CLIP}", deep_up=f"a/../../{CLIP}", absolute=f"/tmp/{CLIP}", drive=f"C:{CLIP}",
                 backslash=f"..\\{CLIP}", dot=".", newline=f"a\n/{CLIP}", long=f"{CLIP[:-4]}{'x' * 250}.mp4",
                 device_name="a/CON", dotted="x .", blank=" ", program="run.sh")
    kinds = dict(link=stat.S_IFLNK, device=stat.S_IFCHR, disk=stat.S_IFBLK, pipe=stat.S_IFIFO,
                 socket=stat.S_IFSOCK)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        if kind != "lie": z.writestr(OTHER, b"harmless")
        if kind in names: z.writestr(member(names[kind]), b"x")
        if kind in kinds: z.writestr(member(CLIP, kinds[kind]), b"/etc/passwd")
        if kind == "bomb": z.writestr(CLIP, bytes(10**7))
        if kind == "flock": [z.writestr(f"{i}.mp4", b"") for i in range(1001)]
        if kind == "twice": z.writestr(f"a/{CLIP}", b"1"), z.writestr(f"b/{CLIP[:-4]}.MP4", b"2")
        if kind == "bzip2": z.writestr(CLIP, b"x" * 100, zipfile.ZIP_BZIP2)
        if kind == "lie": z.writestr(CLIP, bytes(100_000))
    if kind == "nul":
        with zipfile.ZipFile(path, "a") as z: z.writestr(f"{CLIP}_.txt", b"x")
        path.write_bytes(path.read_bytes().replace(f"{CLIP}_.txt".encode(), f"{CLIP}\0.txt".encode()))
    if kind == "encrypted": patched(path, 6, OTHER.encode(), struct.pack("<H", 1))
    if kind == "lie": patched(path, 22, CLIP.encode(), struct.pack("<I", 20))  # says 20 bytes, holds 100 000
    return path


HOSTILE = dict.fromkeys(("up", "deep_up", "absolute", "drive", "backslash", "dot"), "leads out")
HOSTILE |= dict.fromkeys(("newline", "long", "nul", "device_name", "dotted", "blank", "program"), "no clip")
HOSTILE |= dict.fromkeys(("link", "device", "disk", "pipe", "socket"), "link or a device")
HOSTILE |= {"bomb": "far more than clips allow", "flock": "at most 1000", "twice": f"{CLIP!r} is there twice",
            "bzip2": "unusual way", "encrypted": "is encrypted", "lie": f"member {CLIP!r}, cannot be read"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(kind, tmp_path):
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    path = hostile(kind, home / "bad.zip")
    with pytest.raises(MmferError, match=HOSTILE[kind]) as e: unpack(path, home / "clips")
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path] and left(home) == ["bad.zip"]


def test_a_hostile_archive_from_a_server_is_not_kept(site, tmp_path, mirror):
    site.files[archive_name("01")] = hostile("up", tmp_path / "up.zip").read_bytes()
    site.files |= registry({archive_name("01"): site.files[archive_name("01")]})
    for to in (None, tmp_path / "set"):
        with pytest.raises(MmferError, match=f"{archive_name('01')} is not safe to unpack"):
            download(tmp_path / "raw", ["01"], to, progress=False)
        assert left(tmp_path / "raw") == KEPT
    assert not (tmp_path / CLIP).exists() and not (tmp_path / "set" / "prepared.json").exists()


def test_both_names_of_a_member_are_looked_at():
    "Newer versions of Python take a second name from an extra field, and leave the first as it was."
    info = member(f"../{CLIP}")
    assert info.orig_filename == CLIP and "leads out" in mmfer.download._why_refused(info)
    assert mmfer.download._why_refused(member(CLIP)) is None


def test_unpack_does_not_touch_what_is_there(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "mine.txt").touch()
    archive = hostile("none", tmp_path / "a.zip")
    with pytest.raises(MmferError, match="clips is there already"): unpack(archive, tmp_path / "clips")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"): pass
    with pytest.raises(MmferError, match="holds no file"): unpack(tmp_path / "empty.zip", tmp_path / "new")
    assert left(tmp_path) == ["a.zip", "clips", "empty.zip"] and left(tmp_path / "clips") == ["mine.txt"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_is_whole_or_refused(tmp_path, data):
    "Three bytes changed, or an end cut off: the contents are right, or a sentence says that they are not."
    good = {CLIP: b"first clip" * 30, f"Actor_01/{OTHER}": bytes(range(256))}
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, contents in good.items(): z.writestr(name, contents)
    raw = bytearray(path.read_bytes())
    change = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255))
    for i, b in data.draw(st.lists(change, max_size=3)): raw[i] = b
    path.write_bytes(raw[:data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try: out = unpack(path, tmp_path / "out")
    except MmferError: assert left(tmp_path) == ["a.zip"]
    else:
        assert {p.read_bytes() for p in out.iterdir()} <= set(good.values()) | {b""}
        shutil.rmtree(out)
