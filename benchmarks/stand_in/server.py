"""A server on this machine that stands in for the Hugging Face Hub and for RAVDESS's place at Zenodo."""
import hashlib
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

PIECE = 2**18  # bytes that are sent at once


class StandIn(ThreadingHTTPServer):
    """Serves `root/hub/OWNER/NAME/FILE` as the hub does, and any other file below `root` as it lies there.

    What the clients fetched is written down, so that a rehearsal can tell a download under way."""
    daemon_threads = True

    def __init__(
        self,
        root,          # the folder of files
        paces={},      # {folder below `root`: bytes per second of an answer}; others: as fast as it can
        breaks=set(),  # files, by their path below `root`, whose first answer ends in the middle
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = Path(root)
        self.paces = paces
        self.breaks = set(breaks)
        self.sent = Counter()   # {path below `root`: bytes sent}
        self.asked = []         # (method, path, status) in their order

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self):
        "Serve from a thread of its own while the block runs."
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try: yield self
        finally:
            self.shutdown()
            self.server_close()


def commit_of(repo: str) -> str:
    "The one revision that a repository has here."
    return hashlib.sha1(repo.encode()).hexdigest()


def _etag(file):
    "Changes when the file does, without reading gigabytes."
    state = file.stat()
    return hashlib.sha256(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()


def _card(folder):
    "What the model card says in its head."
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self): self._answer()

    def do_GET(self): self._answer()

    def log_message(self, *_): pass

    def send_response(self, code, message=None):
        self.server.asked.append((self.command, self.path, code))
        super().send_response(code, message)

    def _answer(self):
        path = self.path.split("?")[0].strip("/")
        try:
            if found := re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path):
                return self._answer_about(*found.groups())
            if found := re.fullmatch(r"([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                return self._send_hub_file(*found.groups())
            file = self.server.root / path
            if file.is_file(): return self._send_file(file)
            self._send_nothing()
        except (BrokenPipeError, ConnectionResetError): self.close_connection = True  # the client was killed

    def _repo(self, repo):
        folder = self.server.root / "hub" / repo
        if folder.is_dir(): return folder
        self._send_nothing({"X-Error-Code": "RepoNotFound"})

    def _answer_about(self, repo, what):
        if not (folder := self._repo(repo)): return
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if what == "tree":
            return self._send_json([
                dict(type="file", path=name, size=file.stat().st_size, oid=_etag(file)[:40])
                for name, file in files.items()])
        self._send_json(dict(
            id=repo, sha=commit_of(repo), private=False, gated=False, tags=[], cardData=_card(folder),
            siblings=[dict(rfilename=name) for name in files]))

    def _send_hub_file(self, repo, name):
        if not (folder := self._repo(repo)): return
        commit = {"X-Repo-Commit": commit_of(repo)}
        file = folder / name
        if file.is_file(): return self._send_file(file, commit)
        self._send_nothing(commit | {"X-Error-Code": "EntryNotFound"})

    def _send_headers(self, status, headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, str(value))
        self.end_headers()

    def _send_nothing(self, headers={}):
        self._send_headers(404, {"Content-Length": 0} | headers)

    def _send_json(self, data):
        body = json.dumps(data).encode()
        self._send_headers(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        if self.command == "GET": self.wfile.write(body)

    def _send_file(self, file, headers={}):
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = int(asked[2]) if asked and asked[2] else size - 1
        if first >= size > 0:
            return self._send_headers(416, {"Content-Range": f"bytes */{size}", "Content-Length": 0})
        part = {"Content-Range": f"bytes {first}-{last}/{size}"} if asked else {}
        about = {"ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes", "Content-Length": last + 1 - first}
        self._send_headers(206 if asked else 200, headers | about | part)
        if self.command == "GET": self._send_bytes(file, first, last + 1)

    def _send_bytes(self, file, first, end):
        name = str(file.relative_to(self.server.root))
        if name in self.server.breaks:
            self.server.breaks.remove(name)
            end = (first + end) // 2
            self.close_connection = True
        pace = self.server.paces.get(name.split("/")[0])
        with open(file, "rb") as f:
            f.seek(first)
            while first < end:
                piece = f.read(min(PIECE, end - first))
                self.wfile.write(piece)
                self.server.sent[name] += len(piece)
                first += len(piece)
                if pace: time.sleep(len(piece) / pace)
