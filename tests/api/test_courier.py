"""Deliveries: from the database, once for each end of a job, again after failures, fair between owners."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import func, select

from api import courier as module
from api.courier import courier, next_try
from api.outbound import Unreachable
from shared.clock import utcnow
from shared.database import Database
from shared.lifecycle import JobStatus
from shared.repository import webhooks
from shared.settings import Settings
from shared.tables import Delivery, Job, Webhook
from tests.api.conftest import eventually, finish
from tests.samples import make_job

pytestmark = pytest.mark.anyio


def register(database: Database, owner: str, *events: str) -> str:
    row = Webhook(
        id=f"we_{owner}_{len(events)}",
        owner=owner,
        name="x",
        url="https://example.org/",
        event_types=list(events or webhooks.EVENTS),
        secret="sealed",
        secret_hint="whsec_AAAA",
    )
    with database.write() as session:
        session.add(row)
    return row.id


def waiting(database: Database) -> int:
    with database.read() as session:
        return session.exec(select(func.count()).select_from(Delivery)).one()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Webhook and event of each delivery; every one succeeds."""
    found: list[tuple[str, str]] = []

    async def send(webhook: Webhook, event_id: str, body: str, settings: Settings) -> int:
        found.append((webhook.id, event_id))
        return 204

    monkeypatch.setattr(module, "send", send)
    return found


def test_the_pauses_grow_and_end_after_three_days() -> None:
    now = utcnow()
    delivery = Delivery(webhook_id="we", event_id="evt", body="{}", created_at=now)
    pauses = []
    for delivery.attempts in range(1, 12):
        again = next_try(delivery, 5, now)
        assert again is not None
        pauses.append((again - now).total_seconds())
    for n, pause in enumerate(pauses):
        assert 0.8 <= pause / min(5 * 4**n, 4 * 3600) <= 1.2
    delivery.created_at = now - timedelta(hours=71, minutes=59)
    assert next_try(delivery, 3600, now) is None


async def test_each_end_is_told_once_to_those_who_asked(
    database: Database, settings: Settings, sent: list[tuple[str, str]]
) -> None:
    everything = register(database, "ann")
    failures = register(database, "ann", "fine_tuning.job.failed")
    register(database, "bob")
    ended, broken, open_job = (make_job(database, owner="ann") for _ in range(3))
    finish(database, ended)
    finish(database, broken, JobStatus.FAILED)
    # Nobody was there as they ended: the news waits in the database.
    with database.write() as session:
        webhooks.announce(session)
        webhooks.announce(session)
    assert waiting(database) == 3
    async with courier(database, settings):
        await eventually(lambda: asyncio.sleep(0, len(sent) == 3 and waiting(database) == 0))
    assert sorted(webhook for webhook, _ in sent) == sorted([everything, everything, failures])
    with database.read() as session:
        told = {job.id: job.announced for job in session.exec(select(Job))}
    assert told == {ended: True, broken: True, open_job: False}


async def test_what_was_under_way_when_the_process_ended_is_tried_again(
    database: Database, settings: Settings, sent: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(database, "ann")
    finish(database, make_job(database, owner="ann"))
    started = asyncio.Event()

    async def hang(*_: Any) -> int:
        started.set()
        await asyncio.sleep(3600)
        return 200

    with monkeypatch.context() as patch:
        patch.setattr(module, "send", hang)
        patch.setattr(module, "TAKEN", timedelta(seconds=0.2))
        async with courier(database, settings):
            await asyncio.wait_for(started.wait(), 10)
    assert waiting(database) == 1
    async with courier(database, settings):
        await eventually(lambda: asyncio.sleep(0, len(sent) == 1 and waiting(database) == 0))


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Deliveries to ann's hosts never end; bob's arrive."""
    told: list[str] = []

    async def send(webhook: Webhook, *_: Any) -> int:
        told.append(webhook.owner)
        if webhook.owner == "ann":
            await asyncio.sleep(3600)
        return 200

    monkeypatch.setattr(module, "send", send)
    return told


async def test_an_owner_whose_hosts_hang_holds_up_nobody(
    database: Database, settings: Settings, hung: list[str]
) -> None:
    for n in range(3):
        register(database, "ann", *(["fine_tuning.job.succeeded"] * (n + 1)))
    register(database, "bob")
    for _ in range(4):
        finish(database, make_job(database, owner="ann"))
    finish(database, make_job(database, owner="bob"))
    async with courier(database, settings):
        await eventually(lambda: asyncio.sleep(0, "bob" in hung and hung.count("ann") == 3))
        assert hung.count("ann") == 3


async def test_a_failure_is_kept_with_the_webhook_until_it_takes_one(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = register(database, "ann")
    finish(database, make_job(database, owner="ann"))
    answers: list[Any] = [Unreachable("No connection."), 500, 301, 200]

    async def send(*_: Any) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    def last_error() -> str | None:
        with database.read() as session:
            return webhooks.get_webhook(session, webhook_id, None).last_error

    monkeypatch.setattr(module, "send", send)
    async with courier(database, settings.model_copy(update={"webhook_retry_seconds": 0.05})):
        await eventually(lambda: asyncio.sleep(0, last_error() == "No connection."))
        await eventually(lambda: asyncio.sleep(0, last_error() == "The answer was 500."))
        await eventually(lambda: asyncio.sleep(0, last_error() is None and waiting(database) == 0))
    assert answers == []
