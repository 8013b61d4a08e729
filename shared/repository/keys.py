"""API keys and workers."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlmodel import Session, col, delete, select

from shared.clock import utcnow
from shared.errors import NotFound, Unauthorized
from shared.ids import hash_api_key, new_api_key
from shared.tables import ApiKey, WorkerRow


def create_key(session: Session, name: str, *, admin: bool, high: bool = False) -> str:
    """Make a key for the owner and return it; only its hash is stored."""
    key = new_api_key()
    session.add(ApiKey(name=name, key_hash=hash_api_key(key), hint=key[:7], admin=admin, high=high))
    return key


def find_key(session: Session, key: str) -> ApiKey:
    """
    Raises:
        Unauthorized: no such key, or it was revoked.
    """
    row = session.exec(select(ApiKey).where(ApiKey.key_hash == hash_api_key(key))).first()
    if row is None:
        raise Unauthorized("This API key is not known here. Make one with: tuneyard keys create NAME")
    if row.revoked_at is not None:
        raise Unauthorized("This API key was revoked. Make another with: tuneyard keys create NAME")
    return row


def is_live(session: Session, key_id: int) -> bool:
    """Whether the key is there and not revoked."""
    row = session.get(ApiKey, key_id)
    return row is not None and row.revoked_at is None


def list_keys(session: Session) -> list[ApiKey]:
    return list(session.exec(select(ApiKey).order_by(col(ApiKey.id))))


def revoke_key(session: Session, key_id: int) -> ApiKey:
    """
    Raises:
        NotFound: no key has this number.
    """
    row = session.get(ApiKey, key_id)
    if row is None:
        raise NotFound(f"No API key {key_id}: `tuneyard keys list` shows their numbers.")
    row.revoked_at = row.revoked_at or utcnow()
    return row


def put_worker(session: Session, worker: WorkerRow) -> None:
    """Record that a supervisor is alive; those not seen for a day are forgotten."""
    session.exec(delete(WorkerRow).where(col(WorkerRow.seen_at) < worker.seen_at - timedelta(days=1)))
    session.merge(worker)


def remove_worker(session: Session, worker_id: str) -> None:
    session.exec(delete(WorkerRow).where(col(WorkerRow.id) == worker_id))


def live_workers(session: Session, since: datetime) -> list[WorkerRow]:
    """Supervisors seen since then, the longest running first."""
    statement = select(WorkerRow).where(col(WorkerRow.seen_at) >= since)
    return list(session.exec(statement.order_by(col(WorkerRow.started_at))))
