"""The client commands against a served API, with a worker whose pipeline trains nothing."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.demo import DATA
from shared.database import Database
from shared.device import Device
from shared.queue import Doorbell
from shared.repository import keys
from shared.settings import Settings
from shared.tables import WorkerRow
from tests.cli.command import run_command
from tests.cli.test_serve import Served
from tests.conftest import Databases, wait_for
from worker.supervisor import Supervisor

MODEL = "bundled/smollm2-135m-instruct"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[Settings]:
    """A served API and a supervisor with the fake pipeline, on one data folder."""
    folder = tmp_path_factory.mktemp("box") / "data"
    database_url = databases.create()
    served = Served(folder, database_url, "--no-worker", TUNEYARD_INFERENCE_MODELS="0")
    served.ready()
    settings = Settings(data_dir=folder, database_url=database_url, poll_seconds=0.2, standby="off")
    database, doorbell = Database(settings.database()), Doorbell(settings.redis())
    slot = Device("cpu", 0, "CPU", 8 << 30)
    supervisor = Supervisor(settings, database, doorbell, [slot], "tests.worker.fake_child")
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    yield settings
    supervisor.stop()
    thread.join(20)
    doorbell.close()
    database.close()
    served.process.terminate()
    served.process.wait(20)
    if served.process.stdout is not None:
        served.process.stdout.close()


@pytest.fixture(scope="module")
def tuneyard(box: Settings) -> Run:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
    environment["TUNEYARD_DATA_DIR"] = str(box.root)

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run_command(environment | more, *arguments)

    return run


def submit(tuneyard: Run, *arguments: str) -> str:
    done = tuneyard("submit", "--model", MODEL, "--dataset", str(DATA), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


@pytest.fixture(scope="module")
def finished(tuneyard: Run) -> str:
    """The id of a job that has succeeded."""
    followed = tuneyard("submit", "--model", MODEL, "--dataset", str(DATA), "--name", "succeed", "--follow")
    assert followed.returncode == 0, followed.stderr
    assert "Succeeded." in followed.stdout
    return followed.stdout.split()[0]


def test_submit_follow_list_show_and_download(tuneyard: Run, finished: str, tmp_path: Path) -> None:
    job_id = finished
    assert job_id in tuneyard("jobs", "--status", "succeeded").stdout
    shown = json.loads(tuneyard("show", job_id).stdout)
    assert shown["status"] == "succeeded"
    assert "Accepted" in tuneyard("logs", job_id).stdout
    assert "adapter.tar\tadapter" in tuneyard("artifacts", job_id).stdout
    done = tuneyard("download", job_id, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter.tar").read_bytes() == DATA.read_bytes()


def test_a_broken_off_download_goes_on_where_it_was(tuneyard: Run, finished: str, tmp_path: Path) -> None:
    whole = DATA.read_bytes()
    for partial in (whole[:1000], b"something else", whole + b"longer"):
        (tmp_path / "adapter.tar.part").write_bytes(partial)
        done = tuneyard("download", finished, "adapter.tar", "-o", str(tmp_path))
        if partial == b"something else":
            assert "damaged" in done.stderr
        else:
            assert (tmp_path / "adapter.tar").read_bytes() == whole


def test_a_spec_file_assignments_and_the_seeds_three_flags(tuneyard: Run, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps({"training": {"seed": 1, "max_steps": 5}}))
    flags = ("--max-samples", "7", "--merge", "--gguf", "q4_k_m", "--gguf", "q8_0")
    assigned = ("--set", "training.seed=9", "--set", "train_on=all")
    job_id = submit(tuneyard, "--spec", str(tmp_path / "spec.json"), *flags, *assigned)
    spec = json.loads(tuneyard("show", job_id).stdout)["spec"]
    assert spec["max_samples"] == 7
    assert spec["exports"] == ["adapter", "merged_16bit", "gguf:q4_k_m", "gguf:q8_0"]
    assert (spec["training"]["seed"], spec["training"]["max_steps"], spec["train_on"]) == (9, 5, "all")


def test_a_failed_job_makes_the_follower_fail(tuneyard: Run) -> None:
    done = tuneyard("submit", "--model", MODEL, "--dataset", str(DATA), "--name", "fail", "-f")
    assert done.returncode == 1
    assert "the pipeline broke" in done.stdout


def test_an_estimate_tabulates_the_plans_that_lost(tuneyard: Run, box: Settings) -> None:
    gpu = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 << 30, ("reference", "compiled", "unsloth"))
    database = Database(box.database())
    with database.write() as session:
        keys.put_worker(session, WorkerRow(id="gpus", hostname="other", slots=[gpu.to_json()]))
    said = tuneyard("estimate", "--set", "training.max_steps=5").stdout
    with database.write() as session:
        keys.remove_worker(session, "gpus")
    database.close()
    lines = [line.split("\t") for line in said.splitlines()]
    assert [cells[7] for cells in lines if cells[0] == "compiled" and cells[4] == "none"] == ["taken"]
    lost = next(
        cells for cells in lines if cells[0] == "unsloth" and cells[1] == "4bit" and cells[4] == "all"
    )
    assert lost[7].endswith("slower")


def test_an_estimate_says_why_something_is_not_known(tuneyard: Run, box: Settings) -> None:
    asked = ("estimate", "--model", MODEL, "--set", "max_seq_length=512")
    told = dict(line.split("\t") for line in tuneyard(*asked).stdout.splitlines()[:6])
    assert told["tokens an epoch"] == "not known before the hub's rows are read, which the job does"
    assert told["optimiser steps"].startswith("not known without the tokens")
    assert told["training time"] == "not known without the steps"
    assert told["peak memory"].endswith("iB")
    unknown = ("estimate", "--model", "somebody/else", "--set", "training.max_steps=3")
    told = dict(line.split("\t") for line in tuneyard(*unknown).stdout.splitlines()[:6])
    assert told["optimiser steps"] == "3"
    for what in ("training time", "peak memory"):
        assert told[what] == "not known: the model's config could not be read"
    assert told["disk"] == "not known without the model's size"


def test_pause_resume_and_cancel(tuneyard: Run) -> None:
    job_id = submit(tuneyard, "--name", "forever")
    assert tuneyard("pause", job_id).stdout.strip() in ("pausing", "paused")
    assert wait_for(lambda: json.loads(tuneyard("show", job_id).stdout)["status"] == "paused")
    refused = tuneyard("move", job_id, "--first")
    assert "only a queued one can be moved" in refused.stderr
    assert tuneyard("resume", job_id).stdout.strip() == "queued"
    assert tuneyard("cancel", job_id).stdout.strip() in ("cancelling", "cancelled")
    assert tuneyard("logs", "-f", job_id).returncode == 1
    assert json.loads(tuneyard("show", job_id).stdout)["status"] == "cancelled"


def test_estimate_and_datasets(tuneyard: Run) -> None:
    uploaded = tuneyard("datasets", "upload", str(DATA))
    dataset_id = uploaded.stdout.strip()
    said = tuneyard("estimate", "--model", MODEL, "--dataset", dataset_id).stdout
    assert "reference engine" in said
    assert "optimiser steps" in said
    assert "training time" in said
    assert dataset_id in tuneyard("datasets", "list").stdout
    assert json.loads(tuneyard("datasets", "show", dataset_id).stdout)["report"]["rows_used"] > 0
    assert tuneyard("datasets", "delete", dataset_id).returncode == 0
    assert tuneyard("datasets", "show", dataset_id).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "ftjob-" + "0" * 24), "job"),
        (("submit", "--set", "training.lr=1"), "training.lr"),
        (("submit", "--set", "nothing"), "FIELD=VALUE"),
        (("submit", "--set", "training.learning_rate=NaN"), "NaN is no number"),
        (("submit", "--dataset", "/nonexistent/rows.jsonl"), "There is no file"),
        (("jobs", "--status", "odd"), "status"),
        (("move", "ftjob-" + "0" * 24), "one of --first"),
        (("download", "ftjob-" + "0" * 24), "job"),
    ],
)
def test_a_refusal_is_one_clear_line(tuneyard: Run, arguments: tuple[str, ...], said: str) -> None:
    done = tuneyard(*arguments)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_data_set_is_refused_before_any_job(tuneyard: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"messages": []}\n' * 6 + "{broken\n")
    done = tuneyard("submit", "--dataset", str(tmp_path / "broken.jsonl"))
    assert done.returncode != 0
    assert "line 7" in done.stderr.lower()


def test_without_a_server_or_a_key_it_says_what_to_do(tuneyard: Run, tmp_path: Path) -> None:
    nobody = tuneyard("jobs", TUNEYARD_URL="http://127.0.0.1:1")
    assert nobody.returncode == 1
    assert "does not answer" in nobody.stderr
    keyless = tuneyard("jobs", TUNEYARD_DATA_DIR=str(tmp_path))
    assert "TUNEYARD_API_KEY" in keyless.stderr
    wrong = tuneyard("jobs", TUNEYARD_API_KEY="ty-wrong")
    assert wrong.returncode == 1
    assert "not known" in wrong.stderr


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("TUNEYARD_PORT", "abc", "TUNEYARD_PORT"),
        ("TUNEYARD_DATABASE_URL", "nonsense", "database"),
        ("TUNEYARD_DATA_DIR", "/proc/nobody", "/proc/nobody"),
    ],
)
def test_a_setting_that_cannot_be_is_one_clear_line(
    tuneyard: Run, setting: str, value: str, said: str
) -> None:
    done = tuneyard("keys", "list", **{setting: value})
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_proxy_in_the_environment_does_not_stand_between(tuneyard: Run) -> None:
    done = tuneyard("jobs", HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr


def test_export_makes_another_file_and_follows_it(tuneyard: Run, finished: str) -> None:
    done = tuneyard("export", finished, "gguf:q8_0", "--checkpoint", "3", "--follow")
    assert done.returncode == 0, done.stderr
    assert "Export of gguf:q8_0 of step 3 was asked for." in done.stdout
    assert "Claimed by worker" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("model-q8_0.step-3.gguf: ")
    again = tuneyard("export", finished, "gguf:q8_0", "--checkpoint", "3")
    assert again.stdout.startswith("model-q8_0.step-3.gguf: ")
    refused = tuneyard("export", finished, "gguf:q8_0", "--checkpoint", "4")
    assert refused.returncode == 1
    assert "no checkpoint of step 4" in refused.stderr
