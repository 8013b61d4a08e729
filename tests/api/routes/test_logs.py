"""Logs over HTTP: pages, long polls, finished streams; metrics and checkpoints."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from shared.events import Checkpoint, Entry
from shared.lifecycle import JobStatus
from shared.repository import logs
from tests.api.conftest import Api, eventually

pytestmark = pytest.mark.anyio

STREAM = {"accept": "text/event-stream"}


async def test_a_log_is_read_in_pages(api: Api) -> None:
    job_id = await api.create()
    api.append(job_id, *[f"line {n}" for n in range(2, 8)])
    seen: list[int] = []
    after = 0
    while True:
        page = (await api.ann.get(f"/jobs/{job_id}/logs?after={after}&limit=3")).json()
        assert set(page) == {"data", "next", "first_seq", "has_more", "status"}
        assert (page["first_seq"], page["status"]) == (1, "queued")
        seen += [entry["seq"] for entry in page["data"]]
        assert page["next"] == seen[-1]
        after = page["next"]
        if not page["has_more"]:
            break
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    beyond = (await api.ann.get(f"/jobs/{job_id}/logs?after=7")).json()
    assert (beyond["data"], beyond["next"], beyond["has_more"]) == ([], 7, False)


async def test_an_entry_has_the_contracts_shape(api: Api) -> None:
    job_id = await api.create()
    entry = Entry('Überraschung\n"quoted" \u2028', "warning", "metrics", {"loss": 0.5, "step": 1})
    with api.database.write() as session:
        logs.append_entries(session, job_id, [entry])
    page = (await api.ann.get(f"/jobs/{job_id}/logs?after=1")).json()
    found = page["data"][0]
    assert found.pop("time").endswith("Z")
    assert found == {
        "seq": 2, "level": "warning", "type": "metrics", "message": entry.message, "data": entry.data,
    }  # fmt: skip


async def test_a_long_poll_waits_for_an_entry(api: Api) -> None:
    job_id = await api.create()
    poll = asyncio.create_task(api.ann.get(f"/jobs/{job_id}/logs?after=1&wait=20", timeout=30))

    async def waits() -> bool:
        return api.context.hub.followers == 1

    await eventually(waits)
    api.append(job_id, "news")
    api.context.doorbell.tell(job_id)
    page = (await poll).json()
    assert [entry["message"] for entry in page["data"]] == ["news"]
    assert (page["next"], page["has_more"]) == (2, False)
    assert api.context.hub.followers == api.context.hub.readers == 0


async def test_a_long_poll_ends_with_the_job_and_with_its_time(api: Api) -> None:
    job_id = await api.create()
    started = time.monotonic()
    page = (await api.ann.get(f"/jobs/{job_id}/logs?after=1&wait=0.2")).json()
    assert (page["data"], page["next"]) == ([], 1)
    assert time.monotonic() - started >= 0.2
    poll = asyncio.create_task(api.ann.get(f"/jobs/{job_id}/logs?after=1&wait=20", timeout=30))

    async def waits() -> bool:
        return api.context.hub.followers == 1

    await eventually(waits)
    api.finish(job_id)
    api.context.doorbell.tell(job_id)
    assert (await poll).json()["status"] == "succeeded"
    # Of a job that has ended nothing is waited for.
    started = time.monotonic()
    await api.ann.get(f"/jobs/{job_id}/logs?after=1&wait=20")
    assert time.monotonic() - started < 5


async def test_a_finished_job_is_streamed_whole_with_its_end(api: Api) -> None:
    job_id = await api.create()
    # More than one page from the database.
    api.append(job_id, *[f"line {n}" for n in range(2, 1302)])
    api.finish(job_id, JobStatus.FAILED)
    answer = await api.ann.get(f"/jobs/{job_id}/logs", headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    events = answer.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == 'event: end\ndata: {"status":"failed"}'
    page = (await api.ann.get(f"/jobs/{job_id}/logs?limit=1000")).json()
    assert len(events) - 2 == 1301
    for event, entry in zip(events, page["data"], strict=False):
        head, data = event.split("\n")
        assert head == f"id: {entry['seq']}"
        assert json.loads(data.removeprefix("data: ")) == entry


async def test_a_stream_goes_on_after_the_last_event(api: Api) -> None:
    job_id = await api.create()
    api.append(job_id, "two", "three", "four")
    api.finish(job_id)

    async def ids(path: str, **headers: str) -> list[str]:
        answer = await api.ann.get(f"/jobs/{job_id}/logs{path}", headers=STREAM | headers)
        assert answer.text.endswith('event: end\ndata: {"status":"succeeded"}\n\n')
        return [line[4:] for line in answer.text.splitlines() if line.startswith("id: ")]

    assert await ids("?after=2") == ["3", "4"]
    assert await ids("", **{"Last-Event-ID": "3"}) == ["4"]
    # A browser that reconnects repeats its address and adds the header.
    assert await ids("?after=1", **{"Last-Event-ID": "3"}) == ["4"]
    assert await ids("?after=4") == []
    assert await ids("?after=99") == []
    # What is no seq of ours is ignored.
    for bad in ("", "x", "-1", "1.5", "+3", "9" * 19, "9" * 5000):
        assert await ids("?after=2", **{"Last-Event-ID": bad}) == ["3", "4"]


@pytest.mark.parametrize(
    ("accept", "streamed"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8", True),
        ("application/json;q=0.5, text/event-stream;q=0.1", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream; Q=0.000, */*", False),
        ("text/event-streams", False),
        ("application/x-text/event-stream", False),
        ("text/*", False),
        ("*/*", False),
        ("", False),
        (",;,", False),
    ],
)
async def test_a_stream_is_what_accept_names(api: Api, accept: str, *, streamed: bool) -> None:
    job_id = await api.create()
    api.finish(job_id)
    answer = await api.ann.get(f"/jobs/{job_id}/logs", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream") == streamed


async def test_metrics_come_one_row_a_step(api: Api) -> None:
    job_id = await api.create()
    rows = [{"step": n, "loss": 1 / n, "epoch": n / 10} for n in (1, 2, 3)]
    with api.database.write() as session:
        logs.put_metrics(session, job_id, [rows[2], rows[0], rows[1]])
    assert (await api.ann.get(f"/jobs/{job_id}/metrics")).json() == {"data": rows}


async def test_checkpoints(api: Api, tmp_path: Path) -> None:
    job_id = await api.create()
    with api.database.write() as session:
        logs.put_checkpoint(session, job_id, Checkpoint(500, tmp_path, 123, {"loss": 1.5}), [500])
    found = (await api.ann.get(f"/jobs/{job_id}/checkpoints")).json()["data"]
    assert found[0].pop("created_at").endswith("Z")
    assert found == [{"step": 500, "bytes": 123, "metrics": {"loss": 1.5}}]
