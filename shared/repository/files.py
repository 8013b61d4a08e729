"""Artifacts of jobs and uploaded files: rows that point into the store."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import func, or_
from sqlmodel import Session, col, select

from shared.clock import utcnow
from shared.errors import NotFound, StateConflict
from shared.lifecycle import JobStatus
from shared.repository import owners
from shared.repository.jobs import Page, read_page, uses_dataset
from shared.tables import FINE_TUNE, ArtifactRow, DatasetRow, Job

# Kinds of artifacts that tell of a job and hold nothing of its model.
RECORDS = frozenset({"manifest", "metrics"})


def put_artifact(session: Session, row: ArtifactRow) -> str | None:
    """Record a complete file; returns the store key of the one that it replaces, if there was one.

    Its bytes are counted for the job's owner.
    """
    statement = select(ArtifactRow).where(ArtifactRow.job_id == row.job_id, ArtifactRow.name == row.name)
    earlier = session.exec(statement).first()
    if earlier is not None:
        session.delete(earlier)
        session.flush()
    session.add(row)
    owner = session.exec(select(Job.owner).where(Job.id == row.job_id)).one()
    owners.count_stored(session, owner, row.bytes - (earlier.bytes if earlier else 0))
    return earlier.key if earlier is not None else None


def list_artifacts(session: Session, job_id: str) -> list[ArtifactRow]:
    statement = select(ArtifactRow).where(ArtifactRow.job_id == job_id, col(ArtifactRow.listed))
    return list(session.exec(statement.order_by(col(ArtifactRow.id))))


def artifacts_of(session: Session, job_ids: Collection[str]) -> dict[str, list[ArtifactRow]]:
    """The artifacts of several jobs, by job id."""
    found: dict[str, list[ArtifactRow]] = {job_id: [] for job_id in job_ids}
    statement = select(ArtifactRow).where(col(ArtifactRow.job_id).in_(job_ids), col(ArtifactRow.listed))
    for row in session.exec(statement.order_by(col(ArtifactRow.id))):
        found[row.job_id].append(row)
    return found


def find_artifact(session: Session, job_id: str, name: str) -> ArtifactRow | None:
    """The job's file of that name, listed or not."""
    statement = select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name == name)
    return session.exec(statement).first()


def get_artifact(session: Session, job_id: str, name: str) -> ArtifactRow:
    """
    Raises:
        NotFound: the job has no such file, or not yet.
    """
    row = find_artifact(session, job_id, name)
    if row is None or not row.listed:
        names = ", ".join(a.name for a in list_artifacts(session, job_id)) or "none yet"
        raise NotFound(
            f"The job has no artifact of that name. It has: {names}. A file appears when it is complete.",
            param="name",
            code="artifact_not_found",
        )
    return row


class Made(NamedTuple):
    """What a job has made: of a list of thousands, no more than is shown."""

    model: str
    owner: str
    job_name: str | None
    job_id: str
    moment: datetime


def made_models(session: Session, owner: str | None) -> list[Made]:
    """Models of jobs that are there to be used, the newest first."""
    made = select(ArtifactRow.job_id).where(col(ArtifactRow.kind).not_in(RECORDS))
    moment = func.coalesce(Job.finished_at, Job.created_at)
    columns: tuple[Any, ...] = (Job.model, Job.owner, col(Job.spec)["name"].as_string(), Job.id, moment)
    statement = select(*columns).where(Job.status == JobStatus.SUCCEEDED, col(Job.id).in_(made))
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    rows = session.exec(statement.order_by(col(Job.created_at).desc(), col(Job.id).desc()))
    return [Made(*row) for row in rows]


def has_model(session: Session, job_id: str) -> bool:
    """Whether the job has published anything but its records."""
    return bool(_model_files(session, job_id))


def forget_model(session: Session, job_id: str) -> list[str]:
    """Delete the rows of all that the job has made but its records; returns their store keys."""
    rows = _model_files(session, job_id)
    if rows:
        owner = session.exec(select(Job.owner).where(Job.id == job_id)).one()
        owners.count_stored(session, owner, -sum(row.bytes for row in rows))
    for row in rows:
        session.delete(row)
    return [row.key for row in rows]


def _model_files(session: Session, job_id: str) -> list[ArtifactRow]:
    """What holds the job's model, listed or not."""
    statement = select(ArtifactRow).where(ArtifactRow.job_id == job_id, col(ArtifactRow.kind).not_in(RECORDS))
    return list(session.exec(statement))


def get_file(session: Session, file_id: str, owner: str | None, *, lock: bool = False) -> DatasetRow:
    """The file of any purpose, if `owner` may see it (None: everybody's); with `lock` until the transaction
    ends. One whose time is over is gone, unless a job that has not ended needs it.

    Raises:
        NotFound: absent, over its time or somebody else's.
    """
    row = session.get(DatasetRow, file_id, with_for_update=lock)
    if row is None or (owner is not None and row.owner != owner) or _is_over(session, row):
        raise NotFound(f"No file {file_id}.", param="id", code="file_not_found")
    return row


def _is_over(session: Session, row: DatasetRow) -> bool:
    expired = row.expires_at is not None and row.expires_at <= utcnow()
    return expired and not uses_dataset(session, row.id)


def get_dataset(session: Session, dataset_id: str, owner: str | None, *, lock: bool = False) -> DatasetRow:
    """The same, if it is a file to train on.

    Raises:
        NotFound: absent, over its time, of another purpose, or somebody else's.
    """
    try:
        row = get_file(session, dataset_id, owner, lock=lock)
    except NotFound:
        row = None
    if row is None or row.purpose != FINE_TUNE:
        raise NotFound(f"No dataset {dataset_id}.", param="id", code="dataset_not_found")
    return row


def list_datasets(session: Session, owner: str | None, page: Page) -> tuple[list[DatasetRow], bool]:
    """One page, newest first, and whether there are more.

    Raises:
        InvalidRequest: `after` names no dataset that the owner may see.
    """
    return list_files(session, owner, page, FINE_TUNE)


def list_files(
    session: Session, owner: str | None, page: Page, purpose: str | None
) -> tuple[list[DatasetRow], bool]:
    """One page of the files of a purpose (None: of all), and whether there are more.

    Raises:
        InvalidRequest: `after` names no file that the owner may see.
    """
    expires_at = col(DatasetRow.expires_at)
    statement = select(DatasetRow).where(or_(expires_at.is_(None), expires_at > utcnow()))
    if owner is not None:
        statement = statement.where(DatasetRow.owner == owner)
    if purpose is not None:
        statement = statement.where(DatasetRow.purpose == purpose)
    return read_page(session, DatasetRow, statement, page, lambda after: get_file(session, after, owner))


def delete_file(session: Session, row: DatasetRow) -> str:
    """Delete the row of a file that was locked; returns the store key, to be deleted after the commit.

    Raises:
        StateConflict: a job that has not ended needs it.
    """
    if uses_dataset(session, row.id):
        raise StateConflict("A job that has not ended uses this file: cancel it or wait for it.")
    owners.count_stored(session, row.owner, -row.bytes)
    session.delete(row)
    return row.key


def expired(session: Session) -> list[DatasetRow]:
    """Files whose time is over and that no job needs which has not ended, locked; by owner, for deleting one
    locks its owner too."""
    expired = select(DatasetRow).where(col(DatasetRow.expires_at) <= utcnow())
    rows = list(session.exec(expired.with_for_update(skip_locked=True)))
    # In the query's order, SQLite would go through an index of all files.
    return sorted((row for row in rows if _is_over(session, row)), key=lambda row: row.owner)


def results_of(session: Session, job_ids: Collection[str]) -> dict[str, list[str]]:
    """Ids of the files with the jobs' results, by job id."""
    found: dict[str, list[str]] = {job_id: [] for job_id in job_ids}
    statement = select(DatasetRow.job_id, DatasetRow.id).where(col(DatasetRow.job_id).in_(job_ids))
    for job_id, file_id in session.exec(statement):
        found[str(job_id)].append(file_id)
    return found


def add_file(session: Session, row: DatasetRow) -> None:
    """Record a file that is in the store; its bytes are counted for its owner."""
    owners.count_stored(session, row.owner, row.bytes)
    session.add(row)


def unchecked_datasets(session: Session) -> list[DatasetRow]:
    """Uploads that were never looked into, because the API stopped in between."""
    return list(session.exec(select(DatasetRow).where(DatasetRow.status == "uploaded")))


def set_checked(
    session: Session, dataset_id: str, format_name: str, report: dict[str, Any] | None, error: str | None
) -> None:
    """Record what looking into an upload found; one that was deleted meanwhile stays so."""
    row = session.get(DatasetRow, dataset_id, with_for_update=True)
    if row is None:
        return
    row.status = "processed" if error is None else "error"
    row.format = format_name
    row.report = report
    row.error = error
