"""What a child process works on, and may write to for as long as its token holds the lease.

Every method runs inside the caller's transaction and raises LeaseLost once the token holds it no longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared.database import Session
from shared.events import Entry
from shared.lifecycle import FailureCode, JobStatus
from shared.repository import exports, leases, logs
from shared.repository.jobs import set_status
from shared.savings import MACHINE_MEMORY_ADVICE
from shared.tables import ExportTask, Job


class Lease(Protocol):
    """On one job's attempt, or on one export's."""

    @property
    def job_id(self) -> str: ...

    @property
    def token(self) -> str: ...

    def hold(self, session: Session) -> Job | ExportTask:
        """The row whose lease it is, locked."""

    def log(self, session: Session, entries: Sequence[Entry]) -> int:
        """Append to the job's log; the last one's seq."""

    def finish(
        self, session: Session, status: JobStatus, entry: Entry, failure: dict[str, Any] | None
    ) -> None:
        """End it as succeeded, or as failed; `entry` says so in a job's log."""

    def run_out_of_memory(self, session: Session, message: str, *, of_machine: bool) -> None:
        """End the attempt, and the work too if it can't be done with less."""

    def give_back(self, session: Session, why: str) -> None:
        """End the attempt alone."""

    def lose(self, session: Session, why: str, max_losses: int) -> None:
        """End the attempt, and the work too if that has happened too often."""


@dataclass(frozen=True)
class JobLease:
    """On an attempt at a job."""

    job_id: str
    token: str

    def hold(self, session: Session) -> Job:
        return leases.owned_job(session, self.job_id, self.token)

    def log(self, session: Session, entries: Sequence[Entry]) -> int:
        return logs.append_entries(session, self.job_id, entries, self.token)

    def finish(
        self, session: Session, status: JobStatus, entry: Entry, failure: dict[str, Any] | None
    ) -> None:
        self.log(session, [entry])
        set_status(self.hold(session), status, failure=failure)

    def run_out_of_memory(self, session: Session, message: str, *, of_machine: bool) -> None:
        leases.run_out_of_memory(session, self.hold(session), message, of_machine=of_machine)

    def give_back(self, session: Session, why: str) -> None:
        leases.give_back(session, self.hold(session), why)

    def lose(self, session: Session, why: str, max_losses: int) -> None:
        leases.lose(session, self.hold(session), why, max_losses)


@dataclass(frozen=True)
class ExportLease:
    """On an attempt at an export of a job that has succeeded, and that nothing of this changes."""

    job_id: str
    export_id: str
    token: str

    def hold(self, session: Session) -> ExportTask:
        return exports.owned_export(session, self.job_id, self.export_id, self.token)

    def log(self, session: Session, entries: Sequence[Entry]) -> int:
        self.hold(session)
        return logs.append_entries(session, self.job_id, entries)

    def finish(
        self,
        session: Session,
        status: JobStatus,  # noqa: ARG002 - a failure says it
        entry: Entry,  # noqa: ARG002 - an export has words of its own
        failure: dict[str, Any] | None,
    ) -> None:
        if failure is None:
            exports.succeed(session, self.hold(session))
        else:
            code = FailureCode(failure["code"])
            exports.fail(session, self.hold(session), code, failure["message"], failure["advice"])

    def run_out_of_memory(
        self,
        session: Session,
        message: str,
        *,
        of_machine: bool,  # noqa: ARG002 - exports are made in main memory
    ) -> None:
        exports.fail(session, self.hold(session), FailureCode.OUT_OF_MEMORY, message, MACHINE_MEMORY_ADVICE)

    def give_back(self, session: Session, why: str) -> None:
        exports.give_back(session, self.hold(session), why)

    def lose(self, session: Session, why: str, max_losses: int) -> None:
        exports.lose(session, self.hold(session), why, max_losses)
