"""The checkpoint folders of a job: complete or absent, and handed from one attempt to the next whole.

An attempt keeps its checkpoints in a folder of its own, WORK/JOB/ATTEMPT-TOKEN/checkpoints; between attempts
they lie in WORK/JOB/checkpoints. One that is called `checkpoint-STEP` is complete: it was written under
another name and renamed. It also goes, and changes hands, by being renamed. So a frozen attempt that wakes
up after the next one has taken its checkpoints over finds none of them: it can neither write into them nor
delete them.
"""

from __future__ import annotations

import errno
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

FOLDER = "checkpoints"
REMOVED = ".removed-"

_COMPLETE = re.compile(r"checkpoint-(\d{1,18})")


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the complete checkpoint of a step is, or would be."""
    return output / f"checkpoint-{step}"


def complete_checkpoints(output: Path) -> dict[int, Path]:
    """The folders of complete checkpoints by step, oldest first."""
    try:
        entries = list(output.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}  # Not made yet, or just removed.
    found = {int(match[1]): path for path in entries if (match := _COMPLETE.fullmatch(path.name))}
    return dict(sorted(found.items()))


def discard(checkpoint: Path) -> None:
    """Make a checkpoint absent at once, then remove its files; one that is gone already stays so."""
    aside = checkpoint.with_name(f"{REMOVED}{checkpoint.name}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def move_checkpoints(source: Path, target: Path) -> None:
    """Rename every complete checkpoint of one folder into another; where it has that step, it keeps its own.

    Two may move the same ones at a time, for several supervisors may share a box: neither ever removes what
    the other has moved.

    Raises:
        OSError: the disk is full or broken. What is not moved stays where it was.
    """
    for step, path in complete_checkpoints(source).items():
        while path.exists():
            target.mkdir(mode=0o700, exist_ok=True)
            try:
                path.rename(checkpoint_folder(target, step))
            except FileNotFoundError:
                continue  # Somebody else was quicker, or has just swept the empty target away.
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                discard(path)


def take_over(job: Path, target: Path) -> None:
    """Give one attempt everything that the attempts before it left, also those whose supervisor died too.

    Nothing of later ones: a supervisor that was frozen when it was about to start an attempt may go on when
    the next attempt has long been training.

    Args:
        job: the job's folder, with `checkpoints` and a folder for each attempt, ATTEMPT-TOKEN.
        target: the new attempt's own folder of checkpoints.

    Raises:
        OSError: as `move_checkpoints`.
    """
    kept = job / FOLDER
    number = _attempt_number(target.parent)
    earlier = [folder for folder in job.iterdir() if 0 < _attempt_number(folder) < number]
    # Attempts first: what a sweep moves out of one meanwhile is found in `kept` after that. The latest first:
    # of two checkpoints of one step the first stays.
    for attempt in sorted(earlier, key=_attempt_number, reverse=True):
        move_checkpoints(attempt / FOLDER, target)
    move_checkpoints(kept, target)
    for left in kept.glob(f"{REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)


def _attempt_number(folder: Path) -> int:
    """0 for a folder that is no attempt's."""
    number, _, token = folder.name.partition("-")
    return int(number) if token and number.isdecimal() else 0
