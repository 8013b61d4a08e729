"""Rows to tokens, on every core.

Parsing, rendering and masking are Python, which one process does on one core. So batches of rows go to
processes of their own, `worker.training.encode_process`, and come back as tokens in the same order.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, cast

from shared.data.conversation import Conversation, Dropped
from shared.data.formats import parse_row
from shared.data.reader import Row
from shared.data.tally import Counts, counts_of
from shared.errors import JobFailure
from shared.events import Control
from shared.lifecycle import FailureCode
from worker.training.templates import Template
from worker.training.tokenize import Encoder, Refusal, Tokens

# A batch ends at whichever comes first: rows may be of any width.
BATCH_ROWS = 512
BATCH_BYTES = 2 * 2**20
# Starting the processes takes seconds: a small file is done before.
BATCHES_ALONE = 8
# One process can't read and keep faster than about so many others encode.
MAX_PROCESSES = 16
# Batches that wait are bytes; beyond these the reader waits too.
WAITING_BYTES = 64 * 2**20
POLL_SECONDS = 0.5
_LENGTH = 8


class Encoded(NamedTuple):
    """A usable row.

    Attributes:
        key: of two rows that say the same to the same end, the same number.
        said: 64 bits of what is said, for the split.
        tokens: or why there are none.
    """

    counts: Counts
    key: int
    said: int
    tokens: Tokens | Refusal


@dataclass(frozen=True)
class RowSpec:
    """How rows become tokens; see `Encoder` for tokenizer, limit and cuts."""

    tokenizer: Any
    template: Template
    limit: int
    cuts: bool
    data_format: str
    drop_unparsable: bool


class RowEncoder:
    """Parses, renders, masks and tokenises rows."""

    def __init__(self, spec: RowSpec) -> None:
        self._spec = spec
        self._encoder = Encoder(spec.tokenizer, spec.template, spec.limit, spec.cuts)

    def encode(self, batch: list[bytes]) -> list[Encoded | Dropped]:
        """What became of each row of a batch, in order.

        Args:
            batch: pickled `Row`s.
        """
        spec = self._spec
        parsed = [
            parse_row(row, spec.data_format, line, spec.drop_unparsable)
            for line, row in map(pickle.loads, batch)
        ]
        usable = [row for row in parsed if isinstance(row, Conversation)]
        tokens = iter(self._encoder.encode(usable))
        return [
            Encoded(counts_of(row), row.key(), row.said(), next(tokens))
            if isinstance(row, Conversation)
            else row
            for row in parsed
        ]


def encode_rows(rows: Iterable[Row], spec: RowSpec, control: Control) -> Iterator[Encoded | Dropped]:
    """What becomes of each row, in order: the first ones here, the others on all cores.

    Raises:
        JobStopped: when asked to stop. JobFailure: a process ran out of memory.
    """
    batches = _batches(rows)
    encoder = RowEncoder(spec)
    for batch in islice(batches, BATCHES_ALONE):
        control.check()
        yield from encoder.encode(batch)
    following = next(batches, None)
    if following is None:
        return
    del encoder
    with _Processes(spec, min(len(os.sched_getaffinity(0)), MAX_PROCESSES)) as processes:
        waiting: deque[tuple[int, Future[list[Encoded | Dropped]]]] = deque()
        held = 0
        for batch in chain([following], batches):
            size = sum(map(len, batch))
            while waiting and (len(waiting) > 2 * processes.count or held + size > WAITING_BYTES):
                yield from _result(waiting[0][1], control)
                held -= waiting.popleft()[0]
            waiting.append((size, processes.submit(batch)))
            held += size
        while waiting:
            yield from _result(waiting.popleft()[1], control)


def _batches(rows: Iterable[Row]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for row in rows:
        batch.append(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
        size += len(batch[-1])
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _result(future: Future[list[Encoded | Dropped]], control: Control) -> list[Encoded | Dropped]:
    while True:
        control.check()
        try:
            return future.result(timeout=POLL_SECONDS)
        except NotYet:
            continue


class _Processes:
    """Processes that encode rows. They end with this one: their standard input closes."""

    def __init__(self, spec: RowSpec, count: int) -> None:
        self.count = count
        self._spec = spec
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encode")
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._all: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            # What was still to be written to it is lost, as meant.
            with contextlib.suppress(BrokenPipeError), process:
                pass

    def submit(self, batch: list[bytes]) -> Future[list[Encoded | Dropped]]:
        return self._threads.submit(self._ask, batch)

    def _ask(self, batch: list[bytes]) -> list[Encoded | Dropped]:
        """On a thread that has a process of its own."""
        process = getattr(self._mine, "process", None) or self._start()
        try:
            send(cast("IO[bytes]", process.stdin), batch)
            found: list[Encoded | Dropped] = receive(cast("IO[bytes]", process.stdout))
        except (EOFError, OSError) as error:
            raise _ended(process) from error
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise EOFError("the processes are closed")
            # One core each, so that all of them together don't start cores x cores threads.
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.training.encode_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            )
            self._all.append(process)
        self._mine.process = process
        try:
            send(cast("IO[bytes]", process.stdin), self._spec)
        except OSError as error:
            raise _ended(process) from error
        return process


def _ended(process: subprocess.Popen[bytes]) -> Exception:
    code = process.wait()
    if code == -signal.SIGKILL:
        return JobFailure(
            FailureCode.OUT_OF_MEMORY,
            "The system killed a process that prepared data, as it does when memory runs out.",
            "Give the worker's machine more memory, or split very long rows.",
        )
    return RuntimeError(f"a process that prepared data ended with code {code}")


def send(stream: IO[bytes], value: Any) -> None:
    message = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(len(message).to_bytes(_LENGTH))
    stream.write(message)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """What `send` wrote, in a process of the same job.

    Raises:
        EOFError: the other side is gone.
    """
    length = int.from_bytes(_exactly(stream, _LENGTH))
    return pickle.loads(_exactly(stream, length))  # noqa: S301 - over a pipe that only this job holds


def _exactly(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise EOFError
    return found
