"""One reporter, in a process of its own: `python -m worker.reporter NAME`.

Standard input has one JSON object a line: first the run, then rows of metrics, last how the job ended; its
end without that means that the job's process is gone. What goes wrong is told on standard output by the name
of the error alone: what an error says may hold an address with a password, or a key.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

DEFAULT_PROJECT = "tuneyard"
MODULES = {"wandb": "wandb", "tensorboard": "tensorboardX", "mlflow": "mlflow", "trackio": "trackio"}
PARAMETERS_AT_ONCE = 100

Ending = Literal["succeeded", "failed", "stopped"]


@dataclass(frozen=True)
class Run:
    """What the reporter is told of the job.

    `config` is the spec, flat (`lora.r`), and `wandb` its part of that name. `folder` is the job's own,
    `shared` one for all jobs of the box.
    """

    job_id: str
    title: str
    config: dict[str, Any]
    folder: str
    shared: str
    wandb: dict[str, Any]


class Destination(Protocol):
    """A run that has been begun, or gone on with."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def end(self, ending: Ending) -> None: ...


class Wandb:
    """Weights & Biases: the run's id is the job's. Without a network (WANDB_MODE=offline) it is kept as a
    folder, which `wandb sync` uploads."""

    def __init__(self, run: Run) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            entity=run.wandb.get("entity"),
            project=run.wandb.get("project") or os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            name=(run.wandb.get("name") or run.title)[:128],
            tags=run.wandb.get("tags"),
            id=run.job_id,
            resume="allow",
            config=run.config,
            dir=os.environ.get("WANDB_DIR", run.folder),
            settings=settings,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def end(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "succeeded" else 1)


class Tensorboard:
    """Event files in the job's folder; an attempt that goes on adds one, and takes back what it does anew."""

    def __init__(self, run: Run) -> None:
        import tensorboardX

        self._open = tensorboardX.SummaryWriter
        self._run = run
        self._writer: Any = None

    def log(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._open(self._run.folder, purge_step=step, flush_secs=10)
            self._writer.add_text("job", json.dumps(self._run.config, indent=2), step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, ending: Ending) -> None:  # noqa: ARG002 - event files have no ending
        if self._writer is not None:
            self._writer.close()


class Mlflow:
    """A run that carries the job's id as a tag, by which a later attempt finds it."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.shared}/mlflow.db")
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([experiment_id], f"tags.`tuneyard.job` = '{run.job_id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"tuneyard.job": run.job_id}
        self._id = self._client.create_run(experiment_id, run_name=run.title, tags=tags).info.run_id
        parameters = [Param(key, str(value)[:500]) for key, value in run.config.items()]
        for at in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[at : at + PARAMETERS_AT_ONCE])

    def log(self, values: dict[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def end(self, ending: Ending) -> None:
        if ending != "stopped":
            self._client.set_terminated(self._id, "FINISHED" if ending == "succeeded" else "FAILED")


class Trackio:
    """A run by the job's name and id; in a folder for all jobs of the box, or where TRACKIO_… says."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("TRACKIO_DIR", f"{run.shared}/trackio")
        import trackio

        self._trackio = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
            name=run.job_id if run.title == run.job_id else f"{run.title} ({run.job_id})",
            resume="allow",
            config=run.config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def end(self, ending: Ending) -> None:  # noqa: ARG002 - it knows no ending
        self._trackio.finish()


DESTINATIONS: dict[str, Callable[[Run], Destination]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def main() -> None:
    """Report until the job has ended."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    try:
        _report(sys.argv[1])
    except BaseException as error:
        told.write(_word(error, MODULES[sys.argv[1]]))
        told.flush()
        raise
    # Threads of a library may wait for a server that is away.
    sys.stderr.flush()
    os._exit(0)


def _report(name: str) -> None:
    run = Run(**json.loads(sys.stdin.readline()))
    Path(run.folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    Path(run.shared).mkdir(parents=True, exist_ok=True, mode=0o700)
    destination = DESTINATIONS[name](run)
    ending: Ending = "stopped"
    for line in sys.stdin:
        told = json.loads(line)
        if "end" in told:
            ending = cast("Ending", told["end"])
            break
        destination.log(told["values"], told["step"])
    destination.end(ending)


def _word(error: BaseException, module: str) -> str:
    missing = isinstance(error, ModuleNotFoundError) and error.name == module
    return "not installed" if missing else type(error).__name__


if __name__ == "__main__":
    main()
