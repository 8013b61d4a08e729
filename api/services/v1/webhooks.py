"""Webhooks: where an owner's events go, in OpenAI's shape."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Annotated, Literal

from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field

from api import outbound
from api.context import Caller, Context
from api.outbound import Unreachable, check_url
from api.schemas_v1 import ListV1, WebhookDeletedV1, WebhookTestV1, WebhookV1, WebhookWithSecretV1
from shared.clock import utcnow
from shared.database import Database
from shared.errors import InvalidRequest, QuotaExceeded
from shared.ids import new_webhook_id, new_webhook_secret
from shared.repository import owners, webhooks
from shared.repository.jobs import Page
from shared.settings import Settings
from shared.spec import Name
from shared.tables import Webhook
from shared.vault import Vault

MAX_WEBHOOKS = 10
KEPT = timedelta(hours=24)
SECRET_PREFIX = "whsec_"  # noqa: S105 - how they begin
HINT = len(SECRET_PREFIX) + 4
# What a test event tells of.
TEST_JOB = "ftjob-000000000000000000000000"

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=10)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class CreateWebhook(_Body):
    name: Name
    url: str
    event_types: EventTypes


class UpdateWebhook(_Body):
    """What is left out stays as it is."""

    name: Name | None = None
    url: str | None = None
    event_types: EventTypes | None = None


class RotateSecret(_Body):
    keep_old_secret_active_for_24_hours: bool = False


class SendTest(_Body):
    event_type: EventType


def create(context: Context, caller: Caller, wanted: CreateWebhook) -> WebhookWithSecretV1:
    """Register where the caller's events go.

    Raises:
        InvalidRequest: the URL is not allowed here.
        QuotaExceeded: the owner has as many as one may have.
    """
    check_url(wanted.url, context.settings)
    webhook_id, secret = new_webhook_id(), new_webhook_secret()
    row = Webhook(
        id=webhook_id,
        owner=caller.name,
        name=wanted.name,
        url=wanted.url,
        event_types=list(dict.fromkeys(wanted.event_types)),
        secret=Vault(context.settings).seal(caller.name, webhook_id, secret),
        secret_hint=secret[:HINT],
    )
    with context.database.write() as session:
        owners.lock_owner(session, caller.name)
        if webhooks.count_webhooks(session, caller.name) >= MAX_WEBHOOKS:
            raise QuotaExceeded(f"You have {MAX_WEBHOOKS} webhooks, which is the limit for one owner.")
        session.add(row)
    return WebhookWithSecretV1.with_secret(row, secret)


def list_page(database: Database, caller: Caller, page: Page) -> ListV1[WebhookV1]:
    """
    Raises:
        InvalidRequest: `after` names no webhook that the caller may see.
    """
    with database.read() as session:
        rows, more = webhooks.list_webhooks(session, caller.scope, page)
    return ListV1.of([WebhookV1.of(row) for row in rows], has_more=more)


def get(database: Database, caller: Caller, webhook_id: str) -> WebhookV1:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        return WebhookV1.of(webhooks.get_webhook(session, webhook_id, caller.scope))


def update(context: Context, caller: Caller, webhook_id: str, wanted: UpdateWebhook) -> WebhookV1:
    """
    Raises:
        NotFound: absent or somebody else's.
        InvalidRequest: the URL is not allowed here.
    """
    changes = wanted.model_dump(exclude_none=True)
    if wanted.url is not None:
        check_url(wanted.url, context.settings)
    with context.database.write() as session:
        row = webhooks.get_webhook(session, webhook_id, caller.scope, lock=True)
        if any(getattr(row, name) != value for name, value in changes.items()):
            row.updated_at = utcnow()
        for name, value in changes.items():
            setattr(row, name, value)
    return WebhookV1.of(row)


def rotate_secret(
    context: Context, caller: Caller, webhook_id: str, wanted: RotateSecret
) -> WebhookWithSecretV1:
    """Make another secret; the old one signs too for a day, if that is wanted.

    Raises:
        NotFound: absent or somebody else's.
    """
    secret = new_webhook_secret()
    with context.database.write() as session:
        row = webhooks.get_webhook(session, webhook_id, caller.scope, lock=True)
        kept = wanted.keep_old_secret_active_for_24_hours
        row.old_secret, row.old_secret_until = (row.secret, utcnow() + KEPT) if kept else (None, None)
        row.secret = Vault(context.settings).seal(row.owner, row.id, secret)
        row.secret_hint, row.updated_at = secret[:HINT], utcnow()
    return WebhookWithSecretV1.with_secret(row, secret)


def delete(database: Database, caller: Caller, webhook_id: str) -> WebhookDeletedV1:
    """Forget it, with what it has not taken yet.

    Raises:
        NotFound: absent or somebody else's.
    """
    with database.write() as session:
        session.delete(webhooks.get_webhook(session, webhook_id, caller.scope, lock=True))
    return WebhookDeletedV1(id=webhook_id)


async def send_test(context: Context, caller: Caller, webhook_id: str, wanted: SendTest) -> WebhookTestV1:
    """Send an event that tells of no job, once, and say what came back.

    Raises:
        NotFound: absent or somebody else's.
        InvalidRequest: nobody could be reached.
    """
    row = await to_thread.run_sync(_read, context.database, caller, webhook_id)
    event_id, body = webhooks.event(wanted.event_type, TEST_JOB, utcnow())
    try:
        status = await send(row, event_id, body, context.settings)
    except Unreachable as error:
        raise InvalidRequest(
            f"The webhook's URL could not be reached. {error}", param="url", code="webhook_unreachable"
        ) from error
    return WebhookTestV1(event_type=wanted.event_type, status_code=status, webhook_endpoint_id=webhook_id)


async def send(webhook: Webhook, event_id: str, body: str, settings: Settings) -> int:
    """Post an event, signed; returns the status of the answer.

    Raises:
        Unreachable: there was none.
        Unavailable: its secret can't be opened here.
    """
    now = utcnow()
    secrets = await to_thread.run_sync(_signing_secrets, webhook, Vault(settings), now)
    headers = {
        "content-type": "application/json",
        "user-agent": f"Tuneyard/{version('tuneyard')}",
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature(secrets, event_id, body, now),
    }
    return await outbound.post(webhook.url, body, headers, settings)


def signature(secrets: Sequence[str], event_id: str, body: str, moment: datetime) -> str:
    """The header that Standard Webhooks describe: `v1,…` for each secret."""
    signed = f"{event_id}.{int(moment.timestamp())}.{body}".encode()
    keys = (base64.b64decode(secret.removeprefix(SECRET_PREFIX)) for secret in secrets)
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def seal_old(database: Database, settings: Settings) -> None:
    """Seal what an earlier version has left in the database as it was."""
    vault = Vault(settings)
    with database.write() as session:
        for row in webhooks.unsealed_webhooks(session, SECRET_PREFIX):
            row.secret = vault.seal(row.owner, row.id, row.secret)
            if row.old_secret is not None:
                row.old_secret = vault.seal(row.owner, row.id, row.old_secret)


def _signing_secrets(webhook: Webhook, vault: Vault, moment: datetime) -> list[str]:
    """Those that are good now."""
    sealed = [webhook.secret]
    if webhook.old_secret and webhook.old_secret_until and webhook.old_secret_until > moment:
        sealed.append(webhook.old_secret)
    return [vault.open(webhook.owner, webhook.id, secret) for secret in sealed]


def _read(database: Database, caller: Caller, webhook_id: str) -> Webhook:
    with database.read() as session:
        return webhooks.get_webhook(session, webhook_id, caller.scope)
