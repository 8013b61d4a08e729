"""Files that an upload left behind when its process was killed."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path


def leftovers(folder: Path, hours: float) -> list[Path]:
    """The files in the folder that nobody has written to for so long."""
    found = []
    for path in sorted(folder.glob("*")):
        with suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < time.time() - hours * 3600:
                found.append(path)
    return found
