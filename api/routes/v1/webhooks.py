"""Webhooks, as OpenAI's clients register them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api.dependencies import CallerDep, ContextDep, DatabaseDep, Limit, WebhookId
from api.schemas_v1 import (
    EventTypesV1,
    ListV1,
    WebhookDeletedV1,
    WebhookTestV1,
    WebhookV1,
    WebhookWithSecretV1,
)
from api.services.v1 import webhooks
from api.services.v1.webhooks import CreateWebhook, RotateSecret, SendTest, UpdateWebhook
from shared.ids import WEBHOOK_ID
from shared.repository.jobs import Page
from shared.repository.webhooks import EVENTS

router = APIRouter(prefix="/v1", tags=["OpenAI: webhooks"])


async def _page(
    after: Annotated[
        str | None, Query(pattern=f"^{WEBHOOK_ID.pattern}$", description="Last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page:
    return Page(after, limit)


@router.get("/webhook_event_types")
async def list_webhook_event_types() -> EventTypesV1:
    """The events that there are."""
    return EventTypesV1(data=list(EVENTS))


@router.post("/webhook_endpoints")
def create_webhook(context: ContextDep, caller: CallerDep, wanted: CreateWebhook) -> WebhookWithSecretV1:
    """Register where your events go. The secret that signs them is shown this once."""
    return webhooks.create(context, caller, wanted)


@router.get("/webhook_endpoints")
def list_webhooks(
    database: DatabaseDep, caller: CallerDep, page: Annotated[Page, Depends(_page)]
) -> ListV1[WebhookV1]:
    """Your webhooks, newest first."""
    return webhooks.list_page(database, caller, page)


@router.get("/webhook_endpoints/{webhook_id}")
def get_webhook(database: DatabaseDep, caller: CallerDep, webhook_id: WebhookId) -> WebhookV1:
    """A webhook, without its secret."""
    return webhooks.get(database, caller, webhook_id)


@router.post("/webhook_endpoints/{webhook_id}")
def update_webhook(
    context: ContextDep, caller: CallerDep, webhook_id: WebhookId, wanted: UpdateWebhook
) -> WebhookV1:
    """Change a webhook; what is left out stays."""
    return webhooks.update(context, caller, webhook_id, wanted)


@router.delete("/webhook_endpoints/{webhook_id}")
def delete_webhook(database: DatabaseDep, caller: CallerDep, webhook_id: WebhookId) -> WebhookDeletedV1:
    """Delete a webhook with what it has not taken yet."""
    return webhooks.delete(database, caller, webhook_id)


@router.post("/webhook_endpoints/{webhook_id}/rotate_secret")
def rotate_webhook_secret(
    context: ContextDep, caller: CallerDep, webhook_id: WebhookId, wanted: RotateSecret
) -> WebhookWithSecretV1:
    """Make another secret. It is shown this once."""
    return webhooks.rotate_secret(context, caller, webhook_id, wanted)


@router.post("/webhook_endpoints/{webhook_id}/test")
async def test_webhook(
    context: ContextDep, caller: CallerDep, webhook_id: WebhookId, wanted: SendTest
) -> WebhookTestV1:
    """Send a test event now, once."""
    return await webhooks.send_test(context, caller, webhook_id, wanted)
