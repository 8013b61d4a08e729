"""The `tuneyard` command as a process that starts from nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import run_command

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


@pytest.mark.parametrize("command", [["worker"], ["inference"], ["keys", "list"], ["gc"]])
def test_a_database_that_can_not_be_used_is_told_in_one_line(command: list[str], tmp_path: Path) -> None:
    settings = {"TUNEYARD_DATA_DIR": str(tmp_path), "TUNEYARD_DATABASE_URL": "none"}
    done = run_command(os.environ | settings, *command)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The database can't be used: Could not parse SQLAlchemy URL")
    assert done.stderr.count("\n") == 1
