"""Clients that ask again until they are answered, and remember all that they were told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from shared.lifecycle import TERMINAL
from tests.chaos.child import POINTS
from tests.chaos.records import SUBMISSION, Download, Page, Seen, told

MODEL = "bundled/smollm2-135m-instruct"
# Frozen for longer than this, an API is as good as dead.
ANSWER_SECONDS = 4.0
# With these an answer says that it could not be given now.
NOT_NOW = frozenset({429, 503, 507})
STUMBLES = [f"{point}:{how}" for point in POINTS for how in ("die", "freeze")]


@dataclass
class Client:
    """One owner at work. `run` goes on until `leave` is set; `read_all` looks at everything once more."""

    name: str
    key: str
    url: str
    random: Random
    seen: Seen
    leave: threading.Event
    lock: threading.Lock
    # How long a step takes, about, and how many jobs wait or run at a time.
    step_seconds: float
    most_open: int
    # Which part of its jobs stumble.
    stumbling: float
    planned: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    cursors: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    submitted: int = 0
    # Planned jobs come one after the other, and are to come to what they are planned for.
    untouched: set[str | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=ANSWER_SECONDS,
            trust_env=False,
        )

    def run(self) -> None:
        while not self.leave.is_set():
            if self.planned and self.untouched <= self.ended.keys():
                self.untouched.add(self._submit(self.planned.pop(0)))
            elif len(self.jobs) - len(self.ended) < self.most_open:
                self._submit(self._job())
            elif self.jobs:
                self._choose()()
            self.leave.wait(self.random.uniform(0, 0.2))

    def is_done(self) -> bool:
        """Whether all that it has asked for has ended; paused jobs are put back or left."""
        for job_id in [j for j in self.jobs if j not in self.ended]:
            status = self._look(job_id)
            if status == "paused" and self.random.random() < 0.7:
                self._act(job_id, "resume")
            elif status not in TERMINAL | {"paused", "deleted"}:
                return False
        return all(job_id in self.ended or self._look(job_id) == "paused" for job_id in self.jobs)

    def read_all(self) -> None:
        for job_id in self.jobs:
            while self._read(job_id, wait=0):
                pass
            self._download(job_id, everything=True)

    def close(self) -> None:
        self._http.close()

    def _job(self) -> dict[str, Any]:
        metadata = {
            "steps": str(self.random.randint(3, 9)),
            "seconds": f"{self.random.uniform(0.2, 1.8) * self.step_seconds:.3f}",
        }
        if self.random.random() < self.stumbling:
            metadata["stumble"] = self.random.choice(STUMBLES)
        return {"name": "chaos", "metadata": metadata}

    def _choose(self) -> Callable[[], object]:
        job_id = self.random.choice(self.jobs[-8:])
        choices: list[tuple[int, Callable[[], object]]] = [
            (30, lambda: self._read(job_id, wait=1)),
            (12, lambda: self._follow(job_id)),
            (12, lambda: self._look(job_id)),
            (8, lambda: self._act(job_id, "resume")),
            (8, lambda: self._download(job_id)),
            (3, self._upload_some),
            (3, lambda: self._export(job_id)),
        ]
        if job_id not in self.untouched:
            choices += [
                (2, lambda: self._act(job_id, "cancel")),
                (4, lambda: self._act(job_id, "pause")),
                (1, lambda: self._delete(job_id)),
            ]
        return self.random.choices([do for _, do in choices], [weight for weight, _ in choices])[0]

    def _submit(self, spec: dict[str, Any]) -> str | None:
        """Under one idempotency key, until there is an answer; the job's id."""
        self.submitted += 1
        submission = f"{self.name}-{self.submitted}"
        metadata = {**spec.pop("metadata", {}), SUBMISSION: submission}
        body = {"model": MODEL, "max_seq_length": 512, **spec, "metadata": metadata}
        # A shutdown does not keep it from finding out: what was accepted is to be known.
        for _ in range(30):
            answer = self._call("POST", "/jobs", (201,), json=body, headers={"Idempotency-Key": submission})
            if answer is not None:
                job_id = str(answer.json()["id"])
                with self.lock:
                    self.seen.accepted.append((submission, job_id))
                self._saw(job_id, answer.json()["status"])
                self.jobs.append(job_id)
                return job_id
            time.sleep(0.3)
        return None

    def _read(self, job_id: str, wait: int) -> bool:
        """One page; whether there is more."""
        after = self.cursors.get(job_id, 0)
        query = {"after": after, "wait": wait, "limit": self.random.choice((1, 7, 200))}
        answer = self._call("GET", f"/jobs/{job_id}/logs", (200, 404), params=query)
        if answer is None or answer.status_code == 404:
            return False
        page = answer.json()
        self._read_entries(job_id, after, page["data"])
        self._saw(job_id, page["status"])
        return bool(page["has_more"])

    def _follow(self, job_id: str) -> None:
        """The stream, from where the last one broke off, for some seconds."""
        after = self.cursors.get(job_id, 0)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        deadline = time.monotonic() + self.random.uniform(0.5, 3)
        entries: list[dict[str, Any]] = []
        try:
            with self._http.stream("GET", f"/jobs/{job_id}/logs", headers=headers) as stream:
                if stream.status_code != 200:
                    self._judge(f"GET /jobs/{job_id}/logs as a stream", stream.status_code, (404,))
                    return
                event = ""
                for line in stream.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        event = value
                    elif name == "data" and event == "end":
                        with self.lock:
                            self.seen.endings.append((job_id, json.loads(value)["status"]))
                    elif name == "data":
                        entries.append(json.loads(value))
                    if time.monotonic() > deadline or self.leave.is_set():
                        break
        except httpx.TransportError:
            pass  # What came before it broke off counts.
        self._read_entries(job_id, after, entries)

    def _look(self, job_id: str) -> str | None:
        answer = self._call("GET", f"/jobs/{job_id}", (200, 404))
        if answer is None:
            return None
        if answer.status_code == 404:
            self._gone(job_id)
            return "deleted"
        status = str(answer.json()["status"])
        self._saw(job_id, status)
        return status

    def _act(self, job_id: str, verb: str) -> None:
        if verb == "cancel":
            with self.lock:
                self.seen.cancel_asked.add(job_id)
        answer = self._call("POST", f"/jobs/{job_id}/{verb}", (200, 404, 409))
        if answer is None or answer.status_code != 200:
            return
        self._saw(job_id, answer.json()["status"])
        if verb == "cancel":
            with self.lock:
                self.seen.cancelled.add(job_id)

    def _download(self, job_id: str, *, everything: bool = False) -> None:
        answer = self._call("GET", f"/jobs/{job_id}/artifacts", (200, 404))
        if answer is None or answer.status_code == 404:
            return
        listed = answer.json()["data"]
        for item in listed if everything else self.random.sample(listed, min(len(listed), 1)):
            # One that a later attempt has published meanwhile has another hash, and says so.
            file = self._call("GET", f"/jobs/{job_id}/artifacts/{item['name']}", (200, 404))
            if file is not None and file.status_code == 200:
                got = hashlib.sha256(file.content).hexdigest()
                told_hash = file.headers["etag"].strip('"')
                with self.lock:
                    self.seen.downloads.append(Download(job_id, item["name"], told_hash, got))

    def upload(self, content: bytes) -> str | None:
        """The file's id, if there was an answer."""
        answer = self._call("POST", "/datasets", (201,), files={"file": ("rows.jsonl", content)})
        if answer is None:
            return None
        file_id = str(answer.json()["id"])
        with self.lock:
            self.seen.uploads.append((file_id, hashlib.sha256(content).hexdigest()))
        return file_id

    def _upload_some(self) -> None:
        row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
        content = (json.dumps(row) + "\n").encode() * self.random.randint(1, 2000)
        self.upload(content)

    def _export(self, job_id: str) -> None:
        body = {"format": self.random.choice(("gguf:f16", "gguf:q8_0"))}
        self._call("POST", f"/jobs/{job_id}/exports", (200, 201, 404, 409), json=body)

    def _delete(self, job_id: str) -> None:
        if job_id not in self.ended:
            return
        with self.lock:
            self.seen.delete_asked.add(job_id)
        answer = self._call("DELETE", f"/jobs/{job_id}", (204, 404, 409))
        if answer is not None and answer.status_code != 409:
            self._gone(job_id)

    def _gone(self, job_id: str) -> None:
        """Nothing is to be seen of it any more; whether that is right the checker knows."""
        self.jobs.remove(job_id)
        self.ended.pop(job_id, None)

    def _read_entries(self, job_id: str, after: int, entries: list[dict[str, Any]]) -> None:
        if not entries:
            return
        found = tuple((e["seq"], told(e["message"], e["type"], e["data"])) for e in entries)
        with self.lock:
            self.seen.pages.append(Page(self.name, job_id, after, found))
        self.cursors[job_id] = found[-1][0]

    def _saw(self, job_id: str, status: str) -> None:
        with self.lock:
            self.seen.status(self.name, job_id, status)
        if status in TERMINAL:
            self.ended[job_id] = status

    def _call(
        self, method: str, path: str, expected: tuple[int, ...], **request: Any
    ) -> httpx.Response | None:
        """The answer, or None if there was none, or none for now."""
        try:
            answer = self._http.request(method, path, **request)
        except httpx.TransportError:
            return None
        return (
            answer
            if self._judge(f"{method} {path}: {answer.text[:300]}", answer.status_code, expected)
            else None
        )

    def _judge(self, what: str, status: int, expected: tuple[int, ...]) -> bool:
        if status in expected:
            return True
        if status not in NOT_NOW:
            with self.lock:
                self.seen.surprises.append(f"{what} was answered with {status}")
        return False


@contextmanager
def working(clients: list[Client]) -> Iterator[None]:
    """The clients at work, each on a thread; they have left when this ends."""
    threads = [threading.Thread(target=client.run, name=client.name) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for client in clients:
            client.leave.set()
        for thread in threads:
            thread.join()
