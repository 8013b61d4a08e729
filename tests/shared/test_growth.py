"""Nothing that has ended may slow a claim, a poll or a page: what they take of SQLite does not grow.

Counted in steps of SQLite's machine, which are the same on every computer, in two databases that differ in
their history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import Session

from bench.population import Population, Size, populate
from shared.clock import utcnow
from shared.database import Database
from shared.events import Entry
from shared.ids import new_job_id, new_token
from shared.lifecycle import JobStatus
from shared.repository import (
    audit,
    exports,
    files,
    jobs,
    leases,
    logs,
    owners,
    queue,
    retention,
    tallies,
    webhooks,
)
from shared.repository.jobs import Page
from shared.settings import Settings
from shared.tables import Job

OWNER = "owner-0"
SETTINGS = Settings()
SMALL = Size(owners=3, queued=12, finished=60, entries=500)
LARGE = Size(owners=3, queued=12, finished=900, entries=9_000)
# Of steps: an index is a level deeper, a page fuller.
SLACK = 1.25


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Database, Population, Size]]]:
    """The same box with little history and with much."""
    found = []
    for size in (SMALL, LARGE):
        database = Database(f"sqlite:///{tmp_path_factory.mktemp('growth')}/tuneyard.db")
        database.migrate()
        found.append((database, populate(database, size), size))
    yield found
    for database, _, _ in found:
        database.close()


def claim(session: Session, _: Population, __: Size) -> None:
    def read(priority: int, owner: str) -> Iterator[Any]:
        yield from queue.read_line(session, priority, owner, None, 10)

    first = next(iter(queue.offer(session, SETTINGS, read)))
    token = new_token()
    job = leases.claim(session, first.id, "box", token, utcnow() + timedelta(minutes=1))
    assert job is not None
    leases.give_back(session, leases.owned_job(session, job.id, token), "Counted.")


def tick(session: Session, _: Population, __: Size) -> None:
    assert not leases.expired_leases(session, utcnow())
    assert not exports.expired_exports(session, utcnow())
    assert not exports.live_tokens(session)
    assert exports.claim_export(session, "box", "token", utcnow(), lambda _: False) is None
    exports.fail_unmakeable(session, ["box"])
    assert not webhooks.has_news(session)


def post(session: Session, population: Population, _: Size) -> None:
    owners.quotas(session, SETTINGS, OWNER)
    job = jobs.get_job(session, population.queued[0], OWNER)
    copied = Job(**job.model_dump(exclude={"id", "number", "place"}), id=new_job_id())
    jobs.add_job(session, copied, Entry("Accepted."))
    jobs.request_cancel(session, copied.id, OWNER)
    jobs.delete_job(session, copied.id, OWNER)


def page(
    owner: str | None, *, last: bool = False, oldest_first: bool = False, **filters: Any
) -> Callable[[Session, Population, Size], None]:
    def read(session: Session, population: Population, _: Size) -> None:
        after = population.finished[5 if not oldest_first else -5] if last else None
        jobs.list_jobs(session, owner, Page(after, 3, oldest_first), **filters)

    return read


def poll(session: Session, population: Population, size: Size) -> None:
    for after in (0, size.entries // 2, size.entries - 20):
        logs.log_state(session, population.logged, OWNER)
        assert len(logs.read_entries(session, population.logged, after, 20)) == 20
        assert logs.first_seq(session, population.logged) == 1
    assert len(logs.read_newest(session, population.logged, size.entries // 2, 20)) == 20
    logs.append_entries(session, population.logged, [Entry("More.")])


def system(session: Session, _: Population, __: Size) -> None:
    for owner in (OWNER, None):
        jobs.count_by_status(session, owner)
        jobs.leased_jobs(session, owner)
        jobs.oldest_queued(session, owner)
        tallies.read(session, owner, [tallies.JOBS, tallies.FAILURES])
    owners.used_lately(session, OWNER)
    jobs.held_slots(session)
    queue.waiting(session)


def datasets(session: Session, _: Population, __: Size) -> None:
    for owner in (OWNER, None):
        assert files.list_datasets(session, owner, Page()) == ([], False)
        assert len(files.list_files(session, owner, Page(limit=3), None)[0]) == 3
    assert not jobs.uses_dataset(session, "file-none")
    assert not files.expired(session)
    audit.list_entries(session, OWNER, None, 3)
    audit.list_entries(session, None, None, 3)


def of_jobs(session: Session, population: Population, _: Size) -> None:
    ids = population.finished[:20]
    assert len(logs.last_metrics(session, ids)) == 20
    files.artifacts_of(session, ids)
    exports.exports_of(session, ids)
    files.results_of(session, ids)
    assert retention.lock_unused(session, ids[0])
    keys = [f"{kind}/{job_id}/token/file" for job_id in ids for kind in ("jobs", "results")]
    assert not retention.known_keys(session, [*keys, "datasets/file-none/data", "uploads/upload-none/part"])


WORK: dict[str, Callable[[Session, Population, Size], None]] = {
    "claim": claim,
    "tick": tick,
    "post": post,
    "poll": poll,
    "system": system,
    "datasets": datasets,
    "of jobs": of_jobs,
    **{
        f"page of {owner or 'all'}, {name}": page(owner, **options)
        for owner in (OWNER, None)
        for name, options in {
            "first": {},
            "last": {"last": True},
            "last, oldest first": {"last": True, "oldest_first": True},
            "status": {"status": JobStatus.RUNNING},
            "status, last": {"status": JobStatus.FAILED, "last": True},
            "model": {"model": "local/none"},
            "model, last": {"model": "local/model-0", "last": True},
            "metadata": {"metadata": {"rare": "r-none"}},
            "metadata, last": {"metadata": {"team": "team-1"}, "last": True},
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_history_costs_nothing(boxes: list[tuple[Database, Population, Size]], name: str) -> None:
    little, much = (steps(database, WORK[name], *rest) for database, *rest in boxes)
    assert much <= little * SLACK + 50, f"{little} steps became {much}"


def test_it_is_seen_when_an_index_is_missing(boxes: list[tuple[Database, Population, Size]]) -> None:
    def without(session: Session, population: Population, size: Size) -> None:
        session.connection().execute(text("DROP INDEX ix_job_owner_page"))
        page(OWNER, last=True)(session, population, size)

    little, much = (steps(database, without, *rest) for database, *rest in boxes)
    assert much > 2 * little


def steps(
    database: Database, work: Callable[[Session, Population, Size], None], population: Population, size: Size
) -> int:
    """SQLite's steps; nothing of the work is kept."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    with database.read() as session:
        connection: Any = session.connection().connection.driver_connection
        connection.set_progress_handler(count, 1)
        try:
            work(session, population, size)
            session.flush()
        finally:
            connection.set_progress_handler(None, 1)
            session.rollback()
    return counted
