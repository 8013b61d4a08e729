"""The lifecycle of a job as data: statuses, phases, failure codes and the one transition table."""

from __future__ import annotations

from enum import StrEnum

from shared.errors import StateConflict


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """What a running job is doing."""

    PREPARING_DATA = "preparing_data"
    LOADING_MODEL = "loading_model"
    TRAINING = "training"
    EVALUATING = "evaluating"
    EXPORTING = "exporting"


class FailureCode(StrEnum):
    INVALID_DATASET = "invalid_dataset"
    MODEL_UNAVAILABLE = "model_unavailable"
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_DISK = "out_of_disk"
    DIVERGED = "diverged"
    TIMED_OUT = "timed_out"
    WORKER_LOST = "worker_lost"
    EXPORT_FAILED = "export_failed"
    INTERNAL_ERROR = "internal_error"


class ExportStatus(StrEnum):
    """Of a file that is made after its job has succeeded."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNDER_WAY = frozenset({ExportStatus.QUEUED, ExportStatus.RUNNING})
TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

OPEN = frozenset(JobStatus) - TERMINAL

# Statuses in which a worker holds a lease on the job.
LEASED = frozenset({JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})

# queued -> running is the claim; running -> queued gives a job back when its worker stops or is lost.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.QUEUED,
            JobStatus.PAUSING,
            JobStatus.CANCELLING,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
        }
    ),
    JobStatus.PAUSING: frozenset(
        {JobStatus.PAUSED, JobStatus.CANCELLING, JobStatus.SUCCEEDED, JobStatus.FAILED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    # A job may finish between the request to cancel it and the step that would have noticed.
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


def check_transition(current: JobStatus, target: JobStatus) -> None:
    """Refuse a step that the table does not hold.

    Raises:
        StateConflict: naming both statuses.
    """
    if target not in TRANSITIONS[current]:
        raise StateConflict(f"A job that is {current} can't become {target}.")
