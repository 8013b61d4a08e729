"""A small disk of the run's own, which can be filled: a tmpfs in a mount namespace that ends with the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# In the environment of the run in its namespace: the one that it came from.
OUTSIDE = "TUNEYARD_CHAOS_OUTSIDE"
NAMESPACE = Path("/proc/self/ns/mnt")
BALLAST = "ballast"


def enter_namespace() -> None:
    """Start this program again where it may mount, if this machine lets it; nothing is ever left mounted."""
    tool = shutil.which("unshare")
    if OUTSIDE in os.environ or tool is None:
        return
    command = [tool, "--mount"] if os.getuid() == 0 else [tool, "--user", "--map-root-user", "--mount"]
    probe = [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        os.environ[OUTSIDE] = str(NAMESPACE.readlink())
        os.execv(tool, [*command, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])  # noqa: S606 - this program


def mount_small_disk(folder: Path, megabytes: int) -> bool:
    """Whether the folder is a disk of that size now."""
    if os.environ.get(OUTSIDE, str(NAMESPACE.readlink())) == str(NAMESPACE.readlink()):
        return False
    options = f"size={megabytes}m,mode=700"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(folder: Path) -> None:
    """Leave not one byte."""
    with (folder / BALLAST).open("ab", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            while True:
                try:
                    file.write(bytes(piece))
                except OSError:
                    break


def empty(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)
