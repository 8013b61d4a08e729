"""The `tuneyard` command as a process that starts from nothing."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import atexit, sys
from cli.main import main
atexit.register(lambda: print([m for m in ("sqlalchemy", "fastapi", "redis", "pyarrow") if m in sys.modules]))
sys.argv = ["tuneyard", "jobs"]
main()
"""


def test_a_command_that_asks_a_server_loads_nothing_of_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"TUNEYARD_URL": "http://127.0.0.1:1", "TUNEYARD_API_KEY": "ty-any"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert done.stderr.startswith("Error: http://127.0.0.1:1 does not answer")
