"""A download ends with the right bytes or one sentence, whatever the line, the server and the archive do."""
import errno
import io
import json
import os
import shutil
import stat
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd
import pooch
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmfer.download
from mmfer.core import MmferError
from mmfer.corpus import clip_table
from mmfer.download import (
    LICENCE, TRIES, archive_name, download, fetch, open_source, parse_actors, resume_download, unpack)
from mmfer.prepare import prepared_table
from mmfer.toy import make_toy

CLIP, OTHER = "01-01-01-01-01-01-01.mp4", "01-01-02-01-01-01-01.mp4"
HOW = dict(faces="none", size=64, workers=0, progress=False)


class Site(BaseHTTPRequestHandler):
    "Behaves as `plan`, a list of words for the next requests, says; then well."
    def log_message(self, *args): pass

    def do_GET(self):
        s = self.server
        name, have = self.path.strip("/").split("?")[0], int(self.headers.get("Range", "bytes=0-")[6:-1])
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
        self.reply(206 if have else 200, rest, more, len(rest) // 2 if "half" in word else None)

    def reply(self, code, body, headers={}, sent=None):
        self.send_response(code)
        for k, v in ({"Content-Length": len(body)} | headers).items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body[:sent])


@pytest.fixture
def site(monkeypatch):
    "A server on this machine; no pauses between requests."
    monkeypatch.setattr(mmfer.download, "PAUSE", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.files, server.plan, server.habit, server.log = {}, [], "well", []
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "{name: bytes} of three actors' archives, laid out as RAVDESS' are, silent twins included."
    root = tmp_path_factory.mktemp("corpus")
    corpus = make_toy(root / "toy", actors=3, clips_per_actor=8, size=32, seconds=1.2, workers=1, progress=False)
    for actor in (1, 2, 3):
        with zipfile.ZipFile(root / archive_name(actor), "w") as z:
            for p in sorted((corpus / f"Actor_{actor:02}").iterdir()):
                z.write(p, f"Actor_{actor:02}/{p.name}")
                z.write(p, f"Actor_{actor:02}/02{p.name[2:]}")
    return {archive_name(a): (root / archive_name(a)).read_bytes() for a in (1, 2, 3)}


@pytest.fixture
def mirror(site, archives, tmp_path):
    "Keyword arguments that lead to the server, which has the archives."
    site.files |= archives
    return dict(base_url=site.url, registry=registry(tmp_path, archives))


def registry(folder, files):
    for name, data in files.items(): (folder / "hash.tmp").write_bytes(data), (folder / "line.tmp").open("a").write(
        f"{name} md5:{pooch.file_hash(folder / 'hash.tmp', alg='md5')}\n")
    (folder / "hash.tmp").unlink()
    return (folder / "line.tmp").rename(folder / "registry.txt")


def left(folder):
    "What lies in a folder, locks aside."
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("text, wanted", [("1-24", list(range(1, 25))), ("7", [7]), ("1,3,5-8", [1, 3, 5, 6, 7, 8]), (" 2 , 1-2", [1, 2]), ("09", [9])])
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
@given(plan=st.lists(st.sampled_from(["half", "no range", "hang up", "429", "500"]), max_size=4), have=st.integers(0, len(DATA)))
def test_any_mix_of_faults_ends_with_the_same_bytes(site, tmp_path, plan, have):
    site.files["x.zip"], site.plan = DATA, list(plan)
    (tmp_path / "p.part").write_bytes(DATA[:have])
    resume_download(site.url + "x.zip", tmp_path / "p.part", progress=False)
    assert (tmp_path / "p.part").read_bytes() == DATA


def test_a_killed_download_goes_on_in_the_next_call(site, tmp_path, mirror, archives):
    name = archive_name(1)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{name}.part").write_bytes(archives[name][:10_000])
    source = open_source(tmp_path / "raw", **mirror)
    assert fetch(source, name, progress=False).read_bytes() == archives[name]
    assert site.log == [(name, 10_000)] and left(tmp_path / "raw") == [name]


def test_a_part_of_another_file_is_found_out_and_forgotten(site, tmp_path, mirror, archives):
    name = archive_name(1)
    source = open_source(tmp_path / "raw", **mirror)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{name}.part").write_bytes(bytes(10_000))
    with pytest.raises(MmferError, match=f"^{name} has a wrong checksum and was deleted"): fetch(source, name, progress=False)
    assert left(tmp_path / "raw") == []
    assert fetch(source, name, progress=False).read_bytes() == archives[name]


@pytest.mark.parametrize("habit, n, sentence", [
    ("404", 1, "answers 404"), ("500", TRIES, "answers 500"), ("429", TRIES, "answers 429"),
    ("hang up", TRIES, r"can't be fetched \(ConnectionError\)"),
])
def test_a_server_that_never_gives_in_ends_with_one_sentence(site, tmp_path, habit, n, sentence):
    site.files["x.zip"], site.habit = DATA, habit
    with pytest.raises(MmferError, match=sentence): resume_download(site.url + "x.zip", tmp_path / "x.part", progress=False)
    assert len(site.log) == n and not list(tmp_path.iterdir())


def test_a_server_that_breaks_off_and_ignores_range_ends_with_one_sentence(site, tmp_path):
    site.files["x.zip"], site.habit = DATA, "half, no range"
    with pytest.raises(MmferError, match="can't be fetched .* it goes on at byte 49152"):
        resume_download(site.url + "x.zip", tmp_path / "x.part", progress=False)
    assert len(site.log) == 1 + TRIES


def test_nobody_answers(tmp_path, site):
    site.shutdown(), site.server_close()
    with pytest.raises(MmferError, match="can't be fetched"): resume_download(site.url + "x.zip", tmp_path / "x.part", progress=False)


def test_a_lie_about_the_checksum_leaves_nothing(site, tmp_path, mirror):
    lie = tmp_path / "lie.txt"
    lie.write_text(f"{archive_name(1)} md5:{'0' * 32}\n")
    with pytest.raises(MmferError, match="wrong checksum"):
        download(tmp_path / "raw", [1], base_url=site.url, registry=lie, progress=False)
    assert left(tmp_path / "raw") == ["LICENCE.txt"]


def test_room_is_asked_for_before_the_first_byte(site, tmp_path, mirror, archives, monkeypatch):
    size = len(archives[archive_name(1)])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size - 1))
    with pytest.raises(MmferError, match=f"MB free, but fetching and unpacking, starting with {archive_name(1)}, needs"):
        download(tmp_path / "raw", [1], tmp_path / "set", **mirror, **HOW)
    assert left(tmp_path / "raw") == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size))
    download(tmp_path / "raw", [1], tmp_path / "set", **mirror, **HOW)
    with pytest.raises(MmferError, match="make room"):  # clips that are kept need room for every actor
        download(tmp_path / "raw", [1, 2], **mirror, progress=False)


@pytest.mark.parametrize("to", [None, "set"])
def test_a_full_disk_is_one_sentence(site, tmp_path, mirror, monkeypatch, to):
    def full(packed, f): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(MmferError, match=r"raw can't be written \(No space left on device\): make room"):
        m.setattr("shutil.copyfileobj", full)
        download(tmp_path / "raw", [1], to and tmp_path / to, **mirror, **HOW)
    assert left(tmp_path / "raw") == [".archives", *["LICENCE.txt"] * (not to)] and left(tmp_path / "raw" / ".archives") == [archive_name(1)]
    download(tmp_path / "raw", [1], to and tmp_path / to, **mirror, **HOW)
    assert site.log == [(archive_name(1), 0)]


def test_a_folder_that_cannot_be(site, tmp_path, mirror):
    (tmp_path / "raw").write_text("a file where the folder should be")
    with pytest.raises(MmferError, match="raw can't be written .*: make room or choose another folder"):
        download(tmp_path / "raw", [1], **mirror, progress=False)


def test_clips_are_kept_as_they_are(site, tmp_path, mirror, archives, capsys):
    bad = download(tmp_path / "raw", [1, 3], **mirror, progress=False)
    assert len(bad) == 0 and left(tmp_path / "raw") == ["Actor_01", "Actor_03", "LICENCE.txt"]
    assert LICENCE in capsys.readouterr().out and (tmp_path / "raw" / "LICENCE.txt").read_text() == LICENCE + "\n"
    with zipfile.ZipFile(io.BytesIO(archives[archive_name(3)])) as z:
        for info in z.infolist(): assert (tmp_path / "raw" / info.filename).read_bytes() == z.read(info)
    assert clip_table(tmp_path / "raw").groupby("actor").size().to_dict() == {1: 8, 3: 8}
    site.log.clear()
    download(tmp_path / "raw", [1, 2, 3], **mirror, progress=False)
    assert site.log == [(archive_name(2), 0)]


def test_actors_are_prepared_one_by_one(site, tmp_path, mirror, monkeypatch):
    seen, real = [], mmfer.download.prepare
    def spy(folder, *args, **kwargs):
        seen.append(left(tmp_path / "raw" / ".archives"))
        return real(folder, *args, **kwargs)
    monkeypatch.setattr(mmfer.download, "prepare", spy)
    download(tmp_path / "raw", [1, 2], tmp_path / "set", **mirror, **HOW)
    assert seen == [[f".Actor_{a:02}", archive_name(a)] for a in (1, 2)]  # never two actors on the disk
    assert left(tmp_path / "raw") == [] and (tmp_path / "set" / "LICENCE.txt").exists()
    assert prepared_table(tmp_path / "set").groupby("actor").size().to_dict() == {1: 8, 2: 8}  # without the silent twins
    site.log.clear()
    download(tmp_path / "raw", [1, 2, 3], tmp_path / "set", **mirror, **HOW)
    assert site.log == [(archive_name(3), 0)]
    assert sorted(prepared_table(tmp_path / "set")["actor"].unique()) == [1, 2, 3]


def test_a_bad_clip_is_listed_and_the_rest_goes_on(site, tmp_path, archives):
    broken = tmp_path / archive_name(1)
    with zipfile.ZipFile(io.BytesIO(archives[archive_name(1)])) as z, zipfile.ZipFile(broken, "w") as out:
        for info in z.infolist(): out.writestr(info.filename, b"no clip" if info.filename.endswith(CLIP) else z.read(info))
    site.files |= archives | {archive_name(1): broken.read_bytes()}
    how = dict(base_url=site.url, registry=registry(tmp_path, site.files)) | HOW
    bad = download(tmp_path / "raw", [1, 2], tmp_path / "set", **how)
    assert list(bad["clip"]) == [CLIP[:-4]] and list(bad.columns) == ["clip", "path", "reason"]
    assert prepared_table(tmp_path / "set").groupby("actor").size().to_dict() == {1: 7, 2: 8}
    site.log.clear()
    pd.testing.assert_frame_equal(download(tmp_path / "raw", [1, 2], tmp_path / "set", **how), bad)
    assert not site.log


def test_a_lost_clip_is_fetched_again(site, tmp_path, mirror):
    how = mirror | HOW
    download(tmp_path / "raw", [1, 2], tmp_path / "set", **how)
    whole = prepared_table(tmp_path / "set")
    for row in (3, 12): os.unlink(whole["path"][row])  # one of each actor
    site.log.clear()
    with pytest.raises(MmferError, match="has lost the clip"): download(tmp_path / "raw", [2, 3], tmp_path / "set", **how)
    assert site.log == [(archive_name(2), 0), (archive_name(3), 0)]
    download(tmp_path / "raw", [1, 2, 3], tmp_path / "set", **how)
    assert site.log[2:] == [(archive_name(1), 0)] and len(prepared_table(tmp_path / "set")) == 24


@pytest.mark.parametrize("change, words", [(dict(size=96), "size 64, not 96"), (dict(faces=None), "faces none, not opencv"), (dict(size=0), "size 0 is not possible")])
def test_other_settings_are_refused_before_anything_is_fetched(site, tmp_path, mirror, change, words):
    download(tmp_path / "raw", [1], tmp_path / "set", **mirror, **HOW)
    site.log.clear()
    for actors in ([1], [1, 2]):
        with pytest.raises(MmferError, match=words): download(tmp_path / "raw", actors, tmp_path / "set", **mirror | HOW | change)
    assert not site.log


@pytest.mark.parametrize("to", [None, "set"])
def test_archives_of_the_user_stay(site, tmp_path, mirror, archives, to):
    (tmp_path / "raw").mkdir()
    mine = tmp_path / "raw" / archive_name(1)
    mine.write_bytes(archives[mine.name])
    for _ in range(2): download(tmp_path / "raw", [1], to and tmp_path / to, **mirror, **HOW)
    assert mine.read_bytes() == archives[mine.name] and not (tmp_path / "raw" / ".archives").exists()


def test_an_empty_folder_of_an_actor_is_not_done(site, tmp_path, mirror):
    (tmp_path / "raw" / "Actor_01").mkdir(parents=True)
    download(tmp_path / "raw", [1], **mirror, progress=False)
    assert len(clip_table(tmp_path / "raw")) == 8


def test_a_server_that_sends_another_part_is_told(site, tmp_path, monkeypatch):
    reply = Site.reply
    monkeypatch.setattr(Site, "reply", lambda self, code, body, more={}, sent=None: reply(self, code, body, more and {"Content-Range": "bytes 5-9/10"}, sent))
    site.files["x.zip"], part = DATA, tmp_path / "x.part"
    part.write_bytes(DATA[:100])
    with pytest.raises(MmferError, match="sends another part than was asked for"): resume_download(site.url + "x.zip", part, progress=False)
    assert part.read_bytes() == DATA[:100]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where, call, after", [
    ("_stream", 2, True),           # the archive has come, but has no name yet
    ("unpack", 2, False), ("unpack", 2, True),
    ("copyfileobj", 20, False),     # the fourth of 16 clips
    ("prepare", 2, False), ("prepare", 2, True),
    ("_prepared_actors", 5, True),  # just before it is written down
    ("_prepare_actor", 2, True),    # written down, but the archive is still there
])
def test_killed_at_any_point_nothing_is_fetched_twice(site, tmp_path, mirror, archives, where, call, after):
    "A process dies, as with kill -9, before or after one of the steps with the second actor."
    place = mmfer.download if hasattr(mmfer.download, where) else shutil
    real, calls = getattr(place, where), []
    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) < call: return real(*args, **kwargs)
        if after: real(*args, **kwargs)
        os._exit(9)
    child = os.fork()
    if not child:
        setattr(place, where, dies)
        try: download(tmp_path / "raw", [1, 2, 3], tmp_path / "set", **mirror, **HOW)
        finally: os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    download(tmp_path / "raw", [1, 2, 3], tmp_path / "set", **mirror, **HOW)
    again = [(archive_name(2), len(archives[archive_name(2)]))] * (where == "_stream")  # "is there more?" "no"
    assert sorted(site.log) == sorted([(archive_name(a), 0) for a in (1, 2, 3)] + again)
    assert left(tmp_path / "raw") == [] and len(prepared_table(tmp_path / "set")) == 24


def test_two_downloads_into_one_folder(site, tmp_path, mirror):
    (tmp_path / "raw").mkdir()
    with FileLock(tmp_path / "raw" / ".download.lock"), pytest.raises(MmferError, match="in use by another download"):
        download(tmp_path / "raw", [1], **mirror, progress=False)
    assert not site.log


def test_unknown_actors_lists_and_addresses(site, tmp_path, mirror):
    for kwargs, sentence in ((mirror, "Actor_09.zip is not in the list of"), (dict(base_url=site.url), "pass a registry"),
                             (dict(base_url=site.url, registry=tmp_path / "gone.txt"), "gone.txt can't be read")):
        with pytest.raises(MmferError, match=sentence): download(tmp_path / "raw", [9], **kwargs, progress=False)


def test_a_damaged_list_of_what_is_done(tmp_path, mirror):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "downloaded.json").write_text("{")
    with pytest.raises(MmferError, match="downloaded.json is damaged: delete it"):
        download(tmp_path / "raw", [1], tmp_path / "set", **mirror, **HOW)


def test_names_and_checksums_come_from_the_doi(site, tmp_path, archives, monkeypatch):
    "Zenodo's answer, as pooch reads it, from the server on this machine."
    name = archive_name(2)
    (tmp_path / name).write_bytes(archives[name])
    entry = dict(key=name, checksum=f"md5:{pooch.file_hash(tmp_path / name, alg='md5')}", links=dict(self=site.url + name))
    site.files |= archives | {"records/1188976": json.dumps(dict(id=1188976, files=[entry])).encode()}
    zenodo = pooch.downloaders.ZenodoRepository
    monkeypatch.setattr(zenodo, "base_api_url", site.url + "records")
    monkeypatch.setattr(mmfer.download, "doi_to_repository", lambda doi, **how: zenodo(doi, f"https://zenodo.org/records/{doi.split('.')[-1]}", **how))
    download(tmp_path / "raw", [2], progress=False)
    assert left(tmp_path / "raw" / "Actor_02") == sorted(p + q[2:] for q in clip_names(archives[name]) for p in ("01", "02"))
    site.habit = "429"  # its answer is no JSON then
    with pytest.raises(MmferError, match="the list of files at doi:10.5281/zenodo.1188976 can't be read"):
        download(tmp_path / "raw", [3], progress=False)


def clip_names(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as z: return [n.split("/")[1] for n in z.namelist() if "/01-" in n]


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
    "One bad archive of each kind; the harmless clip comes first, where it could be written before the bad one is seen."
    names = dict(up=f"../{CLIP}", deep_up=f"a/../../{CLIP}", absolute=f"/tmp/{CLIP}", drive=f"C:{CLIP}", backslash=f"..\\{CLIP}",
                 dot=".", newline=f"a\n/{CLIP}", long=f"{CLIP[:-4]}{'x' * 250}.mp4",
                 device_name="a/CON", dotted="x .", blank=" ", program="run.sh")
    kinds = dict(link=stat.S_IFLNK, device=stat.S_IFCHR, disk=stat.S_IFBLK, pipe=stat.S_IFIFO, socket=stat.S_IFSOCK)
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


HOSTILE = {"up": "leads out", "deep_up": "leads out", "absolute": "leads out", "drive": "leads out", "backslash": "leads out", "dot": "leads out",
           "newline": "no clip has", "long": "no clip has", "nul": "no clip has", "device_name": "no clip has", "dotted": "no clip has", "blank": "no clip has", "program": "no clip has", "link": "link or a device", "device": "link or a device",
           "disk": "link or a device", "pipe": "link or a device", "socket": "link or a device", "bomb": "far more than clips allow", "flock": "at most 1000",
           "twice": f"{CLIP!r} is there twice", "bzip2": "unusual way", "encrypted": "is encrypted", "lie": f"damaged at member {CLIP!r}"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(kind, tmp_path):
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    path = hostile(kind, home / "bad.zip")
    with pytest.raises(MmferError, match=HOSTILE[kind]) as e: unpack(path, home / "clips")
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path] and left(home) == ["bad.zip"]


def test_a_hostile_archive_from_a_server_is_not_kept(site, tmp_path):
    site.files[archive_name(1)] = hostile("up", tmp_path / "up.zip").read_bytes()
    how = dict(base_url=site.url, registry=registry(tmp_path, site.files))
    for to in (None, tmp_path / "set"):
        with pytest.raises(MmferError, match=f"{archive_name(1)} is not safe to unpack"):
            download(tmp_path / "raw", [1], to, **how, progress=False)
        assert left(tmp_path / "raw") == ["LICENCE.txt"]
    assert not (tmp_path / CLIP).exists() and not (tmp_path / "set" / "downloaded.json").exists()


def test_both_names_of_a_member_are_looked_at():
    "Newer versions of Python take a second name from an extra field, and leave the first as it was."
    info = member(f"../{CLIP}")
    assert info.orig_filename == CLIP and "leads out" in mmfer.download._why_refused(info)
    assert mmfer.download._why_refused(member(CLIP)) is None


def test_unpack_does_not_touch_what_is_there(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "mine.txt").touch()
    with pytest.raises(MmferError, match="clips is there already"): unpack(hostile("none", tmp_path / "a.zip"), tmp_path / "clips")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"): pass
    with pytest.raises(MmferError, match="holds no file"): unpack(tmp_path / "empty.zip", tmp_path / "new")
    assert left(tmp_path) == ["a.zip", "clips", "empty.zip"] and left(tmp_path / "clips") == ["mine.txt"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_is_whole_or_refused(tmp_path, data):
    "Any three bytes changed, or any end cut off: the contents are right, or one sentence says that they are not."
    good = {CLIP: b"first clip" * 30, f"Actor_01/{OTHER}": bytes(range(256))}
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, contents in good.items(): z.writestr(name, contents)
    raw = bytearray(path.read_bytes())
    for i, b in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=3)): raw[i] = b
    path.write_bytes(raw[:data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    try: out = unpack(path, tmp_path / "out")
    except MmferError: assert left(tmp_path) == ["a.zip"]
    else:
        assert {p.read_bytes() for p in out.iterdir()} <= set(good.values()) | {b""}
        shutil.rmtree(out)
