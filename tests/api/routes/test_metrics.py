"""What Prometheus is told, and whom it is told."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.routes import system as routes
from shared.clock import utcnow
from shared.ids import new_token
from shared.lifecycle import FailureCode, JobStatus
from shared.repository import jobs, keys, leases
from shared.tables import WorkerRow
from tests.api.conftest import SPEC, Api

pytestmark = pytest.mark.anyio

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
GPU = {"index": 1, "name": "NVIDIA L4", "memory_bytes": 24 << 30, "used_bytes": 6 << 30, "utilization": 0.75}


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    """Every sample by its name and labels, as Prometheus' own parser reads them."""
    answer = await client.get("/metrics")
    return {
        name + "".join(f"[{value}]" for value in labels.values()): value
        for family in text_string_to_metric_families(answer.text)
        for name, labels, value, *_ in family.samples
    }


def claim(api: Api, job_id: str, waited: float) -> None:
    with api.database.write() as session:
        jobs.get_job(session, job_id, None).created_at = utcnow() - timedelta(seconds=waited)
        claimed = leases.claim(session, job_id, "box-1", new_token(), utcnow() + timedelta(minutes=1))
        assert claimed is not None
        claimed.attempt_started_at = utcnow() - timedelta(seconds=90)
        claimed.progress = {"step": 3, "total_steps": 9, "epoch": 0.1, "tokens_per_second": 1000.0}


def end(api: Api, job_id: str, status: JobStatus, code: FailureCode | None = None) -> None:
    with api.database.write() as session:
        failure = {"code": code, "message": "m", "advice": "a"} if code else None
        jobs.set_status(jobs.lock_job(session, job_id, None), status, failure=failure)


async def test_a_jobs_way_is_counted(api: Api) -> None:
    first, second, third = [await api.create() for _ in range(3)]
    for job_id, waited in ((first, 30), (second, 400)):
        claim(api, job_id, waited)
    seen = await samples(api.ann)
    assert (seen["tuneyard_jobs[queued]"], seen["tuneyard_jobs[running]"]) == (1, 2)
    assert seen["tuneyard_tokens_per_second"] == 2000
    assert 0 <= seen["tuneyard_queue_oldest_seconds"] < 60
    assert seen["tuneyard_job_waiting_seconds_bucket[10]"] == 0
    assert seen["tuneyard_job_waiting_seconds_bucket[60]"] == 1
    assert seen["tuneyard_job_waiting_seconds_bucket[900]"] == 2
    assert seen["tuneyard_job_waiting_seconds_bucket[+Inf]"] == 2
    assert seen["tuneyard_job_waiting_seconds_count"] == 2
    assert 430 <= seen["tuneyard_job_waiting_seconds_sum"] < 440
    end(api, first, JobStatus.SUCCEEDED)
    end(api, second, JobStatus.FAILED, FailureCode.OUT_OF_MEMORY)
    # One that never ran has no time of running.
    await api.ann.post(f"/jobs/{third}/cancel")
    seen = await samples(api.ann)
    ended = {status: seen[f"tuneyard_jobs[{status}]"] for status in ("succeeded", "failed", "cancelled")}
    assert ended == {"succeeded": 1, "failed": 1, "cancelled": 1}
    assert seen["tuneyard_job_failures_total[out_of_memory]"] == 1
    assert seen["tuneyard_job_running_seconds_bucket[300]"] == 2
    assert seen["tuneyard_job_running_seconds_count"] == 2
    assert (seen["tuneyard_tokens_per_second"], seen["tuneyard_queue_oldest_seconds"]) == (0, 0)


async def test_a_job_that_waits_again_is_counted_once(api: Api) -> None:
    job_id = await api.create()
    claim(api, job_id, 30)
    with api.database.write() as session:
        leases.give_back(session, jobs.lock_job(session, job_id, None), "The worker stops.")
    claim(api, job_id, 5000)
    assert (await samples(api.ann))["tuneyard_job_waiting_seconds_count"] == 1


async def test_a_deleted_job_is_there_no_longer_but_has_failed_all_the_same(api: Api) -> None:
    job_id = await api.create()
    claim(api, job_id, 1)
    end(api, job_id, JobStatus.FAILED, FailureCode.DIVERGED)
    await api.ann.delete(f"/jobs/{job_id}")
    seen = await samples(api.ann)
    assert seen["tuneyard_jobs[failed]"] == 0
    assert seen["tuneyard_job_failures_total[diverged]"] == 1


async def test_an_owner_is_told_of_nobody_else(api: Api) -> None:
    job_id = await api.create()
    claim(api, job_id, 30)
    end(api, job_id, JobStatus.FAILED, FailureCode.DIVERGED)
    with api.database.write() as session:
        keys.put_worker(session, WorkerRow(id="box-1", hostname="box", slots=[], gpus=[GPU]))
    seen = await samples(api.bob)
    assert not any(seen.values())
    assert not [name for name in seen if re.search("gpu|worker|http|follower|message", name)]
    assert (await samples(api.root))["tuneyard_job_failures_total[diverged]"] == 1


async def test_gpus_of_the_workers_on_line(api: Api) -> None:
    unknown = GPU | {"index": 0, "utilization": None}
    with api.database.write() as session:
        keys.put_worker(session, WorkerRow(id="box-1", hostname="box", slots=[], gpus=[unknown, GPU]))
        old = utcnow() - timedelta(hours=1)
        keys.put_worker(session, WorkerRow(id="gone", hostname="gone", slots=[], gpus=[GPU], seen_at=old))
    seen = await samples(api.root)
    assert seen["tuneyard_workers"] == 1
    assert seen["tuneyard_gpu_memory_bytes[1][box][NVIDIA L4]"] == 24 << 30
    assert seen["tuneyard_gpu_memory_used_bytes[1][box][NVIDIA L4]"] == 6 << 30
    assert seen["tuneyard_gpu_utilization_ratio[1][box][NVIDIA L4]"] == 0.75
    assert "tuneyard_gpu_utilization_ratio[0][box][NVIDIA L4]" not in seen
    assert not [name for name in seen if "gone" in name]


async def test_an_error_that_nobody_expected_is_counted(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(routes.system, "overview", fail)
    assert (await api.ann.get("/system")).status_code == 500
    assert (await samples(api.root))["tuneyard_http_request_seconds_count[GET][/system][500]"] == 1


async def test_every_metric_is_documented(api: Api) -> None:
    await api.ann.post("/jobs", json=SPEC)
    with api.database.write() as session:
        keys.put_worker(session, WorkerRow(id="box-1", hostname="box", slots=[], gpus=[GPU]))
    families = text_string_to_metric_families((await api.root.get("/metrics")).text)
    # Times of creation are the client library's addition.
    told = {family.name for family in families if not family.name.endswith("_created")}
    rows = re.findall(r"^\| `(tuneyard_\w+?)(?:_total)?` \|", OPERATIONS.read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(told)
