from __future__ import annotations

import os
import time
from pathlib import Path

from shared.leftovers import leftovers


def test_only_what_nobody_has_written_to_for_long_is_left_over(tmp_path: Path) -> None:
    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "folder"
    folder.mkdir()
    for path in (old, new):
        path.write_bytes(b"x")
    long_ago = time.time() - 3 * 3600
    for path in (old, folder):
        os.utime(path, (long_ago, long_ago))
    assert leftovers(tmp_path, 2) == [old]
    assert leftovers(tmp_path, 4) == []
    assert leftovers(tmp_path / "absent", 2) == []
