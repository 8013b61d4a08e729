"""Quotas, places in the queue and moving one's own jobs, over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api.queue_view import QueueView
from shared.clock import utcnow
from shared.device import Device
from shared.lifecycle import JobStatus
from shared.repository import jobs, keys, owners
from shared.tables import WorkerRow
from tests.api.conftest import GOOD_ROW, SPEC, Api, error_of

pytestmark = pytest.mark.anyio


def use_settings(api: Api, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    context = api.context
    settings = context.settings.model_copy(update=changes)
    view = QueueView(context.database, settings)
    changed = type(context)(**{**context.__dict__, "settings": settings, "queue": view})
    monkeypatch.setattr(api.app.state, "context", changed)


def put_worker(api: Api, slots: int = 1) -> None:
    found = [Device("cpu", n, "CPU", 64 << 30).to_json() for n in range(slots)]
    with api.database.write() as session:
        keys.put_worker(session, WorkerRow(id="box-1", hostname="box", slots=found))


def run(api: Api, job_id: str, eta: float | None = None, ago: float = 0) -> None:
    """The job runs on box-1."""
    progress = {"step": 1, "total_steps": 9, "epoch": 0.1, "eta_seconds": eta} if eta else None
    with api.database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        since = utcnow() - timedelta(seconds=ago)
        jobs.set_status(
            job,
            JobStatus.RUNNING,
            worker="box-1",
            lease_token="t",
            attempt_started_at=since,
            progress=progress,
        )


def expect(api: Api, job_id: str, seconds: float | None) -> None:
    with api.database.write() as session:
        jobs.lock_job(session, job_id, None).expected_seconds = seconds


async def place(api: Api, job_id: str) -> Any:
    api.context.queue.forget()
    return (await api.root.get(f"/jobs/{job_id}")).json()["queue"]


async def seconds_until_start(api: Api, job_id: str) -> float | None:
    start = (await place(api, job_id))["expected_start"]
    return None if start is None else (datetime.fromisoformat(start) - datetime.now(UTC)).total_seconds()


async def test_a_queued_job_tells_its_place(api: Api) -> None:
    first, second = await api.create(), await api.create()
    other = (await api.bob.post("/jobs", json=SPEC)).json()["id"]
    seen = [await place(api, job_id) for job_id in (first, other, second)]
    assert [(p["position"], p["of"], p["held_by"]) for p in seen] == [
        (1, 3, None),
        (2, 3, None),
        (3, 3, None),
    ]
    api.finish(first)
    assert await place(api, first) is None
    assert (await place(api, second))["of"] == 2


async def test_one_look_at_the_queue_serves_many(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    real = owners.standings
    monkeypatch.setattr(owners, "standings", lambda *args: looks.append(1) or real(*args))
    made = [await api.create() for _ in range(3)]
    await place(api, made[0])
    looks.clear()
    for job_id in made * 3:
        assert (await api.ann.get(f"/jobs/{job_id}")).json()["queue"]["of"] == 3
    assert len(looks) <= 1


async def test_the_expected_start_comes_from_what_is_known(api: Api) -> None:
    put_worker(api)
    running, first, second = [await api.create() for _ in range(3)]
    run(api, running, eta=100)
    assert await seconds_until_start(api, first) == pytest.approx(100, abs=5)
    expect(api, first, None)
    assert await seconds_until_start(api, second) is None
    expect(api, first, 50)
    assert await seconds_until_start(api, second) == pytest.approx(150, abs=5)


async def test_without_a_speed_the_estimate_of_the_post_counts(api: Api) -> None:
    put_worker(api)
    running, waiting = await api.create(), await api.create()
    run(api, running, ago=30)
    expect(api, running, 100)
    assert await seconds_until_start(api, waiting) == pytest.approx(70, abs=5)
    # Longer than it was thought to take: nobody knows.
    expect(api, running, 20)
    assert await seconds_until_start(api, waiting) is None


async def test_no_worker_and_a_free_slot_that_does_not_take_it_promise_nothing(api: Api) -> None:
    job_id = await api.create()
    assert await seconds_until_start(api, job_id) is None
    put_worker(api)
    assert await seconds_until_start(api, job_id) == pytest.approx(0, abs=5)
    with api.database.write() as session:
        jobs.lock_job(session, job_id, None).created_at = utcnow() - timedelta(hours=1)
    assert await seconds_until_start(api, job_id) is None


async def test_a_job_posted_while_a_worker_is_on_line_is_estimated(api: Api) -> None:
    put_worker(api)
    spec = {"training": {"max_steps": 10}}
    told = (await api.ann.post("/jobs/estimate", json=SPEC | spec)).json()["seconds"]
    job_id = await api.create(**spec)
    with api.database.read() as session:
        assert jobs.get_job(session, job_id, None).expected_seconds == told


async def test_moving(api: Api) -> None:
    a, b, c = [await api.create() for _ in range(3)]
    other = (await api.bob.post("/jobs", json=SPEC)).json()["id"]

    async def order() -> list[str]:
        api.context.queue.forget()
        told = [(await api.ann.get(f"/jobs/{job_id}")).json()["queue"]["position"] for job_id in (a, b, c)]
        return [name for _, name in sorted(zip(told, "abc", strict=True))]

    moved = await api.ann.post(f"/jobs/{c}/move", json={"to": "first"})
    assert moved.status_code == 200
    assert moved.json()["queue"]["position"] == 1
    assert await order() == ["c", "a", "b"]
    await api.ann.post(f"/jobs/{c}/move", json={"before": b})
    assert await order() == ["a", "c", "b"]
    await api.root.post(f"/jobs/{a}/move", json={"to": "last"})
    assert await order() == ["c", "b", "a"]
    assert (await place(api, other))["position"] == 2
    assert (
        error_of(await api.bob.post(f"/jobs/{a}/move", json={"to": "first"}), 404)["code"] == "job_not_found"
    )
    assert error_of(await api.ann.post(f"/jobs/{a}/move", json={"before": other}), 422)["param"] == "before"
    for body in ({}, {"to": "first", "before": b}, {"to": "up"}, {"before": "x"}, {"place": 1}, []):
        error_of(await api.ann.post(f"/jobs/{a}/move", json=body), 422)
    api.finish(a)
    error_of(await api.ann.post(f"/jobs/{a}/move", json={"to": "first"}), 409)


async def test_every_refusal_names_quota_use_and_limit(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    use_settings(api, monkeypatch, max_queued_jobs=1, max_gpu_hours=1.5)
    job_id = await api.create()
    refused = error_of(await api.ann.post("/jobs", json=SPEC), 429)
    assert (refused["code"], refused["param"]) == ("quota_exceeded", "quotas.queued_jobs")
    assert "1 of 1" in refused["message"]
    run(api, job_id, ago=1)
    with api.database.write() as session:
        owners.lock_row(session, "ann").month_gpu_seconds = 7200
    refused = error_of(await api.ann.post("/jobs", json=SPEC), 429)
    assert refused["param"] == "quotas.gpu_hours"
    assert "of 1.5" in refused["message"]
    assert (await api.bob.post("/jobs", json=SPEC)).status_code == 201


async def test_storage_is_a_quota_for_uploads_and_jobs(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    row = GOOD_ROW % 1
    use_settings(api, monkeypatch, max_stored_bytes=2 * len(row))
    upload = {"file": ("rows.jsonl", row)}
    assert (await api.ann.post("/datasets", files=upload)).status_code == 201
    refused = error_of(await api.ann.post("/datasets", files={"file": ("rows.jsonl", row * 2)}), 429)
    assert refused["param"] == "quotas.stored_bytes"
    assert f"{len(row)} of {2 * len(row)}, and this takes {2 * len(row)} more" in refused["message"]
    stored = [path for path in api.context.settings.root.glob("artifacts/datasets/*/*") if path.is_file()]
    assert len(stored) == 1
    assert (await api.ann.post("/datasets", files=upload)).status_code == 201
    assert error_of(await api.ann.post("/jobs", json=SPEC), 429)["param"] == "quotas.stored_bytes"
    first = (await api.ann.get("/datasets")).json()["data"][0]["id"]
    await api.ann.delete(f"/datasets/{first}")
    assert (await api.ann.post("/jobs", json=SPEC)).status_code == 201


async def test_pausing_is_no_way_around_the_quota(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    use_settings(api, monkeypatch, max_queued_jobs=1)
    paused = await api.create()
    await api.ann.post(f"/jobs/{paused}/pause")
    await api.create()
    assert error_of(await api.ann.post(f"/jobs/{paused}/resume"), 429)["param"] == "quotas.queued_jobs"
    assert (await api.ann.get(f"/jobs/{paused}")).json()["status"] == "paused"


async def test_a_job_that_a_quota_holds_back_says_so(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    use_settings(api, monkeypatch, max_running_jobs=2)
    made = [await api.create() for _ in range(3)]
    run(api, made[0])
    held = {"position": None, "of": 2, "expected_start": None, "held_by": "running_jobs"}
    assert (await place(api, made[1]))["position"] == 1
    assert await place(api, made[2]) == held


async def test_the_system_shows_the_callers_quotas(api: Api) -> None:
    job_id = await api.create()
    await api.create()
    run(api, job_id, ago=3600)
    seen = (await api.ann.get("/system")).json()
    quotas = seen["quotas"]
    assert quotas["queued_jobs"] == {"used": 1, "limit": api.context.settings.max_queued_jobs}
    assert quotas["running_jobs"] == {"used": 1, "limit": None}
    assert 0 < quotas["gpu_hours"]["used"] <= 1.01
    assert quotas["stored_bytes"] == {"used": 0, "limit": None}
    assert seen["gpu_seconds_lately"] == pytest.approx(3550, abs=60)
    assert (await api.bob.get("/system")).json()["gpu_seconds_lately"] == 0


async def test_a_key_for_high_priority(api: Api) -> None:
    with api.database.write() as session:
        key = keys.create_key(session, "ann", admin=False, high=True)
    refused = error_of(await api.ann.post("/jobs", json=SPEC | {"priority": "high"}), 422)
    assert refused["code"] == "priority_not_allowed"
    headers = {"Authorization": f"Bearer {key}"}
    made = await api.ann.post("/jobs", json=SPEC | {"priority": "high"}, headers=headers)
    assert made.status_code == 201
