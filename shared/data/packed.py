"""Compressed files, and Parquet: opened so that a small file can't unpack to something without end."""

from __future__ import annotations

import gzip
import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shared.data.parquet_pages import largest_pages, row_groups
from shared.errors import DatasetError

PARQUET_MAGIC = b"PAR1"
CHUNK = 2**20
# Text rarely packs better than 20:1, copies of one row up to a few hundred; a bomb reaches 1,000 and more.
MAX_RATIO = 250
ALWAYS_ALLOWED = 64 * 2**20
# Parquet unpacks whole pages, one of each column at a time: this much of them may be in memory.
MAX_PAGES_BYTES = 512 * 2**20
BATCH_ROWS = 64
# No cell is larger than its page, but a dictionary gives one cell to many rows: this much for a batch.
MAX_BATCH = 128 * 2**20

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A zstd file may begin with a frame to be skipped, as pzstd writes it: 0x184D2A50 to 0x184D2A5F.
ZSTD_SKIPPABLE = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))


def unpacked(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked if it is gzip or zstd, in pieces of at most 1 MiB.

    Raises:
        DatasetError: damaged or cut off, or it unpacks to far more than any text would.
    """
    packed = path.stat().st_size
    limit = max(ALWAYS_ALLOWED, MAX_RATIO * packed)
    total = 0
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        is_packed = magic.startswith((GZIP_MAGIC, ZSTD_MAGIC, *ZSTD_SKIPPABLE))
        stream = _stream(file, magic)
        try:
            while chunk := stream.read(CHUNK):
                total += len(chunk)
                if is_packed and total > limit:
                    raise DatasetError(
                        f"The file of {packed:,} bytes unpacks to more than {limit:,} bytes: no text does."
                    )
                yield bytes(chunk)
        except (EOFError, zlib.error, OSError) as error:
            if not is_packed:
                raise
            raise DatasetError(f"The compressed file is damaged or cut off: {error}.") from error


def _stream(file: IO[bytes], magic: bytes) -> Any:
    if magic.startswith(GZIP_MAGIC):
        return gzip.GzipFile(fileobj=file)
    if magic in (ZSTD_MAGIC, *ZSTD_SKIPPABLE):
        arrow = _pyarrow("pyarrow", "A zstd file")
        return arrow.CompressedInputStream(arrow.PythonFile(file, "r"), "zstd")
    return file


def parquet_rows(path: Path, max_row_bytes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a Parquet file with their 1-based numbers.

    Raises:
        DatasetError: damaged or cut off, a row of more bytes, or pages too large to unpack in memory.
    """
    parquet = _pyarrow("pyarrow.parquet", "A Parquet file")
    errors = _pyarrow("pyarrow", "A Parquet file")
    number = 0
    try:
        # With a buffer, a column's pages are read as they are needed.
        with path.open("rb") as raw, parquet.ParquetFile(path, buffer_size=CHUNK) as file:
            groups = row_groups(raw)
            # A group without rows has no pages.
            pages = {i: largest_pages(raw, group.columns) for i, group in enumerate(groups) if group.rows}
            for group, largest in pages.items():
                if largest.both > MAX_PAGES_BYTES:
                    raise DatasetError(
                        f"The pages of row group {group + 1} of the Parquet file unpack to more than "
                        f"{MAX_PAGES_BYTES:,} bytes: write it with smaller pages or row groups."
                    )
            for group, largest in pages.items():
                rows = min(BATCH_ROWS, max(1, MAX_BATCH // max(1, largest.unpacked)))
                for batch in file.iter_batches(rows, row_groups=[group], use_threads=False):
                    _check_rows(batch, max_row_bytes, number)
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
    except DatasetError:
        raise
    except (errors.ArrowException, OSError, ValueError, OverflowError) as error:
        # Texts that are not UTF-8 and times that Python has no room for are ValueErrors too.
        raise DatasetError(
            f"The Parquet file is damaged or cut off near row {number + 1}: {str(error)[:300]}"
        ) from error


def _check_rows(batch: Any, max_row_bytes: int, before: int) -> None:
    """
    Raises:
        DatasetError: a row of the batch has more bytes; `before` rows lie before the batch.
    """
    if batch.nbytes <= max_row_bytes:
        return
    for i in range(batch.num_rows):
        if batch.slice(i, 1).nbytes > max_row_bytes:
            number = before + i + 1
            raise DatasetError(
                f"Row {number} of the Parquet file is longer than {max_row_bytes / 2**20:g} MiB, the most "
                "that a row may have.",
                number,
            )


def without_filled(value: Any) -> Any:
    """A cell without the nulls that Arrow fills in: all structs of a column share one set of keys."""
    if isinstance(value, dict):
        return {key: without_filled(inner) for key, inner in value.items() if inner is not None}
    return [without_filled(inner) for inner in value] if isinstance(value, list) else value


def _pyarrow(module: str, what: str) -> Any:
    """pyarrow comes with the worker, not with the base install, and takes a while to import."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DatasetError(
            f"{what} needs the package pyarrow, which is not installed: use JSONL, or add tuneyard[worker]."
        ) from None
