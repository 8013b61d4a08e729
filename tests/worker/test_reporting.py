"""Reporters with the real libraries, offline or into files; and with libraries that fail in every way."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from shared.database import Database
from shared.errors import JobStopped
from shared.events import MemorySink
from shared.queue import Doorbell
from shared.repository import files
from shared.spec import JobSpec
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_supervisor import child_pid, entries, read, wait_status
from worker import reporting as reporting_module
from worker.order import Order
from worker.reporting import reporter_environment, reporting

JOB = "ftjob-" + "0" * 24
SECRET = "s3cr3t-of-the-worker"
Attempt = Callable[..., MemorySink]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Runs one attempt of a job that tells these steps, with an evaluation of the last one."""
    count = 0

    def run(
        *report_to: str,
        steps: range = range(1, 4),
        given: dict[str, str] | None = None,
        wandb: dict[str, Any] | None = None,
    ) -> MemorySink:
        nonlocal count
        count += 1
        root = tmp_path / JOB / f"{count}-token"
        (root / "tmp").mkdir(parents=True)
        order = Order(JOB, "token", str(root), {}, reporting=given or {})
        asked = {"report_to": list(report_to), "name": "Tides", "lora": {"r": 8}, "wandb": wandb}
        spec = JobSpec.from_json(asked)
        sink = MemorySink()
        with reporting(order, spec, tmp_path / "data", sink) as told:
            row: dict[str, float | int | None] = {}
            for step in steps:
                row = {"step": step, "loss": 1.0 / step, "grad_norm": float("nan"), "tokens_per_second": None}
                told.metrics(row)
            told.metrics({**row, "eval_loss": 0.25})
        assert [r["step"] for r in sink.rows] == [*steps, steps[-1]]
        return sink

    return run


def warnings(sink: MemorySink) -> list[str]:
    return [entry.message for entry in sink.entries if entry.level == "warning"]


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the reporter's process find this in the place of wandb."""
    (folder / "fakes").mkdir()
    (folder / "fakes" / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder / "fakes"))


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a run's file: LevelDB's log format (blocks of 32 KiB; checksum, length, part) after
    seven bytes of its own."""
    content, at, data = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, part = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


def test_tensorboard_reads_all_attempts_as_one_run(attempt: Attempt, tmp_path: Path) -> None:
    first = attempt("tensorboard")
    assert warnings(first) == []
    (artifact,) = first.artifacts
    assert (artifact.name, artifact.kind) == ("tensorboard.tar", "tensorboard")
    time.sleep(1.1)  # TensorBoard orders event files by their second
    attempt("tensorboard", steps=range(3, 6))
    events = EventAccumulator(str(tmp_path / JOB / "reports" / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 0.5), (3, 0.333), (4, 0.25), (5, 0.2),
    ]  # fmt: skip
    assert [e.step for e in events.Scalars("eval/loss")] == [5]
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}


# MLflow's own reading of its database, and its word on folders.
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("place", ["sqlite:///{}/runs.db", "file:{}/runs"], ids=["database", "folder"])
def test_mlflow_goes_on_with_the_jobs_run(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the client below
    uri = place.format(tmp_path)
    given = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": "tides"}
    assert warnings(attempt("mlflow", given=given)) == []
    # A job that goes on tells its rows again.
    assert warnings(attempt("mlflow", steps=range(1, 6), given=given)) == []
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tides")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["lora.r"]) == ("Tides", "FINISHED", "8")
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [1, 2, 3, 4, 5]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "eval/loss")] == [3, 5]


def test_trackio_keeps_its_runs_in_the_data_folder(attempt: Attempt, tmp_path: Path) -> None:
    assert warnings(attempt("trackio")) == []
    assert warnings(attempt("trackio", steps=range(1, 6))) == []
    with sqlite3.connect(tmp_path / "data" / "reports" / "trackio" / "tuneyard.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()
    assert {row[0] for row in rows} == {f"Tides ({JOB})"}
    assert [row[1] for row in rows if "train/loss" in json.loads(row[2])] == [1, 2, 3, 4, 5]


def test_trackio_says_that_its_server_took_nothing(attempt: Attempt) -> None:
    given = {"TRACKIO_SERVER_URL": "http://127.0.0.1:1", "TRACKIO_WRITE_TOKEN": SECRET}
    (warning,) = warnings(attempt("trackio", given=given))
    assert "ConnectionError" in warning


def wandb_file(folder: Path) -> Path:
    (file,) = (folder / JOB / "reports" / "wandb").glob(f"wandb/offline-run-*-{JOB}/run-{JOB}.wandb")
    return file


def test_wandb_offline_keeps_a_run_under_the_jobs_id(attempt: Attempt, tmp_path: Path) -> None:
    assert warnings(attempt("wandb", given={"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET})) == []
    file = wandb_file(tmp_path)
    steps: dict[int, dict[str, Any]] = {}
    project = name = ""
    for record in wandb_records(file):
        if record.HasField("run"):
            project, name = record.run.project, record.run.display_name
        if record.HasField("history"):
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            steps[int(values["_step"])] = values
    assert (project, name) == ("tuneyard", "Tides")
    assert [steps[step]["train/loss"] for step in (1, 2)] == [1.0, 0.5]
    assert steps[3]["eval/loss"] == 0.25
    assert SECRET.encode() not in file.read_bytes()


def test_a_job_says_where_at_wandb_its_run_goes(attempt: Attempt, tmp_path: Path) -> None:
    asked = {"project": "harbours", "name": "high water", "entity": "tide-team", "tags": ["lora", "r8"]}
    given = {"WANDB_MODE": "offline", "WANDB_PROJECT": "the-workers", "WANDB_ENTITY": "the-workers"}
    assert warnings(attempt("wandb", given=given, wandb=asked)) == []
    (run, *_) = (r.run for r in wandb_records(wandb_file(tmp_path)) if r.HasField("run"))
    told = {"project": run.project, "name": run.display_name, "entity": run.entity, "tags": [*run.tags]}
    assert told == asked


def test_a_reporter_that_is_not_installed_is_one_warning(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')")
    (warning,) = warnings(attempt("wandb", "tensorboard"))
    assert "wandb" in warning
    assert "not installed" in warning


@pytest.mark.parametrize(
    "code",
    [
        f"raise RuntimeError('the key {SECRET} is refused')",
        f"def __getattr__(name): raise ConnectionError('https://me:{SECRET}@example.org is away')",
        f"import os; print('{SECRET}'); os._exit(7)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
    ids=["refused", "away", "gone", "killed"],
)
def test_a_reporter_that_fails_is_one_warning_without_its_words(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    fake(tmp_path, monkeypatch, code)
    sink = attempt("wandb", steps=range(1, 500), given={"WANDB_API_KEY": SECRET})
    assert wait_for(lambda: len(warnings(sink)) == 1)
    assert SECRET not in json.dumps([(e.message, e.data) for e in sink.entries])


def test_a_reporter_that_hangs_holds_up_nobody(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It had its time to begin: it is not given that of a run that only has to be sent.
    monkeypatch.setattr(reporting_module, "BEGINNING_SECONDS", 0.0)
    monkeypatch.setattr(reporting_module, "ROWS_AHEAD", 50)
    fake(tmp_path, monkeypatch, "import time; time.sleep(600)")
    began = time.monotonic()
    sink = attempt("wandb", steps=range(1, 20_000))
    assert time.monotonic() - began < 8
    (warning,) = warnings(sink)
    assert "steps are left out" in warning


def test_a_reporter_that_was_behind_is_told_of_the_end(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting_module, "ROWS_AHEAD", 50)
    code = f"""
import time
class Settings:
    def __init__(self, **settings): pass
class Run:
    def log(self, values, step): pass
    def finish(self, exit_code): open({str(tmp_path / "ended")!r}, "w").write(str(exit_code))
def init(**given):
    time.sleep(1.5)  # until all that it can be told is waiting
    return Run()
"""
    fake(tmp_path, monkeypatch, code)
    (warning,) = warnings(attempt("wandb", steps=range(1, 10_000)))
    assert "steps are left out" in warning
    assert (tmp_path / "ended").read_text() == "0"


def test_a_job_that_is_stopped_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "import time; time.sleep(600)")
    root = tmp_path / JOB / "1-token"
    (root / "tmp").mkdir(parents=True)
    spec = JobSpec.from_json({"report_to": ["wandb"]})
    sink = MemorySink()
    began = time.monotonic()
    with (
        pytest.raises(JobStopped),
        reporting(Order(JOB, "t", str(root), {}), spec, tmp_path, sink),
    ):
        raise JobStopped
    assert time.monotonic() - began < 3
    assert len(warnings(sink)) == 1


def test_each_reporter_gets_its_own_variables_alone() -> None:
    environment = {
        "WANDB_API_KEY": "a", "MLFLOW_TRACKING_PASSWORD": "b", "TRACKIO_X": "c", "HF_TOKEN": "d",
        "TUNEYARD_DATABASE_URL": "e", "PATH": "/bin",
    }  # fmt: skip
    assert reporter_environment((), environment) == {}
    assert reporter_environment(("tensorboard",), environment) == {}
    assert reporter_environment(("mlflow",), environment) == {"MLFLOW_TRACKING_PASSWORD": "b"}
    assert set(reporter_environment(("wandb", "trackio"), environment)) == {
        "WANDB_API_KEY", "TRACKIO_X", "HF_TOKEN",
    }  # fmt: skip
    assert "not-for-logs" not in repr(Order(JOB, "t", "w", {}, reporting={"WANDB_API_KEY": "not-for-logs"}))


def test_credentials_stay_with_the_reporter(
    start: Start, database: Database, doorbell: Doorbell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(forked=False)
    running = make_job(database, name="forever", report_to=["wandb"])
    doorbell.ring(running)
    pid = wait_for(lambda: child_pid(database, running))
    assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    start()
    job_id = make_job(database, name="succeed", report_to=["wandb", "tensorboard"])
    doorbell.ring(job_id)
    job = wait_status(database, job_id, "succeeded", "failed", seconds=40)
    assert job.status == "succeeded"
    with database.read() as session:
        names = [row.name for row in files.list_artifacts(session, job_id)]
    assert names == ["adapter.tar", "tensorboard.tar"]
    log = entries(database, job_id)
    assert [e.message for e in log if e.level == "warning"] == []
    told = json.dumps([(e.message, e.data) for e in log] + [read(database, job_id).model_dump(mode="json")])
    assert SECRET not in told
