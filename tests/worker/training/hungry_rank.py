"""A rank that runs out of memory in its second step: `python -m tests.worker.training.hungry_rank`."""

from __future__ import annotations

from typing import Any

from worker.training.job_trainer import JobTrainer
from worker.training.rank import main

real = JobTrainer.training_step


def step(self: Any, *arguments: Any, **options: Any) -> Any:
    if self.state.global_step == 1:
        raise MemoryError("no room for 4 GiB")
    return real(self, *arguments, **options)


if __name__ == "__main__":
    JobTrainer.training_step = step
    main()
