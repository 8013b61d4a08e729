"""Webhooks, and the events that they have not taken yet."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import func
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from shared.clock import utcnow
from shared.errors import NotFound
from shared.ids import new_event_id
from shared.lifecycle import TERMINAL
from shared.repository.jobs import Page, read_page
from shared.tables import Delivery, Job, Webhook

# Jobs whose end is told in one transaction.
AT_ONCE = 100
EVENTS = tuple(f"fine_tuning.job.{status}" for status in ("succeeded", "failed", "cancelled"))


class Due(NamedTuple):
    """An event to be delivered now."""

    delivery: Delivery
    webhook: Webhook


def get_webhook(session: Session, webhook_id: str, owner: str | None, *, lock: bool = False) -> Webhook:
    """The webhook, if `owner` may see it (None: everybody's); with `lock` until the transaction ends.

    Raises:
        NotFound: absent or somebody else's.
    """
    row = session.get(Webhook, webhook_id, with_for_update=lock)
    if row is None or (owner is not None and row.owner != owner):
        raise NotFound(f"No webhook {webhook_id}.", param="id", code="webhook_not_found")
    return row


def list_webhooks(session: Session, owner: str | None, page: Page) -> tuple[list[Webhook], bool]:
    """One page, newest first, and whether there are more.

    Raises:
        InvalidRequest: `after` names no webhook that the owner may see.
    """
    statement = select(Webhook)
    if owner is not None:
        statement = statement.where(Webhook.owner == owner)
    return read_page(session, Webhook, statement, page, lambda after: get_webhook(session, after, owner))


def count_webhooks(session: Session, owner: str) -> int:
    return session.exec(select(func.count()).where(Webhook.owner == owner)).one()


def unsealed_webhooks(session: Session, prefix: str) -> list[Webhook]:
    """Those whose secret begins as no sealed one does, locked."""
    statement = select(Webhook).where(col(Webhook.secret).startswith(prefix, autoescape=True))
    return list(session.exec(statement.with_for_update()))


def has_news(session: Session) -> bool:
    """Whether a job has ended that nobody was told of."""
    return session.exec(_news().limit(1)).first() is not None


def announce(session: Session) -> None:
    """Hand the news of jobs that have ended to their owners' webhooks: each once, whoever ended the job."""
    for job in session.exec(_news().limit(AT_ONCE).with_for_update(skip_locked=True)):
        job.announced = True
        event_type = f"fine_tuning.job.{job.status}"
        event_id, body = event(event_type, job.id, job.finished_at or job.created_at)
        for webhook in session.exec(select(Webhook).where(Webhook.owner == job.owner)):
            # What ended before there was a webhook is no news to it.
            if event_type in webhook.event_types and webhook.created_at <= (job.finished_at or utcnow()):
                session.add(Delivery(webhook_id=webhook.id, event_id=event_id, body=body))


def event(event_type: str, job_id: str, moment: datetime) -> tuple[str, str]:
    """An event's id and its body, as OpenAI's clients read it."""
    event_id = new_event_id()
    content = {
        "id": event_id,
        "object": "event",
        "created_at": int(moment.timestamp()),
        "type": event_type,
        "data": {"id": job_id},
    }
    return event_id, json.dumps(content)


def due_webhooks(
    session: Session, now: datetime, busy: Collection[str], full: Collection[str], limit: int
) -> list[tuple[str, str]]:
    """Id and owner of webhooks that have something due; who waits longest goes first.

    Args:
        busy: webhooks to leave out.
        full: owners to leave out.
    """
    statement = (
        select(Webhook.id, Webhook.owner)
        .join(Delivery, col(Delivery.webhook_id) == col(Webhook.id))
        .where(col(Delivery.due_at) <= now, col(Webhook.id).not_in(busy), col(Webhook.owner).not_in(full))
        .group_by(col(Webhook.id), col(Webhook.owner))
        .order_by(func.min(col(Delivery.due_at)))
        .limit(limit)
    )
    return list(session.exec(statement))


def take_due(session: Session, webhook_id: str, now: datetime, until: datetime) -> Due | None:
    """The webhook's oldest event that is due; nobody else tries it before `until`."""
    statement = (
        select(Delivery)
        .where(Delivery.webhook_id == webhook_id, col(Delivery.due_at) <= now)
        .order_by(col(Delivery.id))
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    delivery = session.exec(statement).first()
    webhook = session.get(Webhook, webhook_id)
    if delivery is None or webhook is None:
        return None
    delivery.attempts += 1
    delivery.due_at = until
    return Due(delivery, webhook)


def settle(session: Session, due: Due, error: str | None, again: datetime | None) -> None:
    """Record how an attempt went: forget the event, or try it again at that time."""
    webhook = session.get(Webhook, due.webhook.id)
    delivery = session.get(Delivery, due.delivery.id)
    if webhook is None or delivery is None:
        # Deleted meanwhile.
        return
    webhook.last_error = error
    if again is None:
        session.delete(delivery)
    else:
        delivery.due_at = again


def _news() -> SelectOfScalar[Job]:
    statement = select(Job).where(col(Job.announced).is_(False), col(Job.status).in_(TERMINAL))
    return statement.order_by(col(Job.finished_at), col(Job.id))
