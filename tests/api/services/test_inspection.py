"""Who is looked into when, and what a child sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import uvloop

from api.services import inspection
from api.services.inspection import AT_ONCE, Finding, Inspector
from shared.database import Database
from shared.repository import files
from shared.settings import Settings
from shared.storage import Store
from shared.tables import DatasetRow
from tests.api.conftest import GOOD_ROW, eventually

pytestmark = pytest.mark.anyio

FOUND = Finding("messages", {"rows_used": 1})


@pytest.fixture
async def inspector(database: Database, settings: Settings, tmp_path: Path) -> AsyncIterator[Inspector]:
    made = Inspector(database, Store(settings.artifacts()), tmp_path / "uploads")
    await made.start()
    yield made
    await made.stop()


def stored(database: Database, settings: Settings, tmp_path: Path, owner: str, number: int) -> DatasetRow:
    """An upload that nobody has looked into yet."""
    source = tmp_path / "source"
    source.write_bytes(GOOD_ROW % number)
    row = DatasetRow(
        id=f"file-{owner}{number:021d}",
        owner=owner,
        filename=f"{number}.jsonl",
        bytes=source.stat().st_size,
        sha256="0" * 64,
        status="uploaded",
        format="auto",
        key=f"datasets/file-{owner}{number:021d}/data",
    )
    Store(settings.artifacts()).publish(source, row.key)
    with database.write() as session:
        session.add(row)
    return row


async def test_an_owner_with_many_files_holds_up_no_other(
    inspector: Inspector,
    database: Database,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    at_work: list[str] = []
    most = 0

    async def look(path: Path, _format: str) -> Finding:
        nonlocal most
        owner = path.parent.name[len("file-") :][:3]
        assert owner not in at_work
        at_work.append(owner)
        order.append(owner)
        most = max(most, len(at_work))
        await asyncio.sleep(0.02)
        at_work.remove(owner)
        return FOUND

    monkeypatch.setattr(inspection, "_inspect_in_child", look)
    owners = ["ann"] * 6 + ["bob", "cyd", "dan"]
    rows = [stored(database, settings, tmp_path, owner, n) for n, owner in enumerate(owners)]
    async with asyncio.timeout(20):
        for done in [inspector.add(row) for row in rows]:
            await done.wait()
    assert sorted(order) == owners
    assert set(order[:5]) == {"ann", "bob", "cyd", "dan"}
    assert most == AT_ONCE
    with database.read() as session:
        assert files.unchecked_datasets(session) == []


async def test_a_child_sees_no_passwords(
    inspector: Inspector,
    database: Database,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspection, "CHILD", "tests.api.services.tell_environment")
    for name in ("TUNEYARD_DATABASE_URL", "TUNEYARD_REDIS_URL", "AWS_SECRET_ACCESS_KEY", "LC_ALL"):
        monkeypatch.setenv(name, "C.UTF-8")
    row = stored(database, settings, tmp_path, "ann", 1)
    async with asyncio.timeout(30):
        await inspector.add(row).wait()
    with database.read() as session:
        seen = files.get_dataset(session, row.id, None).report
    assert seen is not None
    assert seen["PYTHONUTF8"] == "1"
    assert {"PATH", "LC_ALL"} <= set(seen)
    assert {name for name in seen if not name.startswith("LC_")} <= {*inspection.ENVIRONMENT, "PYTHONUTF8"}


async def test_a_child_that_takes_too_long_is_ended(
    inspector: Inspector,
    database: Database,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspection, "CHILD_SECONDS", 0.0)
    row = stored(database, settings, tmp_path, "ann", 1)
    async with asyncio.timeout(30):
        await inspector.add(row).wait()
    with database.read() as session:
        found = files.get_dataset(session, row.id, None)
    assert found.status == "error"
    assert found.error is not None
    assert "minutes" in found.error


@pytest.mark.parametrize("seconds", [0, 0.01, 0.1])
def test_a_server_that_stops_ends_a_child_with_its_pipes(tmp_path: Path, seconds: float) -> None:
    """At every moment of its life; uvloop, which serves, can't be closed with pipes that are open."""
    (tmp_path / "rows.jsonl").write_bytes(GOOD_ROW % 1)

    async def stop_in_the_middle() -> None:
        looking = asyncio.create_task(inspection._inspect_in_child(tmp_path / "rows.jsonl", "auto"))
        await eventually(_children)
        await asyncio.sleep(seconds)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(stop_in_the_middle())
    assert not asyncio.run(_children())


async def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if inspection.CHILD in child.cmdline()]
