"""A client of Tuneyard's HTTP API. Needs nothing of the server's own code but its names."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
WAIT_SECONDS = 30
RETRY_SECONDS = 1.0
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})

Json = dict[str, Any]


class ApiError(Exception):
    """The server refused: its message says why, `status` is HTTP's, `code` the contract's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ConnectionFailed(Exception):
    """Nothing answered at the server's address."""


class Client:
    """Calls the API at `url` with an API key."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            # A proxy of the environment can't reach this machine's own addresses.
            trust_env=not is_loopback(self.url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, spec: Json, idempotency_key: str | None = None) -> Json:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._json("POST", "/jobs", json=spec, headers=headers)

    def estimate(self, spec: Json) -> Json:
        return self._json("POST", "/jobs/estimate", json=spec)

    def jobs(self, **filters: Any) -> Json:
        return self._json("GET", "/jobs", params={k: v for k, v in filters.items() if v is not None})

    def job(self, job_id: str) -> Json:
        return self._json("GET", f"/jobs/{quote(job_id, safe='')}")

    def cancel(self, job_id: str) -> Json:
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/cancel")

    def pause(self, job_id: str) -> Json:
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/pause")

    def resume(self, job_id: str) -> Json:
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/resume")

    def move(self, job_id: str, place: Json) -> Json:
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/move", json=place)

    def delete_job(self, job_id: str) -> None:
        self._send("DELETE", f"/jobs/{quote(job_id, safe='')}")

    def metrics(self, job_id: str) -> list[Json]:
        rows: list[Json] = self._json("GET", f"/jobs/{quote(job_id, safe='')}/metrics")["data"]
        return rows

    def set_secret(self, name: str, value: str) -> None:
        self._send("PUT", f"/secrets/{quote(name, safe='')}", json={"value": value})

    def secrets(self) -> list[Json]:
        rows: list[Json] = self._json("GET", "/secrets")["data"]
        return rows

    def remove_secret(self, name: str) -> None:
        self._send("DELETE", f"/secrets/{quote(name, safe='')}")

    def audit(self, **filters: Any) -> Json:
        return self._json("GET", "/audit", params={k: v for k, v in filters.items() if v is not None})

    def artifacts(self, job_id: str) -> list[Json]:
        rows: list[Json] = self._json("GET", f"/jobs/{quote(job_id, safe='')}/artifacts")["data"]
        return rows

    def export(self, job_id: str, fmt: str, checkpoint: int | None = None) -> Json:
        """Ask for another file of a job that has succeeded."""
        body = {"format": fmt, "checkpoint": checkpoint}
        return self._json("POST", f"/jobs/{quote(job_id, safe='')}/exports", json=body)

    def exports(self, job_id: str) -> list[Json]:
        rows: list[Json] = self._json("GET", f"/jobs/{quote(job_id, safe='')}/exports")["data"]
        return rows

    def logs(self, job_id: str, *, follow: bool = False, after: int = 0) -> Iterator[Json]:
        """The entries of a job's log, oldest first; with `follow` until the job has ended.

        A server that is away for a moment is asked again where the log was left.
        """
        path = f"/jobs/{quote(job_id, safe='')}/logs"
        while True:
            params = {"after": after, "limit": 1000, "wait": WAIT_SECONDS if follow else 0}
            try:
                page = self._json("GET", path, params=params)
            except ConnectionFailed:
                if not follow:
                    raise
                time.sleep(RETRY_SECONDS)
                continue
            yield from page["data"]
            after = page["next"]
            ended = page["status"] in TERMINAL or not follow
            if ended and not page["has_more"]:
                return

    def download(self, job_id: str, name: str, folder: Path) -> Path:
        """Download one artifact into the folder, going on where an earlier try broke off.

        Raises:
            ApiError: the server refused, or what came does not have the hash that the server told.
        """
        listed = {a["name"]: a for a in self.artifacts(job_id)}
        if name not in listed:
            known = ", ".join(listed) or "none yet"
            raise ApiError(404, "not_found", f"The job has no artifact {name}. It has: {known}.")
        target = folder / Path(name).name
        partial = target.with_name(target.name + ".part")
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists() and partial.stat().st_size >= listed[name]["bytes"]:
            partial.unlink()  # a whole file would have been renamed: this one is of something else
        self._fetch(listed[name]["url"], partial, listed[name]["sha256"])
        partial.replace(target)
        return target

    def _fetch(self, path: str, partial: Path, sha256: str) -> None:
        have = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'} if have else {}
        try:
            with self._stream("GET", path, headers=headers) as answer:
                resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT
                _write_chunks(partial, answer, append=resumed)
        except httpx.TransportError as error:
            raise ConnectionFailed(
                f"The download broke off: {error}. The same command goes on where it was."
            ) from error
        with partial.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return
        partial.unlink()
        raise ApiError(502, "corrupt_download", f"What came of {path} is damaged: try again.")

    def upload(self, path: Path, format_name: str = "auto") -> Json:
        """Upload a data file, streamed from disk."""
        with path.open("rb") as file:
            return self._json(
                "POST",
                "/datasets",
                files={"file": (path.name, file, "application/octet-stream")},
                data={"format": format_name},
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            )

    def datasets(self, **filters: Any) -> Json:
        return self._json("GET", "/datasets", params={k: v for k, v in filters.items() if v is not None})

    def dataset(self, dataset_id: str) -> Json:
        return self._json("GET", f"/datasets/{quote(dataset_id, safe='')}")

    def delete_dataset(self, dataset_id: str) -> None:
        self._send("DELETE", f"/datasets/{quote(dataset_id, safe='')}")

    def chat(self, body: Json) -> Iterator[Json]:
        """The chunks of a streamed chat completion.

        Raises:
            ApiError: the server refused, or the model failed in the middle.
        """
        # The model may have to be loaded first: the server itself bounds how long that takes.
        request = self._http.build_request(
            "POST", "/v1/chat/completions", json=body, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS)
        )
        with _Stream(self._http, request, self.url) as answer:
            try:
                for line in answer.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk: Json = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ApiError(502, chunk["error"]["code"], chunk["error"]["message"])
                    yield chunk
            except httpx.TransportError as error:
                raise ConnectionFailed(f"The answer broke off: {error}") from error

    def create_webhook(self, name: str, url: str, event_types: list[str]) -> Json:
        body = {"name": name, "url": url, "event_types": event_types}
        return self._json("POST", "/v1/webhook_endpoints", json=body)

    def webhooks(self, **filters: Any) -> Json:
        return self._json("GET", "/v1/webhook_endpoints", params=filters)

    def test_webhook(self, webhook_id: str, event_type: str) -> Json:
        path = f"/v1/webhook_endpoints/{quote(webhook_id, safe='')}/test"
        return self._json("POST", path, json={"event_type": event_type})

    def delete_webhook(self, webhook_id: str) -> None:
        self._send("DELETE", f"/v1/webhook_endpoints/{quote(webhook_id, safe='')}")

    def models(self) -> list[Json]:
        rows: list[Json] = self._json("GET", "/models")["data"]
        return rows

    def system(self) -> Json:
        return self._json("GET", "/system")

    def _json(self, method: str, path: str, **options: Any) -> Json:
        answer: Json = self._send(method, path, **options).json()
        return answer

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{self.url} does not answer: {error}") from error
        if answer.is_error:
            raise _refusal(answer)
        return answer

    def _stream(self, method: str, path: str, headers: dict[str, str]) -> _Stream:
        return _Stream(self._http, self._http.build_request(method, path, headers=headers), self.url)


def _write_chunks(path: Path, answer: httpx.Response, *, append: bool) -> None:
    with path.open("ab" if append else "wb") as file:
        for chunk in answer.iter_bytes(1 << 20):
            file.write(chunk)


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine."""
    host = httpx.URL(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


class _Stream:
    """A streamed answer whose errors are ours."""

    def __init__(self, http: httpx.Client, request: httpx.Request, url: str) -> None:
        self._http = http
        self._request = request
        self._url = url
        self._answer: httpx.Response | None = None

    def __enter__(self) -> httpx.Response:
        try:
            self._answer = self._http.send(self._request, stream=True)
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{self._url} does not answer: {error}") from error
        if self._answer.is_error:
            self._answer.read()
            raise _refusal(self._answer)
        return self._answer

    def __exit__(self, *_: object) -> None:
        if self._answer is not None:
            self._answer.close()


def _refusal(answer: httpx.Response) -> ApiError:
    try:
        error = answer.json()["error"]
        return ApiError(answer.status_code, error["code"], error["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return ApiError(answer.status_code, "unknown", f"HTTP {answer.status_code} from {answer.url}")
