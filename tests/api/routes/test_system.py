"""System, models, metrics, health."""

from __future__ import annotations

from datetime import timedelta

import httpx
import pytest

from shared.clock import utcnow
from shared.lifecycle import JobStatus
from shared.repository import jobs, keys
from shared.spec import BUNDLED_MODEL
from shared.tables import WorkerRow
from tests.api.conftest import SPEC, Api, error_of

pytestmark = pytest.mark.anyio

GPU = {"kind": "cuda", "index": 0, "name": "NVIDIA L4", "memory_bytes": 24 << 30, "engines": ["reference"]}


def put_worker(api: Api, worker_id: str, **changes: object) -> None:
    with api.database.write() as session:
        keys.put_worker(session, WorkerRow(id=worker_id, hostname="box", slots=[GPU], **changes))


async def run(api: Api, client: httpx.AsyncClient, worker: str) -> str:
    job_id: str = (await client.post("/jobs", json=SPEC)).json()["id"]
    with api.database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        jobs.set_status(job, JobStatus.RUNNING, worker=worker, lease_token="t")
    return job_id


async def test_an_owner_sees_only_its_own_jobs(api: Api) -> None:
    put_worker(api, "box-1")
    put_worker(api, "gone", seen_at=utcnow() - timedelta(hours=1))
    own, others = await run(api, api.ann, "box-1"), await run(api, api.bob, "box-1")
    await api.bob.post("/jobs", json=SPEC)
    seen = (await api.ann.get("/system")).json()
    assert seen["gpus"] == [GPU | {"worker": "box-1"}]
    assert [worker["id"] for worker in seen["workers"]] == ["box-1"]
    assert seen["workers"][0]["jobs"] == [own]
    assert (seen["queue"]["running"], seen["queue"]["queued"]) == (1, 0)
    assert seen["queue"]["oldest_queued_at"] is None
    assert seen["redis"] is True
    assert others not in (await api.ann.get("/system")).text
    everything = (await api.root.get("/system")).json()
    assert sorted(everything["workers"][0]["jobs"]) == sorted([own, others])
    assert (everything["queue"]["running"], everything["queue"]["queued"]) == (2, 1)


async def test_metrics_are_an_owners_own(api: Api) -> None:
    await api.create()
    await api.bob.post("/jobs", json=SPEC)
    own = await api.ann.get("/metrics")
    assert own.headers["content-type"].startswith("text/plain")
    assert 'tuneyard_jobs{status="queued"} 1.0' in own.text
    assert "http_request" not in own.text
    assert "queue_messages" not in own.text
    everything = (await api.root.get("/metrics")).text
    assert 'tuneyard_jobs{status="queued"} 2.0' in everything
    assert "tuneyard_queue_messages" in everything
    assert 'route="/jobs",status="201"' in everything


async def test_latencies_are_counted_by_template(api: Api) -> None:
    job_id = await api.create()
    for path in (f"/jobs/{job_id}", "/nothing/here", "/jobs/x"):
        await api.ann.get(path)
    await api.ann.request("BREW", "/jobs")
    text = (await api.root.get("/metrics")).text
    assert 'method="GET",route="/jobs/{job_id}",status="200"' in text
    assert 'route="unmatched",status="404"' in text
    assert job_id not in text
    assert "nothing" not in text
    assert "BREW" not in text


async def test_models(api: Api) -> None:
    models = (await api.ann.get("/models")).json()["data"]
    assert all(set(m) == {"id", "source", "context_length", "parameters", "modules"} for m in models)
    assert [m["id"] for m in models if m["source"] == "bundled"] in ([], [BUNDLED_MODEL])


async def test_readiness(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = await api.nobody.get("/readyz")
    assert ready.json() == {"status": "ready", "database": True, "store": True, "redis": True}
    monkeypatch.setattr(api.context.store, "is_writable", lambda: False)
    error = error_of(await api.nobody.get("/readyz"), 503)
    assert error["code"] == "not_ready"
    assert "store" in error["message"]
    # Alive all the same.
    assert (await api.nobody.get("/healthz")).status_code == 200
