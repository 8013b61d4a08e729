"""A rank that dies when all are ready to meet: `python -m tests.worker.training.late_rank`."""

from __future__ import annotations

import os

from worker.training import rank

if __name__ == "__main__":
    rank.join_group = lambda *_: os._exit(7)  # type: ignore[assignment]
    rank.main()
