"""Looking into uploaded files: small texts at once, all others in child processes.

Two at a time at most, and of each owner one after the other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from anyio import to_thread

from shared.data.inspect import inspect_file
from shared.database import Database
from shared.errors import DatasetError, NotFound
from shared.repository import files
from shared.storage import Store
from shared.tables import DatasetRow

CHILD = "api.inspect_dataset"
CHILD_SECONDS = 600.0
# Beside those, for each byte: a busy machine reads tiny rows at some 2 MB/s.
CHILD_SECONDS_PER_BYTE = 1e-6
AT_ONCE = 2
# What a child sees of the environment, which may hold the passwords of the database and of Redis.
ENVIRONMENT = frozenset({"PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """What was found in a file: a report, or why it can't be used."""

    format: str
    report: dict[str, Any] | None = None
    error: str | None = None

    @property
    def status(self) -> str:
        return "processed" if self.error is None else "error"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        return cls(**json.loads(text))


def inspect(path: Path, format_name: str) -> Finding:
    """Look into a file; one that can't be used is a finding too."""
    try:
        report = inspect_file(path, format_name)
    except DatasetError as error:
        return Finding(format_name, error=_message(error))
    return Finding(report.format, report.to_json())


class Inspector:
    """Looks into uploads in the background; an owner with many files holds up no other."""

    def __init__(self, database: Database, store: Store, folder: Path) -> None:
        self._database = database
        self._store = store
        self._folder = folder
        # An owner's files that wait, for as long as a task of that owner's takes them one by one.
        self._waiting: dict[str, deque[tuple[str, asyncio.Event]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # It lets owners in by turns.
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def start(self) -> None:
        """Begin, with the uploads that an earlier process left unchecked."""
        for row in await to_thread.run_sync(self._unchecked):
            self.add(row)

    async def stop(self) -> None:
        """End, together with children that are at work; their files are looked into at the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._waiting.clear()

    def add(self, row: DatasetRow) -> asyncio.Event:
        """Look into it when it is its turn; the event tells that this has been done."""
        done = asyncio.Event()
        if row.owner not in self._waiting:
            self._waiting[row.owner] = deque()
            task = asyncio.create_task(self._run(row.owner))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._waiting[row.owner].append((row.id, done))
        return done

    def _unchecked(self) -> list[DatasetRow]:
        with self._database.read() as session:
            return files.unchecked_datasets(session)

    async def _run(self, owner: str) -> None:
        waiting = self._waiting[owner]
        while waiting:
            dataset_id, done = waiting.popleft()
            try:
                async with self._slots:
                    await self._check(dataset_id)
            except Exception:
                # The boundary of one upload's inspection: the next ones must not wait for ever.
                logger.exception("Could not look into the dataset %s", dataset_id)
            done.set()
        del self._waiting[owner]

    async def _check(self, dataset_id: str) -> None:
        aside = self._folder / f"{dataset_id}.inspect"
        try:
            path, format_name = await to_thread.run_sync(self._fetch, dataset_id, aside)
            finding = await _inspect_in_child(path, format_name)
            await to_thread.run_sync(self._record, dataset_id, finding)
        except (NotFound, FileNotFoundError):
            logger.info("The dataset %s was deleted before it was looked into", dataset_id)
        finally:
            aside.unlink(missing_ok=True)

    def _fetch(self, dataset_id: str, aside: Path) -> tuple[Path, str]:
        with self._database.read() as session:
            row = files.get_dataset(session, dataset_id, None)
        return self._store.fetch(row.key, aside), row.format

    def _record(self, dataset_id: str, finding: Finding) -> None:
        with self._database.write() as session:
            files.set_checked(session, dataset_id, finding.format, finding.report, finding.error)


def child_environment(own: Mapping[str, str]) -> dict[str, str]:
    """What a child needs of this process' environment."""
    kept = {name: value for name, value in own.items() if name in ENVIRONMENT or name.startswith("LC_")}
    return kept | {"PYTHONUTF8": "1"}


async def _inspect_in_child(path: Path, format_name: str) -> Finding:
    size = await to_thread.run_sync(os.path.getsize, path)
    seconds = CHILD_SECONDS + CHILD_SECONDS_PER_BYTE * size
    start = asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        CHILD,
        str(path),
        format_name,
        cwd=Path(__file__).parents[2],
        env=child_environment(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    # A start that is cancelled half way would leave its pipes open.
    starting = asyncio.create_task(start)
    try:
        async with asyncio.timeout(seconds):
            process = await asyncio.shield(starting)
            output, complaints = await process.communicate()
    except TimeoutError:
        return Finding(format_name, error=f"The file could not be looked into in {seconds / 60:.0f} minutes.")
    finally:
        process = await starting
        if process.returncode is None:
            process.kill()
            # Its pipes have to end too: a loop that is closed before fails with them.
            await process.communicate()
    if process.returncode != 0:
        logger.error("Looking into %s failed: %s", path, complaints.decode(errors="replace")[-2000:])
        return Finding(
            format_name, error="The file could not be looked into: it needs too much memory or time."
        )
    return Finding.from_json(output)


def _message(error: DatasetError) -> str:
    text = str(error)
    if error.line is None or f"line {error.line}" in text.lower():
        return text
    return f"{text} (line {error.line})"
