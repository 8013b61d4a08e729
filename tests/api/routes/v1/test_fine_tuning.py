"""Jobs and models under `/v1`: what the official client can't be made to send, or to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.repository import logs
from tests.api.conftest import GOOD_ROW, SPEC, Api, error_of

pytestmark = pytest.mark.anyio

MODEL = SPEC["model"]
JOBS = "/v1/fine_tuning/jobs"


async def body(api: Api, **fields: Any) -> dict[str, Any]:
    data = {"purpose": "fine-tune"}
    sent = await api.ann.post("/v1/files", data=data, files={"file": ("r.jsonl", GOOD_ROW % 1)})
    return {"model": MODEL, "training_file": sent.json()["id"], **fields}


async def test_an_idempotency_key_makes_one_job(api: Api) -> None:
    wanted, headers = await body(api), {"Idempotency-Key": "once"}
    first, again = [await api.ann.post(JOBS, json=wanted, headers=headers) for _ in range(2)]
    assert first.json()["id"] == again.json()["id"]
    other = await api.ann.post(JOBS, json=wanted | {"suffix": "x"}, headers=headers)
    assert error_of(other, 409)["code"] == "idempotency_conflict"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"{JOBS}/nonsense", 404, "job_not_found"),
        (f"{JOBS}?limit=0", 400, "out_of_range"),
        (f"{JOBS}?colour=red", 400, "unknown_parameter"),
        (f"{JOBS}?after=ftjob-{'0' * 24}", 400, "invalid_value"),
        ("/v1/files/nonsense", 404, "file_not_found"),
        ("/v1/models/gpt-4o", 404, "model_not_found"),
        ("/v1/models/local%2Fnone", 404, "model_not_found"),
        (f"/v1/models/ft:{MODEL}:ann::{'0' * 24}", 404, "model_not_found"),
        ("/v1/models/..%2F..%2Fetc%2Fpasswd", 404, "model_not_found"),
        ("/v1/nonsense", 404, "unknown_route"),
    ],
)
async def test_errors_have_openais_statuses(api: Api, path: str, status: int, code: str) -> None:
    answer = await api.ann.get(path)
    assert error_of(answer, status)["code"] == code
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]


async def test_a_body_that_is_no_json_or_too_large(api: Api) -> None:
    error_of(await api.ann.post(JOBS, content=b"{"), 400)
    answer = await api.ann.post(JOBS, content=b" " * (api.context.settings.max_body_bytes + 1))
    error_of(answer, 413)
    assert answer.headers["x-should-retry"] == "false"
    error_of(await api.ann.post("/v1/uploads", content=b"{"), 400)
    error_of(await api.nobody.get(JOBS), 401)


@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/webhook_endpoints"])
async def test_json_needs_no_header_and_other_headers_are_told(api: Api, path: str) -> None:
    # What `curl -d` sends by itself; a body that is read lacks its fields.
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        refusal = error_of(await api.ann.post(path, content=b"{}", headers=headers), 400)
        assert refusal["code"] == "missing_field"
    answer = await api.ann.post(path, content=b"{}", headers={"content-type": "text/plain; charset=utf-8"})
    refusal = error_of(answer, 400)
    assert (refusal["code"], refusal["param"]) == ("unsupported_content_type", None)
    assert "text/plain" in refusal["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("HEAD", "/v1/models"), ("OPTIONS", "/v1/files"), ("PUT", JOBS), ("PATCH", "/v1/files/x")],
)
async def test_a_method_that_is_not_there_is_refused_in_openais_shape(
    api: Api, method: str, path: str
) -> None:
    answer = await api.ann.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["x-should-retry"] == "false"
    assert "GET" in answer.headers["allow"]
    if method != "HEAD":
        assert error_of(answer, 405)["code"] == "method_not_allowed"


async def test_events_page_backwards_and_measures_have_openais_names(api: Api) -> None:
    job_id = (await api.ann.post(JOBS, json=await body(api))).json()["id"]
    api.append(job_id, *"abc")
    url = f"{JOBS}/{job_id}/events"
    page = (await api.ann.get(url, params={"limit": 2})).json()
    assert [event["message"] for event in page["data"]] == ["c", "b"]
    assert page["has_more"]
    page = (await api.ann.get(url, params={"limit": 2, "after": page["last_id"]})).json()
    assert [event["message"] for event in page["data"]] == ["a", "Accepted. Waiting for a worker."]
    assert not page["has_more"]
    for wrong in ("ftevent-x", f"ftevent-{'0' * 24}-1"):
        assert error_of(await api.ann.get(url, params={"after": wrong}), 400)["param"] == "after"


async def test_trained_tokens_are_those_of_the_last_step(api: Api) -> None:
    job_id = (await api.ann.post(JOBS, json=await body(api))).json()["id"]
    with api.database.write() as session:
        rows = [{"step": step, "loss": 1.0, "tokens": 100 * step} for step in (1, 2, 3)]
        logs.put_metrics(session, job_id, rows)
    assert (await api.ann.get(f"{JOBS}/{job_id}")).json()["trained_tokens"] is None
    api.finish(job_id)
    assert (await api.ann.get(f"{JOBS}/{job_id}")).json()["trained_tokens"] == 300


async def test_a_model_is_there_as_long_as_its_files(api: Api, tmp_path: Path) -> None:
    job_id = (await api.ann.post(JOBS, json=await body(api, suffix="a b"))).json()["id"]
    name = f"ft:{MODEL}:ann:a-b:{job_id.removeprefix('ftjob-')}"
    error_of(await api.ann.get(f"/v1/models/{name}"), 404)
    api.publish(job_id, "adapter.tar", b"weights", tmp_path)
    error_of(await api.ann.get(f"/v1/models/{name}"), 404)
    api.finish(job_id)
    assert (await api.ann.get(f"/v1/models/{name}")).json()["owned_by"] == "ann"
    assert (await api.root.get(f"/v1/models/{name}")).status_code == 200
    # The whole name must be right, not only the id in it.
    error_of(await api.ann.get(f"/v1/models/{name.replace('a-b', 'c')}"), 404)
    error_of(await api.ann.get(f"/v1/models/{name}:ckpt-step-1"), 404)
    assert (await api.ann.delete(f"/v1/models/{name}")).json()["deleted"]
    error_of(await api.ann.get(f"/v1/models/{name}"), 404)
    assert (await api.ann.get(f"/jobs/{job_id}/artifacts")).json()["data"] == []


async def test_a_model_of_the_hub_may_be_asked_for(api: Api) -> None:
    assert (await api.ann.get("/v1/models/some%2Fmodel")).json()["id"] == "some/model"


async def test_an_integration_comes_back_as_it_was_asked_for(api: Api) -> None:
    whole = {"project": "tides", "name": "run 1", "entity": "team", "tags": ["a", "b"]}
    asked = [{"type": "wandb", "wandb": whole}]
    made = await api.ann.post(JOBS, json=await body(api, integrations=asked))
    job = (await api.ann.get(f"{JOBS}/{made.json()['id']}")).json()
    assert made.json()["integrations"] == job["integrations"] == asked
    spec = (await api.ann.get(f"/jobs/{job['id']}")).json()["spec"]
    assert (spec["report_to"], spec["wandb"]) == (["wandb"], whole)
    # What a job says on the native face is seen here, too.
    native = await api.create(name="high water", report_to=["wandb"])
    job = (await api.ann.get(f"{JOBS}/{native}")).json()
    shown = {"project": "(the worker's)", "name": "high water", "entity": None, "tags": []}
    assert job["integrations"] == [{"type": "wandb", "wandb": shown}]
    assert (await api.ann.get(f"{JOBS}/{await api.create()}")).json()["integrations"] == []
