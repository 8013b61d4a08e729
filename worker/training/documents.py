"""Tokenised documents kept on disk, and written out as training rows."""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from shared.events import Control
from worker.training.tokenize import Tokens

ROWS_A_WRITE = 64
IGNORED = -100


class Documents:
    """Documents one after the other in two files, for all of them may not fit in memory.

    Attributes:
        trained_tokens: tokens with a label, of all documents.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._paths = (folder / f"{name}.ids", folder / f"{name}.mask")
        self._files = [path.open("w+b") for path in self._paths]
        self._hash = hashlib.sha256()
        self._lengths = array("q")
        self.trained_tokens = 0

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, tokens: Tokens) -> None:
        ids, trained = tokens.ids.tobytes(), tokens.trained.tobytes()
        self._files[0].write(ids)
        self._files[1].write(trained)
        self._hash.update(ids)
        self._hash.update(trained)
        self._lengths.append(len(tokens.ids))
        self.trained_tokens += int(tokens.trained.sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def sha256(self) -> str:
        """Hex hash of all ids and masks in order."""
        return self._hash.hexdigest()

    def write(self, path: Path, rows: list[array[int]] | npt.NDArray[np.int64], control: Control) -> None:
        """Rows of documents as an Arrow stream, the form that `datasets` reads.

        Args:
            rows: indices of the documents in each row; int64 [rows, documents] if an array. The columns are
                `input_ids`, `labels` (-100 where nothing is learnt) and `seq_lengths`, lists of int32.
        """
        for file in self._files:
            file.flush()
        lengths = self.lengths
        starts = np.concatenate(([0], np.cumsum(lengths)))
        numbers = pa.list_(pa.int32())
        schema = pa.schema([("input_ids", numbers), ("labels", numbers), ("seq_lengths", numbers)])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for at in range(0, len(rows), ROWS_A_WRITE):
                control.check()
                group = rows[at : at + ROWS_A_WRITE]
                members = [int(document) for row in group for document in row]
                tokens = np.frombuffer(self._read(0, 4, starts, members), dtype=np.int32)
                mask = np.frombuffer(self._read(1, 1, starts, members), dtype=np.bool_)
                sizes = [int(lengths[row].sum()) for row in group]
                columns = [
                    _lists(tokens, sizes),
                    _lists(np.where(mask, tokens, np.int32(IGNORED)), sizes),
                    _lists(lengths[members].astype(np.int32), [len(row) for row in group]),
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))

    def _read(self, file: int, size: int, starts: npt.NDArray[np.int64], members: list[int]) -> bytes:
        """The documents' parts of one file, one after the other. Mapping it would count as memory in use."""
        number = self._files[file].fileno()
        return b"".join(
            os.pread(
                number, int(starts[document + 1] - starts[document]) * size, int(starts[document]) * size
            )
            for document in members
        )


def _lists(values: npt.NDArray[np.int32], sizes: list[int]) -> Any:
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
