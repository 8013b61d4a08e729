"""Limits on what one owner may take of the service."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.services import jobs as job_service
from api.services import logs as log_service
from shared.repository import logs
from shared.settings import Settings
from shared.spec import JobSpec
from tests.api.conftest import SPEC, Api, Live, error_of, eventually
from tests.conftest import wait_for

pytestmark = pytest.mark.anyio

FOLLOW = {"accept": "text/event-stream"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_open_requests": 3})


def test_followers_of_one_owner_are_limited_and_others_are_not(
    live: Live, owner_keys: dict[str, str]
) -> None:
    with live.client() as client, httpx.Client(base_url=live.url, timeout=10) as bob:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
        streams = [client.stream("GET", f"/jobs/{job_id}/logs", headers=FOLLOW) for _ in range(3)]
        for stream in streams:
            assert stream.__enter__().status_code == 200
        wait_for(lambda: live.context.hub.followers == 3)
        error = error_of(client.get("/jobs"), 429)
        assert (error["code"], error["type"]) == ("too_many_requests", "rate_limit_error")
        assert bob.get("/jobs", headers={"Authorization": f"Bearer {owner_keys['bob']}"}).status_code == 200
        assert client.get("/healthz").status_code == 200
        for stream in streams:
            stream.__exit__(None, None, None)
        wait_for(lambda: client.get("/jobs").status_code == 200)
    wait_for(lambda: not live.context.open_requests._open)


async def test_a_request_counts_until_its_answer_has_gone(api: Api) -> None:
    job_id = await api.create()
    waits = [asyncio.create_task(api.ann.get(f"/jobs/{job_id}/logs?after=1&wait=20")) for _ in range(3)]
    await eventually(lambda: _are_open(api, 3))
    error_of(await api.ann.get("/jobs"), 429)
    api.append(job_id, "news")
    api.context.doorbell.tell(job_id)
    for answer in await asyncio.gather(*waits):
        assert answer.status_code == 200
    for _ in range(5):
        assert (await api.ann.get("/jobs/nothing")).status_code == 404
    assert not api.context.open_requests._open


async def _are_open(api: Api, count: int) -> bool:
    return sum(api.context.open_requests._open.values()) == count


async def test_filters_are_no_more_than_metadata_has(shared_api: Api) -> None:
    query = "&".join(f"metadata[k{n}]=v" for n in range(16))
    assert (await shared_api.ann.get(f"/jobs?{query}")).status_code == 200
    for more in (1, 3000):
        long = query + "".join(f"&metadata[m{n}]=v" for n in range(more))
        assert error_of(await shared_api.ann.get(f"/jobs?{long}"), 422)["param"] == "metadata"


HEAVY: dict[str, bytes] = {
    "digits": b'{"max_samples": ' + b"9" * 1_000_000 + b"}",
    "exponent": b'{"training": {"learning_rate": 1e-' + b"9" * 1000 + b"}}",
    "arrays": b"[" * 500_000,
    "objects": b'{"metadata": ' * 70_000,
    "metadata": json.dumps({"metadata": {f"k{n}": "v" for n in range(50_000)}}).encode(),
    "unknown fields": json.dumps({f"field{n}": n for n in range(50_000)}).encode(),
    "modules": json.dumps({"lora": {"target_modules": ["a" * 100] * 9000}}).encode(),
    "model": json.dumps({"model": "a." * 400_000}).encode(),
    "revision": json.dumps({"model_revision": "a/" * 400_000}).encode(),
    "name": json.dumps({"name": "\u202e" * 300_000}).encode(),
    "one key twice": b'{"a": 1, "a": 2}',
    "not utf-8": b'{"name": "\xff\xfe"}',
}


@pytest.mark.parametrize("body", HEAVY.values(), ids=HEAVY)
@pytest.mark.parametrize("path", ["/jobs", "/jobs/estimate"])
async def test_a_heavy_spec_is_refused_at_once(shared_api: Api, path: str, body: bytes) -> None:
    started = time.process_time()
    answer = await shared_api.ann.post(path, content=body)
    assert answer.status_code in (400, 413, 422), answer.text
    assert len(answer.content) < 4000
    assert time.process_time() - started < 5


def test_every_number_and_text_of_a_spec_has_a_limit() -> None:
    schema = JobSpec.model_json_schema()
    unlimited = [
        name
        for owner in [schema, *schema["$defs"].values()]
        for name, field in owner["properties"].items()
        for part in [field, *field.get("anyOf", []), field.get("items", {})]
        if field.get("maxItems") != 0 and not _is_limited(part)
    ]
    assert unlimited == []


def _is_limited(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    if kind in ("integer", "number"):
        return ("maximum" in part or "exclusiveMaximum" in part) and (
            "minimum" in part or "exclusiveMinimum" in part
        )
    if kind == "string":
        return any(key in part for key in ("maxLength", "enum", "const", "pattern"))
    if kind == "array":
        return "maxItems" in part
    return kind != "object" or "maxProperties" in part


async def test_metrics_of_a_long_job_come_in_pieces(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_service, "METRICS_PAGE", 2)
    job_id = await api.create()
    for count in range(6):
        answer = await api.ann.get(f"/jobs/{job_id}/metrics")
        assert answer.headers["content-type"] == "application/json"
        assert [row["step"] for row in answer.json()["data"]] == list(range(count))
        with api.database.write() as session:
            logs.put_metrics(session, job_id, [{"step": count, "loss": 1.5}])


async def test_nothing_of_a_request_makes_a_line_of_the_log(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(job_service.jobs, "get_job", fail)
    with caplog.at_level(logging.ERROR):
        answer = await api.ann.get("/jobs/ftjob-%0aforged%1b[2J%0d")
        job_id = await api.create()
        failed = await api.ann.get(f"/jobs/{job_id}", headers={"x-request-id": "a\tb"})
    assert (answer.status_code, failed.status_code) == (404, 500)
    assert error_of(failed, 500)["message"].count("boom") == 0
    for record in caplog.records:
        assert not set("\n\r\x1b") & set(record.getMessage())


@pytest.mark.parametrize(
    "filename",
    [
        'a"; filename="b',
        "a\\r\\nX-Evil: 1",
        "../../etc/passwd",
        "..\\\\..\\\\x",
        "\\u202egpj.exe",
        "%0d%0aX: y",
        "a\\0b",
    ],
)
async def test_names_of_uploads_are_words_and_nothing_more(api: Api, filename: str, tmp_path: Path) -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
        + filename.encode().decode("unicode_escape").encode("utf-8", "surrogatepass")
        + b'\r\n--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + b'{"text":"a"}\r\n--x--\r\n'
    )
    answer = await api.ann.post(
        "/datasets", content=form, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code in (201, 400), answer.text
    if answer.status_code == 201:
        told = answer.json()["filename"]
        assert not set("/\\\\\r\n\0\u202e") & set(told)
        assert [f.name for f in api.context.settings.root.rglob("*passwd*")] == []
        assert "x-evil" not in answer.headers


async def test_every_answer_is_what_it_says_it_is(shared_api: Api) -> None:
    for path in ("/jobs", "/nothing", "/healthz", "/docs", "/openapi.json"):
        assert (await shared_api.ann.get(path)).headers["x-content-type-options"] == "nosniff"
