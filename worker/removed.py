"""What retention tells of each thing that it removes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Removed:
    """Something that was removed, or would be: of which job, if it is a job's, and how much."""

    what: str
    job_id: str | None
    why: str
    bytes: int
