"""Artifacts of jobs and uploaded datasets: rows that point into the store."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlmodel import Session, col, select

from shared.errors import NotFound, StateConflict
from shared.repository.jobs import Page, read_page, uses_dataset
from shared.tables import ArtifactRow, DatasetRow


def put_artifact(session: Session, row: ArtifactRow) -> str | None:
    """Record a complete file; returns the store key of the one that it replaces, if there was one."""
    statement = select(ArtifactRow).where(ArtifactRow.job_id == row.job_id, ArtifactRow.name == row.name)
    earlier = session.exec(statement).first()
    if earlier is not None:
        session.delete(earlier)
        session.flush()
    session.add(row)
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


def get_dataset(session: Session, dataset_id: str, owner: str | None, *, lock: bool = False) -> DatasetRow:
    """The dataset, if `owner` may see it (None: everybody's); with `lock` until the transaction ends.

    Raises:
        NotFound: absent or somebody else's.
    """
    row = session.get(DatasetRow, dataset_id, with_for_update=lock)
    if row is None or (owner is not None and row.owner != owner):
        raise NotFound(f"No dataset {dataset_id}.", param="id", code="dataset_not_found")
    return row


def list_datasets(session: Session, owner: str | None, page: Page) -> tuple[list[DatasetRow], bool]:
    """One page, newest first, and whether there are more.

    Raises:
        InvalidRequest: `after` names no dataset that the owner may see.
    """
    statement = select(DatasetRow)
    if owner is not None:
        statement = statement.where(DatasetRow.owner == owner)
    return read_page(session, DatasetRow, statement, page, lambda after: get_dataset(session, after, owner))


def delete_dataset(session: Session, dataset_id: str, owner: str | None) -> str:
    """Delete the row; returns the store key of the file, to be deleted after the commit.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: a job that has not ended needs it.
    """
    row = get_dataset(session, dataset_id, owner, lock=True)
    if uses_dataset(session, dataset_id):
        raise StateConflict("A job that has not ended uses this dataset: cancel it or wait for it.")
    session.delete(row)
    return row.key


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
