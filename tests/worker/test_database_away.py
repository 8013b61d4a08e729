"""A PostgreSQL server that dies under running jobs, and comes back."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError, OperationalError

from shared.database import Database
from shared.queue import Doorbell
from shared.repository import jobs
from tests.conftest import Databases, wait_for
from tests.postgresql import PostgreSQL
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_supervisor import cancel, child_pid, entries, let_go, read, wait_status

pytestmark = pytest.mark.postgresql(only=True)


@pytest.fixture
def server(databases: Databases) -> PostgreSQL:
    assert databases.server is not None
    return databases.server


def test_a_job_outlives_the_database_being_away(
    server: PostgreSQL, start: Start, database: Database, doorbell: Doorbell
) -> None:
    # Leases that a machine with much else to do does not outrun.
    start(slots=2, lease_seconds=30)
    running, waiting = make_job(database, name="forever"), make_job(database, name="patient 2")
    wait_for(lambda: len(entries(database, running)) > 20)
    wait_for(lambda: child_pid(database, waiting))
    server.kill()
    with pytest.raises(DBAPIError):
        read(database, running)
    server.start()
    told = len(entries(database, running))
    wait_for(lambda: len(entries(database, running)) > told + 20)
    cancel(database, doorbell, running)
    assert wait_status(database, running, "cancelled").attempt == 1
    log = entries(database, running)
    assert [entry.seq for entry in log] == list(range(1, len(log) + 1))
    steps = [entry.data["step"] for entry in log if entry.type == "metrics" and entry.data]
    assert steps == list(range(1, len(steps) + 1))
    let_go(database, waiting)
    assert wait_status(database, waiting, "succeeded").attempt == 1


def test_a_lock_that_nobody_gives_back_is_no_wait_without_end(server: PostgreSQL, database: Database) -> None:
    job_id = make_job(database)
    with database.write() as one:
        jobs.lock_job(one, job_id, None)
        with database.write() as other:
            other.connection().exec_driver_sql("SET LOCAL lock_timeout = '50ms'")
            with pytest.raises(OperationalError, match="lock timeout"):
                jobs.lock_job(other, job_id, None)
            other.rollback()


def test_what_stops_in_a_transaction_loses_its_locks(server: PostgreSQL, database: Database) -> None:
    job_id = make_job(database)

    def freeze() -> None:
        with database.write() as frozen:
            frozen.connection().exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
            jobs.lock_job(frozen, job_id, None).priority = 2
            with database.write() as other:
                assert jobs.lock_job(other, job_id, None).priority == 1

    with pytest.raises(DBAPIError):
        freeze()
    assert read(database, job_id).priority == 1
