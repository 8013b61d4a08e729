"""The audit log."""

from __future__ import annotations

from datetime import timedelta

import httpx
import pytest

from api.services.audit import prune
from shared.clock import utcnow
from shared.repository import audit
from shared.settings import Settings
from shared.tables import AuditEntry
from tests.api.conftest import SPEC, Api, Live, error_of, eventually, serve
from tests.conftest import wait_for

pytestmark = pytest.mark.anyio

TOKEN = "hf_secretsecretsecret"


async def entries(api: Api, count: int, query: str = "") -> list[dict[str, object]]:
    async def look() -> list[dict[str, object]] | None:
        found: list[dict[str, object]] = (await api.root.get(f"/audit?limit=100{query}")).json()["data"]
        return found if len(found) >= count else None

    found: list[dict[str, object]] = await eventually(look)
    assert len(found) == count
    return found


async def test_who_did_what_is_kept(api: Api) -> None:
    job_id = await api.create()
    await api.bob.post(f"/jobs/{job_id}/cancel")
    await api.root.post(f"/jobs/{job_id}/cancel")
    await api.ann.put("/secrets/hub_token", json={"value": TOKEN})
    await api.ann.get("/audit")
    await api.nobody.post("/jobs", json={})
    await api.ann.get("/jobs")
    found = await entries(api, 5)
    told = [(e["owner"], e["action"], e["object"], e["result"]) for e in reversed(found)]
    assert told == [
        ("ann", "POST /jobs", job_id, 201),
        ("bob", "POST /jobs/{job_id}/cancel", job_id, 404),
        ("root", "POST /jobs/{job_id}/cancel", job_id, 200),
        ("ann", "PUT /secrets/{secret}", "hub_token", 200),
        ("ann", "GET /audit", None, 403),
    ]
    assert TOKEN not in str(found)
    assert {e["address"] for e in found} == {"127.0.0.1"}
    assert [e["id"] for e in await entries(api, 1, "&owner=bob")] == [found[3]["id"]]
    page = (await api.root.get("/audit?limit=2")).json()
    assert (page["has_more"], page["next"]) == (True, str(found[1]["id"]))
    rest = (await api.root.get(f"/audit?after={page['next']}")).json()
    assert [e["id"] for e in rest["data"]] == [e["id"] for e in found[2:]]


async def test_only_admins_read_it(api: Api) -> None:
    assert error_of(await api.ann.get("/audit"), 403)["code"] == "admin_only"


async def test_what_is_old_goes(api: Api) -> None:
    days = api.context.settings.audit_days
    with api.database.write() as session:
        for age in (days - 1, days + 1):
            time = utcnow() - timedelta(days=age)
            audit.add_entries(session, [AuditEntry(time=time, owner="ann", action="x", result=0)])
    prune(api.context)
    assert len(await entries(api, 1)) == 1


@pytest.mark.parametrize("trusted", ["", "127.0.0.1"])
def test_forwarded_addresses_count_from_trusted_proxies_alone(
    settings: Settings, live: Live, owner_keys: dict[str, str], trusted: str
) -> None:
    if trusted:
        changed = settings.model_copy(update={"trusted_proxies": trusted})
        with serve(changed, live.database, live.key) as other:
            address = _address_of_a_post(other, owner_keys["root"])
    else:
        address = _address_of_a_post(live, owner_keys["root"])
    assert address == ("203.0.113.7" if trusted else "127.0.0.1")


def _address_of_a_post(live: Live, admin_key: str) -> str:
    with live.client() as client:
        client.post("/jobs", json=SPEC, headers={"X-Forwarded-For": "203.0.113.7"})

    def look() -> list[dict[str, str]]:
        headers = {"Authorization": f"Bearer {admin_key}"}
        found: list[dict[str, str]] = httpx.get(f"{live.url}/audit", headers=headers).json()["data"]
        return found

    return wait_for(look)[0]["address"]
