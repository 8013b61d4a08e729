"""Artifacts: list, and download whole or in part."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from api.context import Caller
from api.schemas import ArtifactOut, ListOut
from shared.database import Database
from shared.errors import NotFound, RangeNotSatisfiable
from shared.repository import files, logs
from shared.storage import Store
from shared.tables import ArtifactRow

# What Tuneyard calls its files; anything else can't be in the table, nor in any path.
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
BYTES_RANGE = re.compile(r"bytes=\s*([0-9]*)\s*-\s*([0-9]*)\s*", re.IGNORECASE)
MAX_DIGITS = 18


@dataclass(frozen=True)
class Span:
    """Bytes from `start` up to and without `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Content:
    """A file that is open: its first chunk, and the others. Whoever takes it closes `rest`."""

    first: bytes
    rest: Generator[bytes, None, None]


@dataclass(frozen=True)
class Download:
    """What to answer: status, headers and, unless it was asked for alone, the content."""

    status: int
    headers: dict[str, str]
    content: Content | None


def list_all(database: Database, caller: Caller, job_id: str) -> ListOut[ArtifactOut]:
    """The job's complete files.

    Raises:
        NotFound: the job is absent or somebody else's.
    """
    with database.read() as session:
        logs.log_state(session, job_id, caller.scope)
        rows = files.list_artifacts(session, job_id)
    return ListOut(data=[ArtifactOut.of(row) for row in rows])


def download(
    database: Database,
    store: Store,
    caller: Caller,
    job_id: str,
    name: str,
    headers: Mapping[str, str],
    *,
    with_content: bool,
) -> Download:
    """One file, or the part of it that Range asks for.

    Args:
        headers: the request's, with lower-case names: range, if-range, if-none-match.

    Raises:
        NotFound: the job is absent or somebody else's, or has no such complete file.
        RangeNotSatisfiable: the range begins beyond the end.
    """
    with database.read() as session:
        logs.log_state(session, job_id, caller.scope)
        # A name that can't be one finds nothing: the table's own refusal lists what there is.
        row = files.get_artifact(session, job_id, name if NAME.fullmatch(name) else "")
    etag = f'"{row.sha256}"'
    answer = {
        "etag": etag,
        "accept-ranges": "bytes",
        "last-modified": row.created_at.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "cache-control": "private, no-cache",
    }
    if _matches(headers.get("if-none-match"), etag):
        return Download(304, answer, None)
    answer["content-type"] = "application/octet-stream"
    answer["content-disposition"] = f'attachment; filename="{row.name}"'
    span = _span(headers, row, etag) if with_content else None
    start, end = (span.start, span.end) if span else (0, row.bytes)
    answer["content-length"] = str(end - start)
    if span is not None:
        answer["content-range"] = f"bytes {start}-{end - 1}/{row.bytes}"
    content = read_stored(store, row.key, row.name, start, end) if with_content else None
    return Download(206 if span else 200, answer, content)


def parse_range(value: str, size: int) -> Span | None:
    """The one range that the header asks for; None where it is to be answered with the whole file.

    Other units, several ranges and what is no range at all are ignored, as RFC 9110 lets a server do.

    Raises:
        RangeNotSatisfiable: the range lies beyond the end.
    """
    found = BYTES_RANGE.fullmatch(value.strip())
    if found is None:
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    if not first:
        # The last N bytes; more than there are means all.
        start, end = max(size - _position(last), 0), size
    else:
        start, end = _position(first), min(_position(last) + 1, size) if last else size
        if last and _position(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(f"The file has {size} bytes: the range begins beyond its end.", size)
    return Span(start, end)


def _position(digits: str) -> int:
    """The number; one that no file reaches may have thousands of digits, and counts as the largest."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= MAX_DIGITS else sys.maxsize


def _span(headers: Mapping[str, str], row: ArtifactRow, etag: str) -> Span | None:
    asked = headers.get("range")
    if asked is None:
        return None
    condition = headers.get("if-range")
    # A date is no strong validator of ours, and another ETag is another file: either way all of it.
    if condition is not None and condition.strip() != etag:
        return None
    return parse_range(asked, row.bytes)


def _matches(condition: str | None, etag: str) -> bool:
    if condition is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return "*" in tags or etag in tags


def read_stored(store: Store, key: str, name: str, start: int, end: int) -> Content:
    """A file of the store, open.

    Raises:
        NotFound: it is gone.
    """
    chunks = store.read(key, start, end)
    try:
        # Opens the file, while an error can still be told.
        first = next(chunks, b"")
    except FileNotFoundError as error:
        raise NotFound(
            f"The file {name} is gone from the store.", param="name", code="artifact_not_found"
        ) from error
    return Content(first, chunks)
