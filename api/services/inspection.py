"""Looking into uploaded files: small ones at once, large ones one by one in a child process."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from anyio import to_thread

from shared.data.inspect import inspect_file
from shared.database import Database
from shared.errors import DatasetError, NotFound
from shared.repository import files
from shared.storage import Store

CHILD = "api.inspect_dataset"
CHILD_SECONDS = 3600.0

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
    """Looks into uploads in the background, one at a time."""

    def __init__(self, database: Database, store: Store, folder: Path) -> None:
        self._database = database
        self._store = store
        self._folder = folder
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin, with the uploads that an earlier process left unchecked."""
        for dataset_id in await to_thread.run_sync(self._unchecked):
            self._waiting.put_nowait(dataset_id)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End, together with a child that is at work; its file is looked into at the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def add(self, dataset_id: str) -> None:
        self._waiting.put_nowait(dataset_id)

    def _unchecked(self) -> list[str]:
        with self._database.read() as session:
            return [row.id for row in files.unchecked_datasets(session)]

    async def _run(self) -> None:
        while True:
            dataset_id = await self._waiting.get()
            try:
                await self._check(dataset_id)
            except Exception:
                # The boundary of one upload's inspection: the next ones must not wait for ever.
                logger.exception("Could not look into the dataset %s", dataset_id)

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


async def _inspect_in_child(path: Path, format_name: str) -> Finding:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        CHILD,
        str(path),
        format_name,
        cwd=Path(__file__).parents[2],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CHILD_SECONDS):
            output, complaints = await process.communicate()
    except TimeoutError:
        return Finding(format_name, error="The file could not be looked into in an hour.")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
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
