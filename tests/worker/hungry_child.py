"""The real child with the real pipeline, whose third step runs out of memory under the first plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shared.events import Artifact, EventSink, TrainingControl
from shared.plan import Plan
from shared.spec import JobSpec
from worker.child import export, main, train, warm_up
from worker.training.job_trainer import JobTrainer
from worker.training.workdir import Workdir


def pipeline(
    spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: TrainingControl
) -> list[Artifact]:
    if plan.micro_batch == spec.training.per_device_train_batch_size:
        _run_out_of_memory_in_step(3)
    return train(spec, plan, workdir, sink, control)


def _run_out_of_memory_in_step(number: int) -> None:
    real: Callable[..., Any] = JobTrainer.training_step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == number - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has less.")
        return real(self, *arguments, **options)

    JobTrainer.training_step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    main(pipeline, export, warm_up)
