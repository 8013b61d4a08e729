"""What the commands print."""

from __future__ import annotations

import pytest
from rich.console import Console

from cli.render import Follower, log_line, table

HOSTILE = "a\x1b[2Jb\x07\x9b1A\rc"
SHOWN = "a\\x1b[2Jb\\x07\\x9b1A\\x0dc"


def test_what_others_wrote_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"time": "2026-01-01T10:11:12Z", "message": HOSTILE, "level": "info", "type": "message"}
    assert log_line(entry) == f"10:11:12  {SHOWN}"
    for terminal in (False, True):
        console = Console(force_terminal=terminal, width=200, color_system=None)
        table(console, ("name",), [(HOSTILE,)])
        Follower(console).show(entry)
        told = capsys.readouterr().out
        assert told.count(SHOWN) == 2, told
        assert not set("\x1b\x07\x9b\r") & set(told)
