"""Names of uploads, and what interrupted ones leave behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from api.services.uploads import STALE_SECONDS, display_name, sweep


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("a\x00b\x01c\x7f.jsonl", "abc.jsonl"),
        ("a\r\nSet-Cookie: x", "aSet-Cookie: x"),
        ("\u202egnp.exe", "gnp.exe"),
        ("../..\\x", "x"),
        ("\x00", "unnamed"),
        ("  ", "unnamed"),
    ],
)
def test_a_name_is_only_ever_shown(given: str, shown: str) -> None:
    assert display_name(given) == shown


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    long_ago = time.time() - STALE_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == [new]
