"""What a client reads when the server's own parts fail."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from tests.api.conftest import SPEC, Api, error_of

pytestmark = pytest.mark.anyio


async def test_a_full_disk_under_the_database_is_named(api: Api) -> None:
    database = api.context.database
    if database.engine.dialect.name != "sqlite":
        pytest.skip("the disk of a PostgreSQL server is not this process's to fill")

    def full(connection: Any, *_: Any) -> None:
        # As small as the file is now: what it grows by is refused as on a full disk.
        connection.execute("PRAGMA max_page_count = 1")

    event.listen(database.engine, "checkout", full)
    accepted, body = 0, SPEC | {"metadata": {f"k{n}": "x" * 500 for n in range(16)}}
    # Free pages of the file take some rows first.
    while (answer := await api.ann.post("/jobs", json=body)).status_code == 201:
        accepted += 1
    refused = error_of(answer, 503)
    assert (refused["code"], answer.headers["retry-after"]) == ("storage_unavailable", "2")
    assert "full" in refused["message"]
    event.remove(database.engine, "checkout", full)
    event.listen(database.engine, "checkout", lambda c, *_: c.execute("PRAGMA max_page_count = 1073741823"))
    assert (await api.ann.post("/jobs", json=SPEC)).status_code == 201
    # What was accepted is there, and what was refused is not.
    assert len((await api.ann.get("/jobs?limit=100")).json()["data"]) == accepted + 1
