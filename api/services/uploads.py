"""Uploads: multipart/form-data streamed to a file, hashed on its way, never held in memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from shared.errors import InvalidRequest, MalformedRequest, TooLarge

# Chunks come in pieces of 64 KiB; a thread is worth its while for more.
BATCH_BYTES = 1 << 20
MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
MAX_FILENAME = 255
# What boundaries and the other fields may take beyond the file itself.
ENVELOPE_BYTES = 1 << 20
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Upload:
    """A complete file on this machine's disk; `fields` are the form's other fields."""

    path: Path
    filename: str
    bytes: int
    sha256: str
    fields: Mapping[str, str]


@dataclass
class _Part:
    """The part of the form that is being read."""

    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


async def receive(
    chunks: AsyncIterator[bytes], headers: Mapping[str, str], path: Path, limit: int, field_name: str = "file"
) -> Upload:
    """Write the form's field `file` to `path`; on any error nothing is left there.

    Args:
        chunks: the request's body.
        limit: the most bytes that the file may have.
        field_name: what the field is called instead.

    Raises:
        InvalidRequest: no file, or an empty one.
        MalformedRequest: the body is not multipart/form-data.
        TooLarge: the file is over the limit.
        OSError: the disk refused.
    """
    claimed = headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed[:20]) > limit + ENVELOPE_BYTES:
        raise _too_large(limit, field_name)
    boundary = _boundary(headers.get("content-type", ""), field_name)
    with _whole_or_nothing(path) as file:
        form = _Form(boundary, file, limit, field_name)
        batch = bytearray()
        async for chunk in chunks:
            batch += chunk
            if len(batch) >= BATCH_BYTES:
                await to_thread.run_sync(form.write, bytes(batch))
                batch.clear()
        await to_thread.run_sync(form.finish, bytes(batch))
        return form.result(path)


def display_name(name: str) -> str:
    """A name that is only ever shown: no folders, no control characters, at most 255 characters."""
    return UNPRINTABLE.sub("", re.split(r"[/\\]", name)[-1]).strip()[:MAX_FILENAME] or "unnamed"


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class _Form:
    """Takes the body in pieces; the file goes to disk, the small fields are kept."""

    def __init__(self, boundary: bytes, file: BinaryIO, limit: int, field_name: str) -> None:
        self._name = field_name
        self._file = file
        self._limit = limit
        self._digest = hashlib.sha256()
        self._size = 0
        self._overhead = 0
        self._parts = 0
        self._part = _Part()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._filename: str | None = None
        self._fields: dict[str, str] = {}
        self._ended = False
        self._parser = self._new_parser(boundary)

    def write(self, data: bytes) -> None:
        self._overhead += len(data)
        with _malformed():
            self._parser.write(data)
        # What did not go into the file: the form around it.
        if self._overhead - self._size > ENVELOPE_BYTES:
            raise TooLarge("The form around the file is too large.")

    def finish(self, data: bytes) -> None:
        """Take the last piece and make the file durable."""
        self.write(data)
        if not self._ended:
            raise MalformedRequest(
                "The upload broke off before the end of the form.", code="malformed_multipart"
            )
        self._file.flush()
        os.fsync(self._file.fileno())

    def result(self, path: Path) -> Upload:
        if self._filename is None:
            raise InvalidRequest(
                f"The form has no field `{self._name}` with a file.", param=self._name, code="missing_field"
            )
        if self._size == 0:
            raise InvalidRequest("The file is empty.", param=self._name, code="empty_file")
        filename = display_name(self._fields.get("name") or self._filename)
        return Upload(path, filename, self._size, self._digest.hexdigest(), self._fields)

    def _new_parser(self, boundary: bytes) -> MultipartParser:
        # A boundary over 256 bytes is refused here.
        with _malformed():
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header_name,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._header,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finished,
                },
            )

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} fields.", param=self._name)
        self._part = _Part()

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value.decode("latin-1"))
            self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
            if b"filename" in options:
                self._part.filename = options[b"filename"].decode("utf-8", "replace")
            if self._part.name == self._name:
                self._begin_file()
        self._header_name.clear()
        self._header_value.clear()

    def _begin_file(self) -> None:
        if self._filename is not None:
            raise InvalidRequest("The form has more than one file: upload one at a time.", param=self._name)
        self._filename = self._part.filename or "unnamed"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name != self._name:
            self._part.value += data[start:end]
            if len(self._part.value) > MAX_FIELD_BYTES:
                raise InvalidRequest(
                    f"The field {self._part.name[:50]!r} is over {MAX_FIELD_BYTES} bytes.",
                    param=self._part.name[:50],
                )
            return
        piece = memoryview(data)[start:end]
        self._size += len(piece)
        if self._size > self._limit:
            raise _too_large(self._limit, self._name)
        self._digest.update(piece)
        self._file.write(piece)

    def _end(self) -> None:
        if self._part.name != self._name:
            self._fields[self._part.name] = self._part.value.decode("utf-8", "replace").strip()

    def _finished(self) -> None:
        self._ended = True


@contextmanager
def _malformed() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise MalformedRequest(
            f"The body is not valid multipart/form-data: {error}", code="malformed_multipart"
        ) from error


def _boundary(content_type: str, field_name: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest(
            f"Send the file as multipart/form-data in the field `{field_name}`: "
            f"curl -F {field_name}=@rows.jsonl",
            param=field_name,
            code="missing_field",
        )
    return options[b"boundary"]


def _too_large(limit: int, field_name: str) -> TooLarge:
    return TooLarge(f"The file is over this server's limit of {limit} bytes.", param=field_name)
