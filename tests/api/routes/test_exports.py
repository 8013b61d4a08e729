"""Asking for another file of a job that has succeeded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.clock import utcnow
from shared.events import Checkpoint
from shared.lifecycle import ExportStatus, JobStatus
from shared.repository import exports, files, logs
from shared.settings import Settings
from tests.api.conftest import Api, error_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def job_id(api: Api, tmp_path: Path) -> str:
    """A job that has succeeded with its adapter and the checkpoints of steps 500 and 1000."""
    made = await api.create()
    api.publish(made, "adapter.tar", b"weights", tmp_path)
    with api.database.write() as session:
        for step in (500, 1000):
            logs.put_checkpoint(session, made, Checkpoint(step, tmp_path, 1, {}), [500, 1000])
    api.finish(made)
    return made


async def ask(api: Api, job_id: str, fmt: str = "gguf:q8_0", checkpoint: int | None = None) -> Any:
    return await api.ann.post(f"/jobs/{job_id}/exports", json={"format": fmt, "checkpoint": checkpoint})


async def test_an_export_is_queued_and_shown_and_the_job_stays_succeeded(api: Api, job_id: str) -> None:
    answer = await ask(api, job_id, checkpoint=500)
    assert answer.status_code == 201
    task = answer.json()
    assert task["id"].startswith("export-")
    assert {k: task[k] for k in ("format", "checkpoint", "status", "artifact", "failure")} == {
        "format": "gguf:q8_0", "checkpoint": 500, "status": "queued", "artifact": None, "failure": None,
    }  # fmt: skip
    job = (await api.ann.get(f"/jobs/{job_id}")).json()
    assert (job["status"], job["exports"]) == ("succeeded", [task])
    assert (await api.ann.get(f"/jobs/{job_id}/exports")).json()["data"] == [task]
    log = (await api.ann.get(f"/jobs/{job_id}/logs")).json()["data"]
    assert "gguf:q8_0 of step 500" in log[-1]["message"]
    assert (await api.ann.get("/jobs")).json()["data"][0]["exports"] == [task]


async def test_the_same_export_under_way_is_the_same_task(api: Api, job_id: str) -> None:
    first, again = await ask(api, job_id), await ask(api, job_id)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = await ask(api, job_id, checkpoint=500)
    assert other.status_code == 201
    assert other.json()["id"] != first.json()["id"]


async def test_a_file_that_is_there_is_answered_with(api: Api, job_id: str) -> None:
    answer = await ask(api, job_id, "adapter")
    assert answer.status_code == 200
    assert answer.json()["status"] == "succeeded"
    assert answer.json()["artifact"]["name"] == "adapter.tar"
    assert (await ask(api, job_id, "adapter")).json() == answer.json()


async def test_an_adapter_that_was_kept_unasked_appears_when_asked_for(api: Api, job_id: str) -> None:
    with api.database.write() as session:
        row = files.find_artifact(session, job_id, "adapter.tar")
        assert row is not None
        row.listed = False
    assert (await api.ann.get(f"/jobs/{job_id}/artifacts")).json()["data"] == []
    assert (await api.ann.get(f"/jobs/{job_id}")).json()["artifacts"] == []
    assert (await api.ann.get(f"/jobs/{job_id}/artifacts/adapter.tar")).status_code == 404
    assert (await ask(api, job_id, "adapter")).json()["artifact"]["bytes"] == len(b"weights")
    assert (await api.ann.get(f"/jobs/{job_id}/artifacts/adapter.tar")).content == b"weights"


async def test_a_failed_export_can_be_asked_for_again(api: Api, job_id: str) -> None:
    first = (await ask(api, job_id)).json()["id"]
    with api.database.write() as session:
        task = exports.claim_export(session, "box", "token", utcnow(), lambda _: True)
        assert task is not None
        exports.lose(session, task, "It died.", 1)
    shown = (await api.ann.get(f"/jobs/{job_id}")).json()
    assert (shown["status"], shown["failure"]) == ("succeeded", None)
    assert shown["exports"][0]["status"] == "failed"
    assert shown["exports"][0]["failure"]["code"] == "worker_lost"
    again = await ask(api, job_id)
    assert again.status_code == 201
    assert again.json()["id"] != first


async def test_what_can_not_be_exported_is_refused(api: Api, job_id: str) -> None:
    queued = await api.create()
    assert error_of(await ask(api, queued), 409)["code"] == "job_not_succeeded"
    error = error_of(await ask(api, job_id, checkpoint=7), 422)
    assert (error["code"], error["param"]) == ("checkpoint_not_found", "checkpoint")
    assert "500, 1000" in error["message"]
    for body, param in (
        ({"format": "gguf:q2_k"}, "format"),
        ({}, "format"),
        ({"format": "adapter", "checkpoint": "500"}, "checkpoint"),
        ({"format": "adapter", "checkpoint": 0}, "checkpoint"),
        ({"format": "adapter", "path": "/etc"}, "path"),
    ):
        assert error_of(await api.ann.post(f"/jobs/{job_id}/exports", json=body), 422)["param"] == param
    assert (await api.bob.post(f"/jobs/{job_id}/exports", json={"format": "adapter"})).status_code == 404
    assert (await api.bob.get(f"/jobs/{job_id}/exports")).status_code == 404
    bare = await api.create()
    api.finish(bare)
    assert error_of(await ask(api, bare), 409)["code"] == "adapter_not_kept"
    failed = await api.create()
    api.finish(failed, JobStatus.FAILED)
    assert (await ask(api, failed)).status_code == 409


async def test_queued_exports_have_a_limit(
    api: Api, job_id: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(api.context, settings=settings.model_copy(update={"max_queued_jobs": 1}))
    monkeypatch.setattr(api.app.state, "context", one)
    assert (await ask(api, job_id)).status_code == 201
    assert (await ask(api, job_id, checkpoint=500)).status_code == 429


async def test_cancel_ends_exports_alone(api: Api, job_id: str) -> None:
    assert (await api.ann.post(f"/jobs/{job_id}/cancel")).status_code == 409
    await ask(api, job_id)
    answer = await api.ann.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert [t["status"] for t in answer.json()["exports"]] == [ExportStatus.CANCELLED]
    assert (await api.ann.post(f"/jobs/{job_id}/cancel")).status_code == 409


async def test_deleting_the_job_deletes_its_exports(api: Api, job_id: str) -> None:
    await ask(api, job_id)
    assert (await api.ann.delete(f"/jobs/{job_id}")).status_code == 204
    with api.database.read() as session:
        assert exports.exports_of(session, [job_id])[job_id] == []
        assert not exports.any_under_way(session)
