"""The protocol of claims and leases: every state of its model, and the real queries against the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.clock import utcnow
from shared.database import Database, Session
from shared.errors import LeaseLost, StateConflict
from shared.events import Entry
from shared.lifecycle import JobStatus
from shared.repository import files, jobs, leases, logs
from shared.tables import ArtifactRow
from tests.chaos.protocol import MAX_LOSSES, Action, Bounds, Guards, World, explore, start, steps
from tests.samples import make_job
from worker.lease import JobLease


@pytest.mark.parametrize(
    ("bounds", "states"),
    [(Bounds(jobs=1, workers=3, attempts=3, pauses=2), 3135), (Bounds(2, 2, 2, 0), 14619)],
    ids=["one job", "two jobs"],
)
def test_no_state_that_can_be_reached_is_broken(bounds: Bounds, states: int) -> None:
    found = explore(bounds, Guards())
    print(f"{bounds}: {found.states} states, {found.steps} steps")
    assert (found.broken, found.way, found.states) == (None, (), states)


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        ("token_is_checked", "attempt 1 wrote while 2 held it"),
        ("only_queued_are_claimed", "was claimed while it was running"),
        ("attempts_have_files_of_their_own", "changed after its end"),
        ("ended_is_for_good", "attempt 1 wrote while 0 held it"),
    ],
)
def test_without_any_one_guard_a_broken_state_is_found(guard: str, expected: str) -> None:
    found = explore(Bounds(1, 2, 3, 1), Guards()._replace(**{guard: False}))
    assert expected in str(found.broken)
    assert found.way


class RealProtocol(RuleBasedStateMachine):
    """Takes steps that the model offers, in the database too, and compares."""

    bounds = Bounds(jobs=2, workers=3, attempts=4, pauses=3)
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.world: World = start(self.bounds)
        self.ids = [make_job(self.database) for _ in self.world.jobs]
        # Both jobs may end before the steps do: from then on there is nothing new to refuse.
        self.stepped = True

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        offered = sorted(steps(self.world, self.bounds, Guards()))
        self.stepped = bool(offered)
        if offered:
            action, after = data.draw(st.sampled_from(offered))
            self._do(action)
            self.world = after

    @invariant()
    def the_rows_are_the_models(self) -> None:
        for number, expected in enumerate(self.world.jobs):
            with self.database.read() as session:
                job = jobs.get_job(session, self.ids[number], None)
                entries = logs.read_entries(session, job.id, 0, 10_000)
                artifact = files.find_artifact(session, job.id, "adapter.tar")
            assert (job.status, job.attempt, job.losses) == (
                expected.status,
                expected.attempt,
                expected.losses,
            )
            assert job.lease_token == (self._token(number, expected.holder) if expected.holder else None)
            assert (artifact.sha256 if artifact else "0") == str(expected.file)
            assert [entry.seq for entry in entries] == list(range(1, job.last_seq + 1))

    @precondition(lambda self: self.stepped)
    @invariant()
    def what_the_model_does_not_offer_is_refused(self) -> None:
        offered = {(action.what, action.job) for action, _ in steps(self.world, self.bounds, Guards())}
        with self.database.write() as session:
            for number, job_id in enumerate(self.ids):
                if self.world.jobs[number].status != JobStatus.QUEUED:
                    assert leases.claim(session, job_id, "box", "token", utcnow()) is None
                before = jobs.get_job(session, job_id, None).status
                for what, request in REQUESTS.items():
                    # The model pauses only so often.
                    if (what, number) in offered or (what == "pause" and before in ("queued", "running")):
                        continue
                    with suppress(StateConflict):
                        assert request(session, job_id, None).status == before

    def _token(self, job: int, number: int) -> str:
        return f"{self.ids[job]}-{number}"

    def _do(self, action: Action) -> None:
        job_id, token = self.ids[action.job], self._token(action.job, action.number)
        if action.what == "finds its lease lost":
            for write in WRITES.values():
                with pytest.raises(LeaseLost), self.database.write() as session:
                    write(session, JobLease(job_id, token))
            return
        with self.database.write() as session:
            if action.what in REQUESTS:
                REQUESTS[action.what](session, job_id, None)
            elif action.what == "claim":
                expires_at = utcnow() + timedelta(hours=1)
                assert leases.claim(session, job_id, "box", token, expires_at) is not None
            elif action.what == "its lease runs out":
                jobs.get_job(session, job_id, None).lease_expires_at = utcnow() - timedelta(seconds=1)
                session.flush()
                (lost,) = leases.expired_leases(session, utcnow())
                leases.lose(session, lost, "Not heard of.", MAX_LOSSES)
            elif action.what in WRITES:
                WRITES[action.what](session, JobLease(job_id, token))


def _publish(session: Session, lease: JobLease) -> None:
    """As the sink does it: guarded by the entry. The hash tells which attempt it was."""
    lease.log(session, [Entry("Ready.")])
    number = lease.token.rpartition("-")[2]
    key = f"jobs/{lease.job_id}/{lease.token}/adapter.tar"
    row = ArtifactRow(
        job_id=lease.job_id, name="adapter.tar", kind="adapter", bytes=1, sha256=number, key=key
    )
    files.put_artifact(session, row)


REQUESTS = {"cancel": jobs.request_cancel, "pause": jobs.request_pause, "resume": jobs.request_resume}
WRITES: dict[str, Callable[[Session, JobLease], object]] = {
    "writes": lambda session, lease: lease.log(session, [Entry("Step.")]),
    "publishes": _publish,
    "succeeds": lambda session, lease: lease.finish(session, JobStatus.SUCCEEDED, Entry("Done."), None),
    "fails": lambda session, lease: lease.finish(session, JobStatus.FAILED, Entry("Failed."), {"code": "x"}),
    "is given back": lambda session, lease: lease.give_back(session, "Stopped."),
    "loses one of its processes, and tells": lambda session, lease: lease.lose(session, "Lost.", MAX_LOSSES),
    "dies, and its supervisor tells": lambda session, lease: leases.lose(
        session, lease.hold(session), "Died.", MAX_LOSSES
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _database() -> object:
    with tempfile.TemporaryDirectory() as folder:
        RealProtocol.database = Database(f"sqlite:///{Path(folder) / 'protocol.db'}")
        RealProtocol.database.migrate()
        yield
        RealProtocol.database.close()


TestRealProtocol = RealProtocol.TestCase
TestRealProtocol.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, database=None
)
