"""A hub on this machine: what the hub's client asks of one, answered from a folder of repositories.

``folder/org/name/REVISION/…`` holds the files of a revision; a file ``gated`` or ``private`` beside the revisions says
who may read.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_miniature"


class Hub(ThreadingHTTPServer):
    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.broken = folder, False
        self.requests: list[tuple[str, str, str]] = []  # method, path, token

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append((self.command, path, token))
        if self.server.broken:
            return self.send(500, b"out of order")
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo = self.server.folder / "/".join(parts[:2])
        if not repo.is_dir() or ((repo / "private").exists() and token != TOKEN):
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if (repo / "gated").exists() and token != TOKEN:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        what, revision, *rest = parts[2:] or ["revision", "main"]
        commits = {commit_of(place): place for place in repo.iterdir() if place.is_dir()}
        home = commits.get(revision, repo / revision)
        if not home.is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api:
            return self.send(200, json.dumps(self.listed(home, tree=what == "tree")).encode())
        file = home.joinpath(*rest)
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return self.send(200, content, {"X-Repo-Commit": commit_of(home), "ETag": f'"{blob_of(content)}"'})

    def listed(self, home, *, tree):
        files = [file for file in sorted(home.rglob("*")) if file.is_file()]
        if tree:
            return [
                {"type": "file", "path": file.relative_to(home).as_posix(), "size": file.stat().st_size,
                 "oid": blob_of(file.read_bytes())}
                for file in files
            ]  # fmt: skip
        names = [{"rfilename": file.relative_to(home).as_posix()} for file in files]
        return {"id": home.parent.name, "sha": commit_of(home), "siblings": names, "private": False}

    def send(self, status, content, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def commit_of(home: Path) -> str:
    return hashlib.sha1(str(home.relative_to(home.parents[2])).encode()).hexdigest()


def blob_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_at(folder: Path):
    """A running hub that serves the repositories of a folder."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
