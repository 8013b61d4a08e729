"""The end of an attempt, as the supervisor sees it: what becomes of its job and of its checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

from shared.database import Database
from shared.errors import LeaseLost
from shared.lifecycle import FailureCode
from shared.repository import leases
from worker.checkpoints import FOLDER, move_checkpoints
from worker.launch import Child

logger = logging.getLogger(__name__)


def settle(database: Database, child: Child, max_losses: int, *, asked: bool) -> bool:
    """The child has ended: if it did not end its job itself, give the job back.

    Args:
        asked: it ended because the supervisor asked it to.

    Returns:
        whether the child had ended its job itself.
    """
    code = child.exit_code()
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    words = child.last_words()
    why = f"The job's process ended unexpectedly ({how}{': ' + words if words else ''})."
    try:
        with database.write() as session:
            job = leases.owned_job(session, child.job_id, child.token)
            if asked:
                leases.give_back(session, job, "The worker asked it to stop.")
            else:
                leases.lose(session, job, why, max_losses)
    except LeaseLost:
        logger.info("Job %s: its process has ended it (%s)", child.job_id, how)
        return True
    logger.warning("Job %s: %s", child.job_id, why)
    return False


def keep_checkpoints(attempt: Path) -> bool:
    """Complete checkpoints outlive the attempt; the job's folder goes when the job is deleted.

    Returns:
        whether the attempt's folder holds none any more, and can be removed.
    """
    try:
        move_checkpoints(attempt / FOLDER, attempt.parent / FOLDER)
    except OSError as error:
        logger.error("The checkpoints in %s could not be put by yet: %s", attempt, error)
        return False
    return True


def time_out(database: Database, child: Child) -> None:
    """Fail the job of a child that has run for too long, and kill the child."""
    message = "The job ran for longer than its time_limit_seconds."
    advice = "Raise time_limit_seconds, or train on fewer samples, epochs or steps."
    try:
        with database.write() as session:
            job = leases.owned_job(session, child.job_id, child.token)
            leases.fail(session, job, FailureCode.TIMED_OUT, message, advice)
    except LeaseLost:
        logger.info("Job %s ended as its time ran out", child.job_id)
    child.kill()
