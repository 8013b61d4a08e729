"""The commands that start processes: serve, api, worker, inference."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import InvalidRequest
from shared.settings import Settings, ensure_private_dir

Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder for the database, uploads and artifacts.")]
Workers = Annotated[int | None, typer.Option(min=1, help="At most this many jobs at once.")]
# `serve` holds the other end: when it is gone, however it ended, its children end too.
WatchStdin = Annotated[bool, typer.Option(hidden=True)]


def serve(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    workers: Workers = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Only the API: jobs wait.")] = False,
) -> None:
    """Start everything on this box: database, queue, API and a worker."""
    from cli.tree import ProcessTree

    settings = _settings(host=host, port=port, data_dir=data_dir)
    tree = ProcessTree(settings, workers=workers, with_worker=not no_worker)
    _on_signal(tree.stop)
    try:
        url = tree.start()
        if url is not None:
            key = settings.local_key_file
            print(
                f'Tuneyard is ready at {url} - try: curl -H "Authorization: Bearer $(cat {key})" {url}/jobs',
                flush=True,
            )
            tree.watch()
    finally:
        tree.close()


def api(
    host: Host = None,
    port: Port = None,
    fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    watch_stdin: WatchStdin = False,
) -> None:
    """Start the API alone."""
    # What is imported and built until it serves stays: to look through it for garbage takes a sixth of the
    # start, and would hold up a request for 50 ms now and then.
    gc.disable()
    from api.app import create_app
    from api.server import Server

    _log_to_stderr()
    settings = _settings(host=host, port=port)
    ensure_private_dir(settings.root)
    server = Server(create_app(settings), settings)
    if watch_stdin:
        _end_with_parent()
    gc.freeze()
    gc.enable()
    server.run(sockets=[socket.socket(fileno=fd)] if fd is not None else None)


def worker(
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="Only these GPUs; default all.")] = None,
    workers: Workers = None,
    watch_stdin: WatchStdin = False,
) -> None:
    """Start the supervisor of this box: one slot per GPU, or one on the CPU where there is none."""
    from cli.database import opened_database
    from shared.queue import Doorbell
    from worker.gpus import find_slots, with_share
    from worker.supervisor import Supervisor

    _log_to_stderr()
    settings = Settings()
    slots = with_share(find_slots(_gpu_numbers(gpus), workers), settings.gpu_memory_fraction)
    with opened_database(settings) as database:
        doorbell = Doorbell(settings.redis())
        supervisor = Supervisor(settings, database, doorbell, slots)
        _on_signal(supervisor.stop)
        if watch_stdin:
            _end_with_parent()
        logging.getLogger("worker").info("Slots: %s", ", ".join(slot.name for slot in slots))
        supervisor.run()
        doorbell.close()


def inference(watch_stdin: WatchStdin = False) -> None:
    """Start the process that answers from finished models, for the API on this machine."""
    from cli.database import database_errors
    from worker.inference.service import Service

    _log_to_stderr()
    settings = Settings()
    ensure_private_dir(settings.root)
    with database_errors():
        service = Service(settings)
        _on_signal(service.stop)
        if watch_stdin:
            _end_with_parent()
        asyncio.run(service.run())


def _settings(**given: object) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _gpu_numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest("--gpus takes numbers between commas, as in 0,1.") from None


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _on_signal(stop: Callable[[], None]) -> None:
    """Stop on SIGINT and SIGTERM. On a thread: what stops takes locks that the main thread may hold."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=stop).start())


def _end_with_parent() -> None:
    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()
