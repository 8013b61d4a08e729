"""What running children are asked to do, and what happens to those who don't."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shared.clock import utcnow
from shared.database import Database
from shared.lifecycle import TERMINAL, JobStatus, Phase
from shared.repository import leases
from shared.settings import Settings
from worker.launch import Child
from worker.settle import time_out

# Phases in which a child that is asked to leave has something to keep.
CHECKPOINTED = frozenset({Phase.TRAINING, Phase.EVALUATING})


def heed_requests(database: Database, children: Sequence[Child], settings: Settings) -> None:
    """Stop children whose job is cancelled, paused, out of time or no longer theirs; kill the late ones."""
    running = [child for child in children if child.exit_code() is None]
    if not running:
        return
    with database.read() as session:
        found = leases.holders(session, [child.job_id for child in running])
    for child in running:
        holder = found.get(child.job_id)
        phase = holder.phase if holder else None
        if holder is None or holder.token != child.token:
            # Ended, deleted or another's: whatever it still does is dropped. One that has ended its job
            # itself is on its way out.
            if holder is None or holder.status not in TERMINAL:
                child.kill()
            child.ask_to_stop()
        elif holder.status == JobStatus.CANCELLING:
            child.ask_to_stop()
        elif child.deadline is not None and utcnow() > child.deadline:
            time_out(database, child)
        elif holder.status == JobStatus.PAUSING:
            child.ask_to_leave()
        if _is_overdue(child, phase, settings.stop_grace_seconds):
            child.kill()


def _is_overdue(child: Child, phase: Phase | None, grace_seconds: float) -> bool:
    """Whether it had its time to stop by itself. The end of a training step is waited for."""
    if child.stop_asked_at is not None:
        return time.monotonic() - child.stop_asked_at > grace_seconds
    if child.leave_asked_at is None or phase in CHECKPOINTED:
        return False
    return time.monotonic() - child.leave_asked_at > grace_seconds
