"""The `tuneyard` command, forked from a process that has imported everything already.

That is not multiprocessing's fork server: Python has one for all, and tests that train have it load torch.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from cli import tree
from cli.main import main

ROOT = Path(__file__).parents[2]
LOADED = (tree,)  # what commands would import as they run
OUTPUT = os.O_WRONLY | os.O_CREAT


def run_command(
    environment: dict[str, str], *arguments: str, seconds: int = 60
) -> subprocess.CompletedProcess[str]:
    """Run `tuneyard` with these arguments in this environment, and nothing else of ours."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([environment, arguments, str(output), str(errors), seconds]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(arguments, seconds, output.read_text(), errors.read_text())
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Fork a process for each order that comes, and say the exit code; return in the forked one alone."""
    gc.freeze()  # what a collection looks at, a forked process copies
    while order := sys.stdin.readline():
        child = os.fork()
        if not child:
            _become(*json.loads(order))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(
    environment: dict[str, str], arguments: list[str], output: str, errors: str, seconds: int
) -> None:
    signal.alarm(seconds)
    os.environ.clear()
    os.environ.update(environment)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, output, OUTPUT), (2, errors, OUTPUT)):
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["tuneyard", *arguments]


if __name__ == "__main__":
    _serve()
    main()
