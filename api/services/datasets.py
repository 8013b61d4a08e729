"""Datasets: files to train on. Take one in, find, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import get_args

from api.context import Caller, Context
from api.schemas import DatasetOut, ListOut
from api.services.files import Terms, receive
from shared.database import Database
from shared.errors import InvalidRequest
from shared.repository import files
from shared.repository.jobs import Page
from shared.spec import DataFormat
from shared.storage import Store, StoreUnavailable
from shared.tables import FINE_TUNE

FORMATS: tuple[str, ...] = get_args(DataFormat)


async def create(
    context: Context, caller: Caller, chunks: AsyncIterator[bytes], headers: Mapping[str, str]
) -> DatasetOut:
    """Store an upload. A small one is looked into before the answer, if that takes no more than seconds.

    Raises:
        InvalidRequest: no file, an empty one, or a format that there is not.
        MalformedRequest: the body is not multipart/form-data.
        TooLarge: the file is over the limit.
        QuotaExceeded: the owner's storage is used up, or would be.
        Unavailable: the disk or the store has no room for it.
    """
    return DatasetOut.of(await receive(context, caller, chunks, headers, _terms))


def list_page(database: Database, caller: Caller, page: Page) -> ListOut[DatasetOut]:
    """One page of the datasets that the caller may see, newest first.

    Raises:
        InvalidRequest: `after` names no dataset that the caller may see.
    """
    with database.read() as session:
        rows, more = files.list_datasets(session, caller.scope, page)
    return ListOut(
        data=[DatasetOut.of(row) for row in rows], has_more=more, next=rows[-1].id if more else None
    )


def get(database: Database, caller: Caller, dataset_id: str) -> DatasetOut:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        return DatasetOut.of(files.get_dataset(session, dataset_id, caller.scope))


def delete(database: Database, store: Store, caller: Caller, dataset_id: str) -> None:
    """Delete the row, then the file.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: a job that has not ended needs it.
    """
    with database.write() as session:
        key = files.delete_file(session, files.get_dataset(session, dataset_id, caller.scope, lock=True))
    with suppress(StoreUnavailable):  # `tuneyard gc` removes what no row names.
        store.delete(key)


def format_of(fields: Mapping[str, str]) -> str:
    """The format that a form names.

    Raises:
        InvalidRequest: there is no such format.
    """
    name = fields.get("format") or "auto"
    if name not in FORMATS:
        raise InvalidRequest(
            f"There is no format {name[:50]!r}. There are: {', '.join(FORMATS)}.", param="format"
        )
    return name


def _terms(fields: Mapping[str, str]) -> Terms:
    return Terms(FINE_TUNE, format_of(fields))
