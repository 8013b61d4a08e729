"""Python programs that load torch, forked from a process that has loaded it: seconds less for each.

They run as the command line that starts them says, with pipes, an environment and a folder of their own, and
end as processes end. That the same command lines start from nothing is for tests that don't use this.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace
from typing import IO, cast

import psutil

multiprocessing.set_forkserver_preload(["tests.worker.training.warm_stack"])
_CONTEXT: BaseContext = multiprocessing.get_context("forkserver")
# The first that asks takes a program's exit code off its pipe, and starting one asks of all others.
_LOCK = threading.RLock()


class Popen:
    """As much of `subprocess.Popen` as the worker and the pipeline use."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        assert command[0] == sys.executable
        assert text or stdin != subprocess.PIPE
        self.args = command
        self.stdin: IO[str] | None = None
        if stdin == subprocess.PIPE:
            read, write = os.pipe()
            self.stdin = io.TextIOWrapper(os.fdopen(write, "wb"), encoding="utf-8")
        else:
            read = os.open(os.devnull, os.O_RDONLY)
        outputs = [os.dup(out.fileno() if out else number) for number, out in ((1, stdout), (2, stderr))]
        begun, begins = _CONTEXT.Pipe(duplex=False)
        streams = [*(Connection(file) for file in (read, *outputs)), begins]
        where = str(cwd or Path.cwd())
        self._process = _CONTEXT.Process(
            target=_run,
            args=(streams, start_new_session, command[1:], dict(os.environ if env is None else env), where),
        )
        with _LOCK:
            self._process.start()
        for stream in streams:
            stream.close()
        # From here on it is in a session of its own.
        with begun, suppress(EOFError):
            begun.recv_bytes()
        self.pid = cast("int", self._process.pid)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with _LOCK:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        if (code := self.poll()) is None:
            connection.wait([self._process.sentinel], timeout)
            code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def kill(self) -> None:
        self._process.kill()


def fork_programs() -> SimpleNamespace:
    """What stands for the module `subprocess` in one that starts such programs."""
    return SimpleNamespace(
        Popen=Popen,
        PIPE=subprocess.PIPE,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )


def running() -> list[psutil.Process]:
    """Programs that were forked and haven't ended."""
    found = []
    with _LOCK:
        processes = multiprocessing.active_children()
    for process in processes:
        assert process.pid is not None
        found.append(psutil.Process(process.pid))
    return found


def _run(
    streams: list[Connection], session: bool, command: list[str], environment: dict[str, str], folder: str
) -> None:
    global _CONTEXT  # noqa: PLW0603
    # It has torch loaded itself, and what it starts is forked from it.
    _CONTEXT = multiprocessing.get_context("fork")
    if session:
        os.setsid()
    streams.pop().close()
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the process' own
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if command[0] == "-m":
        module, *sys.argv[1:] = command[1:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    isolated = command[0] == "-P"
    script, *arguments = command[isolated:]
    sys.argv = [script, *arguments]
    if not isolated:
        sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
