"""The application's documentation, whose examples run as shown, and what it is made of."""

from __future__ import annotations

import re

import httpx
import pytest

from api.app import create_app
from shared.settings import Settings
from tests.api.conftest import Api

pytestmark = pytest.mark.anyio

# What the contract names and this version has.
ROUTES = {
    "/jobs": {"get", "post"},
    "/jobs/estimate": {"post"},
    "/jobs/{job_id}": {"get", "delete"},
    "/jobs/{job_id}/cancel": {"post"},
    "/jobs/{job_id}/pause": {"post"},
    "/jobs/{job_id}/resume": {"post"},
    "/jobs/{job_id}/move": {"post"},
    "/jobs/{job_id}/logs": {"get"},
    "/jobs/{job_id}/metrics": {"get"},
    "/jobs/{job_id}/checkpoints": {"get"},
    "/jobs/{job_id}/artifacts": {"get"},
    "/jobs/{job_id}/artifacts/{name}": {"get"},
    "/jobs/{job_id}/exports": {"get", "post"},
    "/datasets": {"get", "post"},
    "/datasets/{dataset_id}": {"get", "delete"},
    "/models": {"get"},
    "/system": {"get"},
    "/metrics": {"get"},
    "/secrets": {"get"},
    "/secrets/{secret}": {"put", "delete"},
    "/audit": {"get"},
    "/v1/fine_tuning/jobs": {"get", "post"},
    "/v1/fine_tuning/jobs/{job_id}": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/cancel": {"post"},
    "/v1/fine_tuning/jobs/{job_id}/pause": {"post"},
    "/v1/fine_tuning/jobs/{job_id}/resume": {"post"},
    "/v1/fine_tuning/jobs/{job_id}/events": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": {"get"},
    "/v1/files": {"get", "post"},
    "/v1/files/{file_id}": {"get", "delete"},
    "/v1/files/{file_id}/content": {"get"},
    "/v1/uploads": {"post"},
    "/v1/uploads/{upload_id}/parts": {"post"},
    "/v1/uploads/{upload_id}/complete": {"post"},
    "/v1/uploads/{upload_id}/cancel": {"post"},
    "/v1/chat/completions": {"post"},
    "/v1/completions": {"post"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get", "delete"},
    "/v1/webhook_event_types": {"get"},
    "/v1/webhook_endpoints": {"get", "post"},
    "/v1/webhook_endpoints/{webhook_id}": {"get", "post", "delete"},
    "/v1/webhook_endpoints/{webhook_id}/rotate_secret": {"post"},
    "/v1/webhook_endpoints/{webhook_id}/test": {"post"},
    "/healthz": {"get"},
    "/readyz": {"get"},
}


async def test_the_documentation_names_every_route(api: Api) -> None:
    schema = (await api.nobody.get("/openapi.json")).json()
    assert {path: set(operations) for path, operations in schema["paths"].items()} == ROUTES
    operations = [o for path in schema["paths"].values() for o in path.values()]
    assert all(operation.get("description") for operation in operations)
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert (await api.nobody.get("/docs")).status_code == 200


async def test_every_reference_of_the_documentation_is_there(api: Api) -> None:
    text = (await api.nobody.get("/openapi.json")).text
    schemas = (await api.nobody.get("/openapi.json")).json()["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert "JobSpec" in named
    assert named <= set(schemas)
    assert "$defs" not in text


async def test_every_example_of_a_body_runs_as_shown(api: Api) -> None:
    schema = (await api.nobody.get("/openapi.json")).json()
    ran = 0
    for path, operations in schema["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            answer = await api.ann.post(path, json=example["value"])
            assert answer.status_code in (200, 201), (path, answer.text)
            ran += 1
    assert ran >= 4


async def test_answers_have_the_documented_fields(api: Api) -> None:
    schema = (await api.nobody.get("/openapi.json")).json()
    schemas = schema["components"]["schemas"]
    job_id = await api.create()
    for path, operations in schema["paths"].items():
        shown = operations.get("get", {}).get("responses", {}).get("200", {}).get("content", {})
        reference = shown.get("application/json", {}).get("schema", {}).get("$ref")
        if reference is None or re.search(r"{(name|dataset_id|file_id|model|export_id|webhook_id)}", path):
            continue
        asking = api.root if path == "/audit" else api.ann
        answer = (await asking.get(path.replace("{job_id}", job_id))).json()
        assert set(answer) == set(schemas[reference.rsplit("/", 1)[1]]["properties"]), path


async def test_two_applications_share_nothing(settings: Settings) -> None:
    first, second = create_app(settings), create_app(settings)
    assert first.state is not second.state
    async with httpx.AsyncClient(transport=httpx.ASGITransport(first), base_url="http://localhost") as client:
        assert (await client.get("/healthz")).status_code == 200
    assert not hasattr(second.state, "context")
