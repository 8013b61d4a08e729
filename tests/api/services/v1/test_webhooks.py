"""Webhooks' signing secrets: sealed at rest, also those of an earlier version."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import MetaData, Table

from api import outbound
from api.services.v1 import webhooks as service
from shared.clock import utcnow
from shared.database import MIGRATIONS, Database
from shared.errors import Unavailable
from shared.ids import new_webhook_secret
from shared.repository import webhooks
from shared.settings import Settings
from shared.tables import Delivery, Webhook
from tests.api.conftest import Api, eventually

pytestmark = pytest.mark.anyio

HOOK = {"name": "ci", "url": "https://hooks.example.org/", "event_types": list(webhooks.EVENTS)}


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The headers of what was sent; every receiver is there."""
    found: list[dict[str, str]] = []

    async def post(url: str, body: str, headers: dict[str, str], settings: Settings) -> int:
        found.append(headers | {"body": body})
        return 200

    monkeypatch.setattr(outbound, "post", post)
    return found


def signed_with(secret: str, sent: dict[str, str]) -> bool:
    """Whether one of the signatures is this secret's."""
    stamp = int(sent["webhook-timestamp"])
    moment = utcnow().replace(microsecond=0)
    moment += timedelta(seconds=stamp - int(moment.timestamp()))
    expected = service.signature([secret], sent["webhook-id"], sent["body"], moment)
    return expected in sent["webhook-signature"].split()


async def test_a_webhooks_secret_is_nowhere_as_it_is(api: Api, posted: list[dict[str, str]]) -> None:
    made = (await api.ann.post("/v1/webhook_endpoints", json=HOOK)).json()
    old, path = made["signing_secret"], f"/v1/webhook_endpoints/{made['id']}"
    assert old.startswith(made["signing_secret_hint"].removesuffix("…"))
    kept = {"keep_old_secret_active_for_24_hours": True}
    rotated = (await api.ann.post(f"{path}/rotate_secret", json=kept)).json()
    new = rotated["signing_secret"]
    assert new.startswith(rotated["signing_secret_hint"].removesuffix("…"))
    for file in api.context.settings.root.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert old.encode() not in content, file
            assert new.encode() not in content, file
    answer = await api.ann.post(f"{path}/test", json={"event_type": webhooks.EVENTS[0]})
    assert answer.status_code == 200
    (sent,) = posted
    assert signed_with(old, sent)
    assert signed_with(new, sent)
    assert not signed_with(new_webhook_secret(), sent)


async def test_a_row_that_was_moved_to_another_owner_signs_nothing(
    api: Api, posted: list[dict[str, str]]
) -> None:
    made = (await api.ann.post("/v1/webhook_endpoints", json=HOOK)).json()
    with api.database.write() as session:
        row = webhooks.get_webhook(session, made["id"], None)
        row.owner = "bob"
        event_id, body = webhooks.event(webhooks.EVENTS[0], service.TEST_JOB, utcnow())
        session.add(Delivery(webhook_id=made["id"], event_id=event_id, body=body))
    answer = await api.bob.post(
        f"/v1/webhook_endpoints/{made['id']}/test", json={"event_type": webhooks.EVENTS[0]}
    )
    assert answer.status_code == 503

    def last_error() -> str:
        with api.database.read() as session:
            return webhooks.get_webhook(session, made["id"], None).last_error or ""

    # The delivery stays, to be tried again.
    await eventually(lambda: asyncio.sleep(0, "can't be opened with this machine's key" in last_error()))
    assert posted == []


def test_the_secrets_of_an_earlier_version_are_sealed(settings: Settings, empty_database: str) -> None:
    database = Database(empty_database)
    settings.root.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    secret, old = new_webhook_secret(), new_webhook_secret()
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0007")
        earlier = Table("webhook", MetaData(), autoload_with=connection)
        row = {
            "id": "we_1", "owner": "ann", "name": "ci", "url": "https://a.example.org/", "event_types": [],
            "secret": secret, "old_secret": old, "created_at": utcnow(), "updated_at": utcnow(),
        }  # fmt: skip
        connection.execute(earlier.insert().values(**row))
    database.migrate()
    service.seal_old(database, settings)
    service.seal_old(database, settings)
    with database.read() as session:
        found = webhooks.get_webhook(session, "we_1", "ann")
    assert (found.secret_hint, secret in found.secret, old in str(found.old_secret)) == (
        secret[:10],
        False,
        False,
    )
    found.old_secret_until = utcnow() + timedelta(hours=1)
    vault = service.Vault(settings)
    assert service._signing_secrets(found, vault, utcnow()) == [secret, old]
    with pytest.raises(Unavailable):
        service._signing_secrets(Webhook(**found.model_dump() | {"owner": "bob"}), vault, utcnow())
    database.close()
