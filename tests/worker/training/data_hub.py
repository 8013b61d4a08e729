"""A small server that answers as the hub does for data sets: revisions, files, gated and missing ones."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.worker.training.data_samples import chat_row

SHA = "1" * 40
OLD_SHA = "2" * 40
ROWS = [chat_row(f"q{number}", f"a{number}") for number in range(5)]
FILES = {
    SHA: {"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()},
    OLD_SHA: {"train.jsonl": (json.dumps(ROWS[0]) + "\n").encode()},
}
REVISIONS = {"main": SHA, "old": OLD_SHA, SHA: SHA, OLD_SHA: OLD_SHA}


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._posted = self.rfile.read(length)
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        if "/nobody/nothing" in path:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if "/team/gated" in path:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self._api(parts[4:], body)
        if parts[0] == "datasets" and parts[3] == "resolve":
            return self._file(parts[4], "/".join(parts[5:]), body)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _api(self, rest: list[str], body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in REVISIONS:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        sha = REVISIONS[revision]
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
            for name, content in FILES[sha].items()
        ]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in FILES[sha]]
            return self._json({"id": "team/chats", "sha": sha, "siblings": siblings, "private": False}, body)
        if rest[0] == "tree":
            return self._json(entries, body)
        if rest[0] == "paths-info":
            wanted = self._posted.decode()
            return self._json([entry for entry in entries if entry["path"] in wanted], body)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _file(self, revision: str, name: str, body: bool) -> None:
        content = FILES.get(REVISIONS.get(revision, ""), {}).get(name)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": REVISIONS[revision]}
        return self._send(200, content, headers, body)

    def _json(self, value: Any, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Silence: what was asked is in `server.asked`."""


@contextmanager
def hub() -> Iterator[tuple[str, list[str]]]:
    """The server's address and the requests that it got."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
