"""One reporter, in a process of its own: `python -m worker.reporter NAME`.

Standard input has one JSON object a line: first the run, then rows of metrics, last how the job ended; its
end without that means that the job's process is gone. Standard output has a word once the run has begun, and
then what goes wrong, by the name of the error alone: what it says may hold a password or a key.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

DEFAULT_PROJECT = "tuneyard"
MODULES = {"wandb": "wandb", "tensorboard": "tensorboardX", "mlflow": "mlflow", "trackio": "trackio"}
PARAMETERS_AT_ONCE = 100
# Of names of metrics (`train/loss`), and of tags that say up to which step a run holds them.
GROUPS = ("train", "eval")
TOLD = "tuneyard.told."
# What a reporter says once its run has begun.
BEGUN = "begun"

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
    """A run that has been begun, or gone on with.

    `told` has the last step of each group (`train`, `eval`) that the run holds from earlier attempts: a job
    that goes on tells all of its rows again, and a run that adds them up must get them once. It is empty
    where a step that comes again takes the place of the first.
    """

    told: dict[str, int]

    def log(self, values: dict[str, float], step: int) -> None: ...

    def end(self, ending: Ending) -> None: ...


class Wandb:
    """Weights & Biases: the run's id is the job's. Without a network (WANDB_MODE=offline) it is kept as a
    folder, which `wandb sync` uploads."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.told: dict[str, int] = {}
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

        self.told: dict[str, int] = {}
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
    """A run with the job's id as a tag, by which a later attempt finds it, and how far it was told."""

    def __init__(self, run: Run) -> None:
        # MLflow itself refuses folders (`file:/…`) otherwise; whoever names one wants it.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
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
        self.told: dict[str, int] = {}
        if found:
            self._id = found[0].info.run_id
            steps = {group: found[0].data.tags.get(f"{TOLD}{group}") for group in GROUPS}
            self.told = {group: int(step) for group, step in steps.items() if step}
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"tuneyard.job": run.job_id}
        self._id = self._client.create_run(experiment_id, run_name=run.title, tags=tags).info.run_id
        parameters = [Param(key, str(value)[:500]) for key, value in run.config.items()]
        for at in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[at : at + PARAMETERS_AT_ONCE])

    def log(self, values: dict[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(k, v, now, step) for k, v in values.items()]
        tags = [RunTag(f"{TOLD}{group}", str(step)) for group in {_group(name) for name in values}]
        self._client.log_batch(self._id, metrics=metrics, tags=tags)

    def end(self, ending: Ending) -> None:
        # One that was stopped may go on, and is running again then.
        status = {"succeeded": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[ending]
        self._client.set_terminated(self._id, status)


class Trackio:
    """A run by the job's name and id; in a folder for all jobs of the box, or where TRACKIO_… says."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("TRACKIO_DIR", f"{run.shared}/trackio")
        import trackio

        self._trackio = trackio
        self._project = os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT)
        begun = trackio.init(
            project=self._project,
            name=run.job_id if run.title == run.job_id else f"{run.title} ({run.job_id})",
            resume="allow",
            config=run.config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        # Here or on a server: nothing public tells of both.
        last = begun._next_step - 1
        # The evaluation of the last step may not have come.
        self.told = {"train": last, "eval": last - 1}

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def end(self, ending: Ending) -> None:  # noqa: ARG002 - it knows no ending
        from trackio.sqlite_storage import SQLiteStorage

        self._trackio.finish()
        # It keeps what a server did not take, for the next job, and raises nothing.
        if SQLiteStorage.has_pending_data(self._project):
            raise ConnectionError


DESTINATIONS: dict[str, Callable[[Run], Destination]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def main() -> None:
    """Report until the job has ended."""
    lines, told = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    # Processes that libraries start must not keep the pipes open: whoever writes there would wait for them.
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what libraries print
    try:
        _report(sys.argv[1], lines, told)
    except BaseException as error:
        told.write(_word(error, MODULES[sys.argv[1]]))
        told.flush()
        raise
    # Threads of a library may wait for a server that is away.
    sys.stderr.flush()
    os._exit(0)


def _report(name: str, lines: IO[str], words: IO[str]) -> None:
    run = Run(**json.loads(lines.readline()))
    Path(run.folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    Path(run.shared).mkdir(parents=True, exist_ok=True, mode=0o700)
    destination = DESTINATIONS[name](run)
    words.write(f"{BEGUN}\n")
    words.flush()
    ending: Ending = "stopped"
    for line in lines:
        told = json.loads(line)
        if "end" in told:
            ending = cast("Ending", told["end"])
            break
        step = told["step"]
        new = {k: v for k, v in told["values"].items() if step > destination.told.get(_group(k), 0)}
        if new:
            destination.log(new, step)
    destination.end(ending)


def _group(name: str) -> str:
    return name.partition("/")[0]


def _word(error: BaseException, module: str) -> str:
    missing = isinstance(error, ModuleNotFoundError) and error.name == module
    return "not installed" if missing else type(error).__name__


if __name__ == "__main__":
    main()
