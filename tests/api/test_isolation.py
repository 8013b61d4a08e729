"""Owners from each other: every route of the schema, with the ids of somebody else's things."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.app import create_app
from shared.settings import Settings
from tests.api.conftest import GOOD_ROW, SPEC, Api, error_of

pytestmark = pytest.mark.anyio

OPERATIONS = [
    (method.upper(), path)
    for path, methods in create_app(Settings(data_dir=Path("nowhere"))).openapi()["paths"].items()
    for method in methods
]
# Names, not ids: everybody has one of one's own.
ONES_OWN = {("PUT", "/secrets/{secret}")}
WITH_IDS = [operation for operation in OPERATIONS if "{" in operation[1] and operation not in ONES_OWN]
# Bodies that are right, where `{}` is not.
BODIES: dict[str, dict[str, Any]] = {
    "/exports": {"format": "adapter"},
    "/complete": {"part_ids": ["part-x"]},
    "/move": {"to": "first"},
    "/test": {"event_type": "fine_tuning.job.succeeded"},
}
HOOK = {
    "name": "ann-secret",
    "url": "https://hooks.example.org/ann-secret",
    "event_types": ["fine_tuning.job.succeeded"],
}
OPEN = {("GET", "/healthz"), ("GET", "/readyz")}


@pytest.fixture(scope="module")
def api(shared_api: Api) -> Api:
    return shared_api


async def belongings(api: Api, folder: Path) -> dict[str, str]:
    """Ann's things, by the name of the path parameter that an id of them goes into.

    A new route with a parameter of another name is told here what of Ann's it would name.
    """
    await api.ann.put("/secrets/hub_token", json={"value": "ann-secret"})
    job_id = await api.create(name="ann-secret", metadata={"team": "ann-secret"})
    api.append(job_id, "ann-secret")
    api.publish(job_id, "adapter.tar", b"ann-secret", folder)
    api.finish(job_id)
    answer = await api.ann.post("/datasets", files={"file": ("ann-secret.jsonl", GOOD_ROW % 1)})
    file_id = answer.json()["id"]
    upload = {"filename": "ann-secret", "bytes": 1, "purpose": "fine-tune", "mime_type": "text/plain"}
    return {
        "job_id": job_id,
        "dataset_id": file_id,
        "file_id": file_id,
        "upload_id": (await api.ann.post("/v1/uploads", json=upload)).json()["id"],
        "webhook_id": (await api.ann.post("/v1/webhook_endpoints", json=HOOK)).json()["id"],
        "model": (await api.ann.get(f"/v1/fine_tuning/jobs/{job_id}")).json()["fine_tuned_model"],
        "name": "adapter.tar",
        "secret": "hub_token",
    }


@pytest.fixture
async def things(api: Api, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    made = await belongings(api, tmp_path)
    yield made
    # Of these an owner may have a few.
    await api.ann.delete(f"/v1/webhook_endpoints/{made['webhook_id']}")
    await api.ann.post(f"/v1/uploads/{made['upload_id']}/cancel")


def filled(path: str, things: dict[str, str]) -> str:
    for name in re.findall(r"\{(\w+)(?::path)?\}", path):
        assert name in things, f"{path}: what of Ann's has the parameter {name}? Tell belongings()."
    return re.sub(r"\{(\w+)(?::path)?\}", lambda found: things[found[1]], path)


async def ask(client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    body = next((body for end, body in BODIES.items() if path.endswith(end)), {})
    return await client.request(method, path, json=body if method in ("POST", "PUT", "PATCH") else None)


@pytest.mark.parametrize(("method", "path"), WITH_IDS)
async def test_somebody_elses_things_are_absent(
    api: Api, things: dict[str, str], method: str, path: str
) -> None:
    url = filled(path, things)
    error_of(await ask(api.nobody, method, url), 401)
    theirs = await ask(api.bob, method, url)
    told = error_of(theirs, 404)
    # The same words as for what never was, and nothing but the id that was asked for.
    never = {name: re.sub(r"[0-9a-z]{24}$", "0" * 24, thing) for name, thing in things.items()}
    words = json.dumps(told)
    for name, thing in things.items():
        words = words.replace(thing, never[name])
    assert json.loads(words) == error_of(await ask(api.bob, method, filled(path, never)), 404)
    # And it is the owner that makes the difference.
    assert (await ask(api.ann, method, url)).status_code != 404


async def test_what_lists_things_lists_ones_own(api: Api, things: dict[str, str]) -> None:
    for path in [path for method, path in OPERATIONS if method == "GET" and "{" not in path]:
        answer = await api.bob.get(path)
        for text in ("ann-secret", things["job_id"], things["dataset_id"]):
            assert text not in answer.text, path


async def test_no_route_without_a_key(api: Api) -> None:
    for method, path in OPERATIONS:
        answer = await ask(api.nobody, method, re.sub(r"\{[^}]*\}", "x", path))
        if (method, path) in OPEN:
            assert answer.status_code == 200
        else:
            error_of(answer, 401)


async def test_no_cursor_of_somebody_elses(api: Api, things: dict[str, str]) -> None:
    for path, thing, status in (
        ("/jobs", "job_id", 422),
        ("/datasets", "dataset_id", 422),
        ("/v1/fine_tuning/jobs", "job_id", 400),
        ("/v1/files", "file_id", 400),
        ("/v1/webhook_endpoints", "webhook_id", 400),
    ):
        error = error_of(await api.bob.get(f"{path}?after={things[thing]}"), status)
        assert error["param"] == "after"
        assert (await api.ann.get(f"{path}?after={things[thing]}")).status_code == 200
    # Nor one of one's own that is of another list.
    job_id = await api.create()
    for name, prefix in (("events", "ftevent"), ("checkpoints", "ftckpt")):
        cursor = f"{prefix}-{things['job_id'].removeprefix('ftjob-')}-1"
        error = error_of(await api.ann.get(f"/v1/fine_tuning/jobs/{job_id}/{name}?after={cursor}"), 400)
        assert error["param"] == "after"


async def test_no_part_of_somebody_elses_upload(api: Api, things: dict[str, str]) -> None:
    parts = f"/v1/uploads/{things['upload_id']}/parts"
    anns = (await api.ann.post(parts, files={"data": ("p", b"x")})).json()["id"]
    wanted = {"filename": "bob", "bytes": 1, "purpose": "fine-tune", "mime_type": "text/plain"}
    bobs = (await api.bob.post("/v1/uploads", json=wanted)).json()["id"]
    answer = await api.bob.post(f"/v1/uploads/{bobs}/complete", json={"part_ids": [anns]})
    assert error_of(answer, 400)["param"] == "part_ids.0"
    assert (await api.bob.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
@pytest.mark.parametrize("path", ["/jobs", "/jobs/estimate"])
async def test_no_data_of_somebody_elses(api: Api, things: dict[str, str], field: str, path: str) -> None:
    spec: dict[str, Any] = {**SPEC, field: {"source": "file", "file_id": things["dataset_id"]}}
    for client in (api.bob, api.root):  # an admin sees others' files, and trains on none
        assert error_of(await client.post(path, json=spec), 422)["param"] == f"{field}.file_id"
    assert (await api.ann.post(path, json=spec)).status_code in (200, 201)


async def test_no_job_through_somebody_elses_idempotency_key(api: Api) -> None:
    headers = {"Idempotency-Key": "one"}
    first = (await api.ann.post("/jobs", json=SPEC, headers=headers)).json()["id"]
    second = (await api.bob.post("/jobs", json=SPEC, headers=headers)).json()["id"]
    assert first != second
