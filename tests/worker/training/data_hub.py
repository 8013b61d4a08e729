"""A small server that answers as the hub does: data sets and models, revisions, gated and missing ones.

`team/gated` is closed to everybody; of `team/asks` the names of its files are public, but no file;
`nobody/nothing` (401) and `nobody/gone` (404) are missing. Other names are data sets, and models if given.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.worker.training.data_samples import chat_row

SHA = "1" * 40
OLD_SHA = "2" * 40
ROWS = [chat_row(f"q{number}", f"a{number}") for number in range(5)]
FILES = {
    SHA: {"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()},
    OLD_SHA: {"train.jsonl": (json.dumps(ROWS[0]) + "\n").encode()},
}
REVISIONS = {"main": SHA, "old": OLD_SHA, "v1.0": OLD_SHA, SHA: SHA, OLD_SHA: OLD_SHA}
Commits = dict[str, dict[str, bytes]]


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
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        kind = "models"
        if api or parts[0] == "datasets":
            kind, parts = parts[api], parts[api + 1 :]
        name, rest = "/".join(parts[:2]), parts[2:]
        if name.startswith("nobody/"):
            status = 401 if name == "nobody/nothing" else 404
            return self._send(status, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if name == "team/gated" or (name == "team/asks" and (not api or rest == ["auth-check"])):
            # 401 without a token, 403 with one that has no access.
            status = 403 if name == "team/gated" else 401
            return self._send(status, b"", {"X-Error-Code": "GatedRepo"}, body)
        server: Any = self.server
        commits = server.datasets.get(name, FILES) if kind == "datasets" else server.models.get(name)
        if commits is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if api:
            return self._api(name, commits, rest, body)
        if rest[:1] == ["resolve"]:
            return self._file(commits, rest[1], "/".join(rest[2:]), body)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _api(self, name: str, commits: Commits, rest: list[str], body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in REVISIONS:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        sha = REVISIONS[revision]
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": etag(content)}
            for file, content in commits[sha].items()
        ]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": file} for file in commits[sha]]
            gated = "auto" if name == "team/asks" else False
            info = {"id": name, "sha": sha, "siblings": siblings, "private": False, "gated": gated}
            return self._json(info, body)
        if rest[0] == "tree":
            return self._json(entries, body)
        if rest[0] == "paths-info":
            wanted = self._posted.decode()
            return self._json([entry for entry in entries if entry["path"] in wanted], body)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _file(self, commits: Commits, revision: str, name: str, body: bool) -> None:
        content = commits.get(REVISIONS.get(revision, ""), {}).get(name)
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
def hub(
    models: dict[str, Commits] | None = None, datasets: dict[str, Commits] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The server's address and the requests that it got.

    Args:
        models: files by name, by commit (`SHA`, `OLD_SHA`), by the model's id.
        datasets: the same of data sets; those that are not in it have `FILES`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked = []  # type: ignore[attr-defined]
    server.models = models or {}  # type: ignore[attr-defined]
    server.datasets = datasets or {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(script: str, wanted: Any, endpoint: str, folder: Path, **more: str) -> dict[str, Any]:
    """What a script prints as JSON in a process of its own: the hub's address is read when it is imported.

    Args:
        wanted: given to the script as JSON.
        folder: where it works; the hub's cache is in there.
        more: variables of its environment.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
        **more,
    }
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(wanted)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))
