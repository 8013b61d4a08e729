"""Compressed files, and Parquet: opened so that a small file can't unpack to something without end."""

from __future__ import annotations

import gzip
import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shared.errors import DatasetError

PARQUET_MAGIC = b"PAR1"
CHUNK = 2**20
# Text rarely packs better than 20:1, copies of one row up to a few hundred; a bomb reaches 1,000 and more.
MAX_RATIO = 250
ALWAYS_ALLOWED = 64 * 2**20
# Parquet unpacks whole pages and row groups: this much of one may be in memory.
MAX_ROW_GROUP = 2**30
BATCH_ROWS = 64
# No cell is larger than its row group, but a dictionary gives one cell to many rows: this much for a batch.
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
        DatasetError: damaged or cut off, a row of more bytes, or a row group too large to unpack in memory.
    """
    parquet = _pyarrow("pyarrow.parquet", "A Parquet file")
    errors = _pyarrow("pyarrow", "A Parquet file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            for group, size in enumerate(sizes):
                if size > MAX_ROW_GROUP:
                    raise DatasetError(
                        f"Row group {group + 1} of the Parquet file unpacks to more than {MAX_ROW_GROUP:,} "
                        "bytes: write it with smaller row groups."
                    )
            for group, size in enumerate(sizes):
                rows = min(BATCH_ROWS, max(1, MAX_BATCH // max(1, size)))
                for batch in file.iter_batches(rows, row_groups=[group], use_threads=False):
                    _check_rows(batch, max_row_bytes, number)
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
    except (errors.ArrowException, OSError) as error:
        raise DatasetError(f"The Parquet file is damaged or cut off: {str(error)[:300]}") from error


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
