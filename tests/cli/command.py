"""The `tuneyard` command in a process that has imported everything already, which takes a second."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cli.main import main

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def run_command(
    environment: dict[str, str], *arguments: str, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `tuneyard` with these arguments in this environment, and nothing else of ours."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = _processes.Process(target=_run, args=(environment, arguments, output, errors))
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, seconds, output.read_text(), errors.read_text())
        process.close()
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


def _run(environment: dict[str, str], arguments: tuple[str, ...], output: Path, errors: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in ((sys.stdout, output), (sys.stderr, errors)):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    sys.argv = ["tuneyard", *arguments]
    main()
