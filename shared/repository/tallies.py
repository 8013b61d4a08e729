"""Tallies: how often what has happened to an owner's jobs. Counted as it happens, for jobs are too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import func
from sqlmodel import Session, col, select

from shared.repository import owners
from shared.repository.upsert import insert_into
from shared.tables import Tally

# Jobs that have ended and are still there, by status; failed ones, deleted or not, by code.
JOBS, FAILURES = "jobs", "failures"
# Seconds from a job's post to its first claim, and of all its attempts; by the bounds below.
WAITING, RUNNING = "waiting_seconds", "running_seconds"
BOUNDS = {
    WAITING: (1, 10, 60, 300, 900, 3600, 14_400, 86_400, 604_800),
    RUNNING: (60, 300, 900, 3600, 14_400, 43_200, 86_400, 259_200, 604_800),
}
BEYOND = "+Inf"


class Counted(NamedTuple):
    """How often, and what it came to together."""

    times: int
    total: float


def count(session: Session, owner: str, name: str, label: str, more: int = 1, total: float = 0) -> None:
    """Count something that has happened. Locks the owner: after rows of jobs, as everywhere."""
    owners.lock_owner(session, owner)
    statement = insert_into(session, Tally).values(
        owner=owner, name=name, label=label, count=more, total=total
    )
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["owner", "name", "label"],
            set_={
                "count": col(Tally.count) + statement.excluded.count,
                "total": col(Tally.total) + statement.excluded.total,
            },
        )
    )


def observe(session: Session, owner: str, name: str, seconds: float) -> None:
    """Count a time under the least of its name's bounds that it is not over."""
    label = next((str(bound) for bound in BOUNDS[name] if seconds <= bound), BEYOND)
    count(session, owner, name, label, total=seconds)


def read(session: Session, owner: str | None, names: Sequence[str]) -> dict[str, dict[str, Counted]]:
    """What was counted for an owner, or for all, by name and label. Reads some rows an owner."""
    statement = select(Tally.name, Tally.label, func.sum(Tally.count), func.sum(Tally.total))
    if owner is not None:
        statement = statement.where(Tally.owner == owner)
    statement = statement.where(col(Tally.name).in_(names)).group_by(col(Tally.name), col(Tally.label))
    found: dict[str, dict[str, Counted]] = {name: {} for name in names}
    for name, label, number, total in session.exec(statement):
        found[name][label] = Counted(int(number), float(total))
    return found
