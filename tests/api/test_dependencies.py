"""API keys."""

from __future__ import annotations

import pytest

from shared.repository import keys
from tests.api.conftest import Api, error_of

pytestmark = pytest.mark.anyio

PROTECTED = (
    "/jobs", "/jobs/ftjob-000000000000000000000000", "/jobs/ftjob-000000000000000000000000/logs",
    "/jobs/x/artifacts", "/jobs/x/artifacts/y", "/jobs/x/metrics", "/jobs/x/checkpoints", "/datasets",
    "/datasets/x", "/models", "/system", "/metrics",
)  # fmt: skip


@pytest.mark.parametrize("path", PROTECTED)
async def test_everything_but_health_needs_a_key(shared_api: Api, path: str) -> None:
    answer = await shared_api.nobody.get(path)
    assert error_of(answer, 401)["type"] == "authentication_error"
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", PROTECTED)
async def test_who_has_no_key_is_told_nothing_else(shared_api: Api, path: str) -> None:
    error_of(await shared_api.nobody.get(f"{path}?x=1&limit=0"), 401)


async def test_posts_need_a_key_before_their_body_is_read(shared_api: Api) -> None:
    assert (await shared_api.nobody.post("/jobs", content=b"{")).status_code == 401
    assert (await shared_api.nobody.post("/jobs/estimate", json={})).status_code == 401
    assert (await shared_api.nobody.post("/datasets", files={"file": b"x"})).status_code == 401
    assert (await shared_api.nobody.post("/jobs?x=1", content=b"{")).status_code == 401
    assert (await shared_api.nobody.delete("/jobs/x")).status_code == 401


@pytest.mark.parametrize(
    "header",
    ["Bearer", "Bearer ", "Bearer wrong", "Basic YTpi", "bearer ty-0000", "Bearer \xe9", "Bearer a b"],
)
async def test_keys_that_are_none(shared_api: Api, header: str) -> None:
    answer = await shared_api.nobody.get("/jobs", headers={b"Authorization": header.encode("latin-1")})
    error_of(answer, 401)


async def test_health_needs_no_key(shared_api: Api) -> None:
    assert (await shared_api.nobody.get("/healthz")).json() == {"status": "ok"}
    assert (await shared_api.nobody.get("/readyz")).status_code == 200
    assert error_of(await shared_api.nobody.get("/healthz?x=1"), 422)["param"] == "x"


async def test_a_revoked_key_opens_nothing(api: Api) -> None:
    assert (await api.ann.get("/jobs")).status_code == 200
    with api.database.write() as session:
        ann = next(key for key in keys.list_keys(session) if key.name == "ann")
        assert ann.id is not None
        keys.revoke_key(session, ann.id)
    error = error_of(await api.ann.get("/jobs"), 401)
    assert "revoked" in error["message"]
    assert (await api.bob.get("/jobs")).status_code == 200
