"""Jobs over HTTP."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from api.services.jobs import digest_of
from shared.lifecycle import JobStatus
from shared.repository import jobs
from shared.settings import Settings
from shared.spec import JobSpec
from shared.tables import IdempotencyKey
from tests.api.conftest import GOOD_ROW, SPEC, Api, error_of

pytestmark = pytest.mark.anyio

JOB_FIELDS = {
    "id", "status", "phase", "owner", "spec", "plan", "plan_history", "data_report", "progress", "attempt",
    "failure", "created_at", "started_at", "finished_at", "artifacts", "exports",
}  # fmt: skip


async def test_an_empty_spec_is_the_default_job(api: Api) -> None:
    answer = await api.ann.post("/jobs", json={})
    assert answer.status_code == 201
    job = answer.json()
    assert set(job) == JOB_FIELDS
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["owner"], job["plan"], job["attempt"]) == ("queued", "ann", None, 0)
    assert job["created_at"].endswith("Z")
    assert job["spec"] == JobSpec().to_json()
    alone = (await api.ann.get(answer.headers["location"])).json()
    assert alone.pop("queue")["position"] == 1
    assert alone == job


async def test_a_new_job_rings_the_doorbell_and_begins_its_log(api: Api) -> None:
    before = api.context.doorbell.depth() or 0
    job_id = await api.create()
    assert api.context.doorbell.depth() == before + 1
    page = (await api.ann.get(f"/jobs/{job_id}/logs")).json()
    assert [entry["seq"] for entry in page["data"]] == [1]
    assert "Accepted" in page["data"][0]["message"]


async def test_a_key_gives_the_same_job_again(api: Api) -> None:
    headers = {"Idempotency-Key": "retry-1"}
    first = await api.ann.post("/jobs", json=SPEC, headers=headers)
    # The same said in another order and with other white space.
    text = '{ "max_seq_length" : 512, "model":"bundled/smollm2-135m-instruct" }'
    second = await api.ann.post("/jobs", content=text, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["location"] == first.headers["location"]
    error = error_of(await api.ann.post("/jobs", json={}, headers=headers), 409)
    assert error["code"] == "idempotency_conflict"
    # Another owner's key is another key.
    other = await api.bob.post("/jobs", json={}, headers=headers)
    assert other.status_code == 201
    assert other.json()["id"] != first.json()["id"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"nmae": 1}', b'{"lora": {"r": 0}}', b'{"model": "a","model": "b"}', b"\xff"]
)
async def test_a_key_with_another_body_is_a_conflict_however_wrong_that_is(api: Api, body: bytes) -> None:
    headers = {"Idempotency-Key": "once"}
    assert (await api.ann.post("/jobs", json=SPEC, headers=headers)).status_code == 201
    error = error_of(await api.ann.post("/jobs", content=body, headers=headers), 409)
    assert error["code"] == "idempotency_conflict"
    # A body that made nothing takes no key.
    assert (await api.ann.post("/jobs", content=body, headers={"Idempotency-Key": "two"})).status_code >= 400
    again = await api.ann.post("/jobs", json=SPEC, headers={"Idempotency-Key": "two"})
    assert again.status_code == 201


async def test_a_key_gives_the_same_job_though_it_would_be_refused_now(
    api: Api, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Idempotency-Key": "early"}
    first = await api.ann.post("/jobs", json=SPEC, headers=headers)
    strict = settings.model_copy(update={"model_allow": "owner/*", "max_queued_jobs": 1})
    monkeypatch.setattr(api.app.state, "context", _with_settings(api, strict))
    error_of(await api.ann.post("/jobs", json=SPEC), 422)
    again = await api.ann.post("/jobs", json=SPEC, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())


async def test_a_key_is_forgotten_after_a_day(api: Api) -> None:
    headers = {"Idempotency-Key": "daily"}
    first = (await api.ann.post("/jobs", json=SPEC, headers=headers)).json()["id"]
    with api.database.write() as session:
        made = session.get(IdempotencyKey, ("ann", "daily"))
        assert made is not None
        made.created_at -= timedelta(hours=25)
    second = (await api.ann.post("/jobs", json={}, headers=headers)).json()["id"]
    assert second != first
    assert (await api.ann.post("/jobs", json={}, headers=headers)).json()["id"] == second


async def test_a_doubled_request_makes_one_job(api: Api) -> None:
    headers = {"Idempotency-Key": "double"}
    answers = await asyncio.gather(*[api.ann.post("/jobs", json=SPEC, headers=headers) for _ in range(12)])
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len((await api.ann.get("/jobs")).json()["data"]) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "with space"])
async def test_a_key_that_is_none_is_refused(api: Api, key: str) -> None:
    answer = await api.ann.post("/jobs", json=SPEC, headers={"Idempotency-Key": key})
    assert error_of(answer, 422)["param"] == "idempotency-key"


async def test_an_owner_has_a_quota_of_queued_jobs(
    api: Api, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"max_queued_jobs": 2})
    monkeypatch.setattr(api.app.state, "context", _with_settings(api, small))
    answers = await asyncio.gather(*[api.ann.post("/jobs", json=SPEC) for _ in range(5)])
    assert sorted(a.status_code for a in answers) == [201, 201, 429, 429, 429]
    refused = next(a for a in answers if a.status_code == 429)
    assert error_of(refused, 429)["code"] == "quota_exceeded"
    assert (await api.bob.post("/jobs", json=SPEC)).status_code == 201


def _with_settings(api: Api, settings: Settings) -> Any:
    context = api.context
    return type(context)(**{**context.__dict__, "settings": settings})


async def test_lists_are_paged_newest_first(api: Api) -> None:
    made = [await api.create() for _ in range(5)]
    await api.bob.post("/jobs", json=SPEC)
    seen: list[str] = []
    after = ""
    while True:
        page = (await api.ann.get(f"/jobs?limit=2{after}")).json()
        seen += [job["id"] for job in page["data"]]
        assert page["has_more"] == (page["next"] is not None)
        if not page["has_more"]:
            break
        after = f"&after={page['next']}"
    assert seen == made[::-1]
    assert len((await api.root.get("/jobs")).json()["data"]) == 6


async def test_lists_are_filtered(api: Api) -> None:
    search = await api.create(metadata={"team": "search", "odd.key (1)": "1"})
    other = await api.create(model="owner/other", metadata={"team": "ads"})
    await api.ann.post(f"/jobs/{other}/cancel")

    async def found(query: str) -> list[str]:
        answer = await api.ann.get(f"/jobs?{query}")
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    assert await found("status=queued") == [search]
    assert await found("status=cancelled") == [other]
    assert await found("model=owner/other") == [other]
    assert await found("metadata[team]=search") == [search]
    assert await found("metadata%5Bteam%5D=search&status=queued") == [search]
    assert await found("metadata[team]=search&metadata[absent]=1") == []
    assert await found("metadata[odd.key (1)]=1") == [search]
    plain = await api.create()
    assert await found("metadata=null") == [plain]
    answer = await api.ann.get("/jobs?metadata=null&metadata[team]=search")
    assert error_of(answer, 422)["param"] == "metadata"


async def test_a_job_is_cancelled_once_and_told_so_again(api: Api) -> None:
    job_id = await api.create()
    first = await api.ann.post(f"/jobs/{job_id}/cancel")
    second = await api.ann.post(f"/jobs/{job_id}/cancel")
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["status"] == second.json()["status"] == "cancelled"
    assert first.json()["finished_at"] is not None
    page = (await api.ann.get(f"/jobs/{job_id}/logs")).json()
    assert page["status"] == "cancelled"
    assert len(page["data"]) == 2


async def test_a_running_job_is_asked_to_stop(api: Api) -> None:
    job_id = await api.create()
    with api.database.write() as session:
        jobs.set_status(jobs.lock_job(session, job_id, None), JobStatus.RUNNING, lease_token="t")
    for _ in range(2):
        answer = await api.ann.post(f"/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelling")


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED])
async def test_a_job_that_ended_is_not_cancelled(api: Api, status: JobStatus) -> None:
    job_id = await api.create()
    api.finish(job_id, status)
    assert status in error_of(await api.ann.post(f"/jobs/{job_id}/cancel"), 409)["message"]


async def test_a_waiting_job_is_paused_and_resumed_once_each(api: Api) -> None:
    job_id = await api.create()
    for action, status in (("pause", "paused"), ("resume", "queued")):
        for _ in range(2):
            answer = await api.ann.post(f"/jobs/{job_id}/{action}")
            assert (answer.status_code, answer.json()["status"]) == (200, status)
    assert len((await api.ann.get(f"/jobs/{job_id}/logs")).json()["data"]) == 3
    error_of(await api.bob.post(f"/jobs/{job_id}/pause"), 404)
    error_of(await api.bob.post(f"/jobs/{job_id}/resume"), 404)


async def test_a_running_job_is_asked_to_pause(api: Api) -> None:
    job_id = await api.create()
    with api.database.write() as session:
        jobs.set_status(jobs.lock_job(session, job_id, None), JobStatus.RUNNING, lease_token="t")
    assert (await api.ann.post(f"/jobs/{job_id}/resume")).json()["status"] == "running"
    for _ in range(2):
        answer = await api.ann.post(f"/jobs/{job_id}/pause")
        assert (answer.status_code, answer.json()["status"]) == (200, "pausing")
    assert "still pausing" in error_of(await api.ann.post(f"/jobs/{job_id}/resume"), 409)["message"]
    assert (await api.ann.post(f"/jobs/{job_id}/cancel")).json()["status"] == "cancelling"
    for action in ("pause", "resume"):
        assert "is cancelling" in error_of(await api.ann.post(f"/jobs/{job_id}/{action}"), 409)["message"]


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED])
async def test_a_job_that_ended_is_neither_paused_nor_resumed(api: Api, status: JobStatus) -> None:
    job_id = await api.create()
    api.finish(job_id, status)
    for action in ("pause", "resume"):
        assert status in error_of(await api.ann.post(f"/jobs/{job_id}/{action}"), 409)["message"]


async def test_only_finished_jobs_are_deleted(api: Api, tmp_path: Any) -> None:
    job_id = await api.create()
    error_of(await api.ann.delete(f"/jobs/{job_id}"), 409)
    row = api.publish(job_id, "adapter.tar", b"weights", tmp_path)
    api.finish(job_id)
    answer = await api.ann.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    error_of(await api.ann.get(f"/jobs/{job_id}"), 404)
    with pytest.raises(FileNotFoundError):
        next(api.context.store.read(row.key, 0, 1))


async def test_others_things_are_absent(api: Api, tmp_path: Any) -> None:
    job_id = await api.create()
    api.publish(job_id, "adapter.tar", b"weights", tmp_path)
    absent = f"ftjob-{'0' * 24}"
    for path in (
        "",
        "/logs",
        "/logs?wait=1",
        "/metrics",
        "/checkpoints",
        "/artifacts",
        "/artifacts/adapter.tar",
    ):
        theirs = error_of(await api.bob.get(f"/jobs/{job_id}{path}"), 404)
        none = error_of(await api.bob.get(f"/jobs/{absent}{path}"), 404)
        assert theirs["message"].replace(job_id, absent) == none["message"]
        assert theirs["code"] == none["code"]
        assert (await api.root.get(f"/jobs/{job_id}{path.partition('?')[0]}")).status_code == 200
    stream = await api.bob.get(f"/jobs/{job_id}/logs", headers={"accept": "text/event-stream"})
    error_of(stream, 404)
    error_of(await api.bob.post(f"/jobs/{job_id}/cancel"), 404)
    error_of(await api.bob.delete(f"/jobs/{job_id}"), 404)
    assert (await api.bob.get("/jobs")).json()["data"] == []
    error_of(await api.bob.get(f"/jobs?after={job_id}"), 422)


async def test_a_job_on_an_uploaded_file(api: Api) -> None:
    rows = b"".join(GOOD_ROW % n for n in range(3))
    file_id = (await api.ann.post("/datasets", files={"file": ("a.jsonl", rows)})).json()["id"]
    spec = SPEC | {"dataset": {"source": "file", "file_id": file_id}}
    assert (await api.ann.post("/jobs", json=spec)).status_code == 201
    error = error_of(await api.bob.post("/jobs", json=spec), 422)
    assert (error["code"], error["param"]) == ("dataset_not_found", "dataset.file_id")
    error = error_of(await api.ann.delete(f"/datasets/{file_id}"), 409)
    estimate = await api.ann.post("/jobs/estimate", json=spec)
    assert estimate.status_code == 200
    assert estimate.json()["tokens"] > 0


async def test_a_job_on_a_file_that_can_not_be_used_is_refused(api: Api) -> None:
    uploaded = (await api.ann.post("/datasets", files={"file": ("a.bin", b"\x00\x01\x02" * 50)})).json()
    assert uploaded["status"] == "error"
    spec = SPEC | {"dataset": {"source": "file", "file_id": uploaded["id"]}}
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, json=spec), 422)
        assert (error["code"], error["param"]) == ("dataset_unusable", "dataset.file_id")
        assert uploaded["error"] in error["message"]
        spec_of_both = SPEC | {"validation_dataset": spec["dataset"]}
        error = error_of(await api.ann.post(path, json=spec_of_both), 422)
        assert (error["code"], error["param"]) == ("dataset_unusable", "validation_dataset.file_id")


async def test_validation_data_is_looked_for_and_limited_as_training_data_is(api: Api) -> None:
    rows = b"".join(GOOD_ROW % n for n in range(3))
    file_id = (await api.ann.post("/datasets", files={"file": ("a.jsonl", rows)})).json()["id"]
    spec = SPEC | {"validation_dataset": {"source": "file", "file_id": file_id}}
    answer = await api.ann.post("/jobs", json=spec)
    assert answer.status_code == 201
    assert answer.json()["spec"]["validation_dataset"]["file_id"] == file_id
    error = error_of(await api.bob.post("/jobs", json=spec), 422)
    assert (error["code"], error["param"]) == ("dataset_not_found", "validation_dataset.file_id")
    malformed = SPEC | {"validation_dataset": {"source": "file", "file_id": "x"}}
    assert error_of(await api.ann.post("/jobs", json=malformed), 422)["param"] == "validation_dataset.file_id"
    alone = SPEC | {"training": {"eval_steps": 5}}
    error = error_of(await api.ann.post("/jobs", json=alone), 422)
    assert error["param"] == "training.eval_steps"
    assert error["message"].startswith("training.eval_steps needs rows to evaluate")


async def test_an_estimate_queues_nothing(api: Api) -> None:
    answer = await api.ann.post("/jobs/estimate", json=SPEC | {"training": {"max_steps": 7}})
    assert answer.status_code == 200
    assert set(answer.json()) == {
        "plan", "alternatives", "tokens", "steps", "seconds", "peak_memory_bytes", "disk_bytes",
    }  # fmt: skip
    assert answer.json()["steps"] == 7
    assert (await api.ann.get("/jobs")).json()["data"] == []


def test_two_bodies_that_say_the_same_have_one_digest() -> None:
    first = digest_of(b'{"name":"a","lora":{"r":8,"alpha":16}}')
    assert first == digest_of(b' {"lora": {"alpha": 16, "r": 8}, "name": "\\u0061"} ')
    bodies = [
        b'{"name":"b"}', b'{"name":"b","name":"b"}', b'{"name":"\\ud800"}', b'{"name":NaN}', b"", b"{", b"{ ",
        b"\xff", b"[" * 10_000, b"9" * 5000,
    ]  # fmt: skip
    assert len({first, *map(digest_of, bodies)}) == 1 + len(bodies)
