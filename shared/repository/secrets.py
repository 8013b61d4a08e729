"""Owners' secrets, sealed."""

from __future__ import annotations

from sqlmodel import Session, col, select

from shared.clock import utcnow
from shared.errors import NotFound
from shared.tables import OwnerSecret


def put_secret(session: Session, owner: str, name: str, sealed: str) -> OwnerSecret:
    """Keep a secret, in the place of an earlier one of that name."""
    return session.merge(OwnerSecret(owner=owner, name=name, sealed=sealed, updated_at=utcnow()))


def list_secrets(session: Session, owner: str) -> list[OwnerSecret]:
    statement = select(OwnerSecret).where(OwnerSecret.owner == owner)
    return list(session.exec(statement.order_by(col(OwnerSecret.name))))


def owners_of(session: Session, name: str) -> list[str]:
    """Who has a secret of that name."""
    return list(session.exec(select(OwnerSecret.owner).where(OwnerSecret.name == name)))


def delete_secret(session: Session, owner: str, name: str) -> None:
    """
    Raises:
        NotFound: the owner has none of that name.
    """
    row = session.get(OwnerSecret, (owner, name))
    if row is None:
        raise NotFound(f"You have no secret {name}.", param="secret", code="secret_not_found")
    session.delete(row)
