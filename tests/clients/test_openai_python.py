"""The official Python client, unchanged but for its base_url, against a running server."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.clients.conftest import MODEL, ROWS, Box
from tests.conftest import wait_for

ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture
def strict(box: Box) -> Iterator[openai.OpenAI]:
    """A client that raises where an answer is not of the type that it declares."""
    with box.client(_strict_response_validation=True) as opened:
        yield opened


@pytest.fixture
def training_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def finished(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    found: list[FineTuningJob] = []

    def look() -> bool:
        found[:] = [client.fine_tuning.jobs.retrieve(job_id)]
        return found[0].status in ENDED

    wait_for(look)
    return found[0]


def test_a_job_from_upload_to_results(strict: openai.OpenAI) -> None:
    file = strict.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert strict.files.wait_for_processing(file.id, poll_interval=0.05).status == "processed"
    job = strict.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="succeed",
        seed=7,
        metadata={"team": "search"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5}
            },
        },
        extra_body={"max_seq_length": 512, "lora": {"r": 8}},
    )
    assert job.status in ("queued", "running")
    job = finished(strict, job.id)
    assert job.status == "succeeded"
    assert job.fine_tuned_model == f"ft:{MODEL}:ann:succeed:{job.id.removeprefix('ftjob-')}"
    assert job.hyperparameters.to_dict() == {
        "n_epochs": 2,
        "batch_size": 6,
        "learning_rate_multiplier": 0.5,
    }
    assert (job.seed, job.training_file, job.organization_id) == (7, file.id, "ann")
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    own = job.model_extra["tuneyard"] if job.model_extra else {}
    assert own["spec"]["lora"]["r"] == 8
    assert own["spec"]["training"]["gradient_accumulation_steps"] == 3
    results = strict.files.retrieve(job.result_files[0])
    assert results.purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(strict.files.content(results.id).text)))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0]) == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert float(rows[1]["train_loss"]) == 0.5
    (checkpoint,) = strict.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-3"
    assert (checkpoint.metrics.step, checkpoint.fine_tuning_job_id) == (3, job.id)


def test_auto_is_shown_as_what_it_came_to(client: openai.OpenAI, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=training_file,
        hyperparameters={"n_epochs": "auto", "batch_size": "auto"},
    )
    # 20 rows: five times is a hundred.
    shown = {"n_epochs": 5, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert job.hyperparameters.to_dict() == shown
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.to_dict() == shown


def test_one_job_is_one_job_on_both_faces(box: Box, client: openai.OpenAI, training_file: str) -> None:
    made = client.fine_tuning.jobs.create(model=MODEL, training_file=training_file, suffix="succeed both")
    headers = {"Authorization": f"Bearer {box.ann}"}
    with httpx.Client(base_url=box.url, headers=headers) as own:
        assert own.get(f"/jobs/{made.id}").json()["spec"]["name"] == "succeed both"
        other = own.post("/jobs", json={"model": MODEL, "max_seq_length": 512}).json()
        assert client.fine_tuning.jobs.retrieve(other["id"]).training_file.startswith("hub:glaiveai/")
        assert own.get(f"/datasets/{training_file}").json()["status"] == "processed"
        uploaded = own.post("/datasets", files={"file": ("r.jsonl", ROWS)}).json()["id"]
        assert client.files.retrieve(uploaded).purpose == "fine-tune"
        client.fine_tuning.jobs.cancel(other["id"])
        assert own.get(f"/jobs/{other['id']}").json()["status"] in ("cancelling", "cancelled")


def test_pause_resume_and_cancel(client: openai.OpenAI, training_file: str) -> None:
    jobs = client.fine_tuning.jobs
    running = jobs.create(model=MODEL, training_file=training_file, suffix="forever")
    waiting = jobs.create(model=MODEL, training_file=training_file, suffix="succeed after it")
    assert jobs.pause(waiting.id).status == "paused"
    assert jobs.resume(waiting.id).status == "queued"
    assert jobs.cancel(running.id).status == "cancelled"
    assert finished(client, waiting.id).status == "succeeded"
    assert wait_for(lambda: jobs.retrieve(running.id).finished_at)


def test_a_failed_job_says_why(client: openai.OpenAI, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=training_file, suffix="fail")
    job = finished(client, job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "internal_error"
    assert "broke" in job.error.message
    assert (job.fine_tuned_model, job.trained_tokens, job.result_files) == (None, None, [])
    levels = [event.level for event in client.fine_tuning.jobs.list_events(job.id)]
    assert levels[0] == "error"


def test_lists_are_paged_by_the_client(box: Box, training_file: str) -> None:
    with box.client(_strict_response_validation=True) as client:
        jobs = client.fine_tuning.jobs
        made = [
            jobs.create(model=MODEL, training_file=training_file, metadata={"page": "er"}).id
            for _ in range(5)
        ]
        assert [job.id for job in jobs.list(limit=2, metadata={"page": "er"})] == made[::-1]
        events = list(jobs.list_events(made[0], limit=1))
        assert len({event.id for event in events}) == len(events) >= 1
        files = [client.files.create(file=b"x", purpose="vision").id for _ in range(3)]
        assert [f.id for f in client.files.list(purpose="vision", limit=1)] == files[::-1]
        assert [f.id for f in client.files.list(purpose="vision", limit=2, order="asc")] == files
        for job_id in made:
            jobs.cancel(job_id)
        for file_id in files:
            assert client.files.delete(file_id).deleted


@pytest.mark.anyio
async def test_the_async_client(box: Box) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{box.url}/v1", api_key=box.ann, _strict_response_validation=True
    ) as client:
        file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        assert (await client.files.wait_for_processing(file.id, poll_interval=0.05)).status == "processed"
        job = await client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="succeed")
        listed = [found.id async for found in client.fine_tuning.jobs.list(limit=1)]
        assert job.id in listed
        assert (await client.fine_tuning.jobs.cancel(job.id)).status in ENDED
        upload = await client.uploads.upload_file_chunked(
            file=ROWS, filename="a.jsonl", bytes=len(ROWS), mime_type="text/jsonl", purpose="fine-tune"
        )
        assert upload.status == "completed"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_an_upload_in_parts(strict: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(ROWS * 50)
    done = strict.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=20_000
    )
    assert done.status == "completed"
    assert done.file is not None
    assert strict.files.content(done.file.id).content == path.read_bytes()
    assert strict.files.wait_for_processing(done.file.id, poll_interval=0.05).status == "processed"
    begun = strict.uploads.create(bytes=4, filename="x", mime_type="text/plain", purpose="user_data")
    assert strict.uploads.cancel(begun.id).status == "cancelled"


def test_models(strict: openai.OpenAI, training_file: str) -> None:
    job = strict.fine_tuning.jobs.create(model=MODEL, training_file=training_file, suffix="succeed")
    name = finished(strict, job.id).fine_tuned_model
    assert name is not None
    listed = {model.id: model.owned_by for model in strict.models.list()}
    assert listed[name] == "ann"
    assert listed[MODEL] == "bundled"
    assert strict.models.retrieve(MODEL).id == MODEL
    assert strict.models.retrieve(f"{name}:ckpt-step-3").owned_by == "ann"
    assert strict.models.delete(name).deleted
    assert name not in [model.id for model in strict.models.list()]
    with pytest.raises(openai.NotFoundError):
        strict.models.retrieve(name)
    # The record stays.
    assert strict.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


def bad_calls(client: openai.OpenAI) -> dict[type[openai.APIStatusError], Any]:
    jobs = client.fine_tuning.jobs
    gone = "file-" + "0" * 24
    return {
        openai.BadRequestError: lambda: jobs.create(model=MODEL, training_file=gone),
        openai.NotFoundError: lambda: jobs.retrieve("ftjob-" + "0" * 24),
        openai.PermissionDeniedError: lambda: client.models.delete(MODEL),
    }


def test_errors_are_the_clients_classes(client: openai.OpenAI, training_file: str) -> None:
    for kind, call in bad_calls(client).items():
        with pytest.raises(kind) as caught:
            call()
        error = caught.value
        assert error.request_id
        assert error.response.headers["x-should-retry"] == "false"
        assert error.message
        assert isinstance(error.code, str)
    with pytest.raises(openai.BadRequestError) as invalid:
        client.fine_tuning.jobs.create(model=MODEL, training_file="file-" + "0" * 24)
    assert (invalid.value.param, invalid.value.code) == ("training_file", "dataset_not_found")
    with pytest.raises(openai.BadRequestError) as method:
        client.fine_tuning.jobs.create(model=MODEL, training_file=training_file, method={"type": "dpo"})
    assert (method.value.param, method.value.code) == ("method.type", "unsupported_method")


def test_a_key_that_is_wrong(box: Box) -> None:
    with box.client("ty-wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_conflict_is_not_tried_again(box: Box, training_file: str) -> None:
    with box.client(max_retries=5) as client:
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=training_file, suffix="succeed")
        assert finished(client, job.id).status == "succeeded"
        with pytest.raises(openai.ConflictError) as caught:
            client.fine_tuning.jobs.cancel(job.id)
    # The client counts its tries in this header.
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"


def test_what_is_anns_is_not_bobs(box: Box, client: openai.OpenAI, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=training_file, suffix="succeed")
    name = finished(client, job.id).fine_tuned_model
    upload = client.uploads.create(bytes=4, filename="x", mime_type="text/plain", purpose="user_data")
    with box.client(box.bob) as bob:
        for call in (
            lambda: bob.files.retrieve(training_file),
            lambda: bob.files.content(training_file),
            lambda: bob.files.delete(training_file),
            lambda: bob.fine_tuning.jobs.retrieve(job.id),
            lambda: bob.fine_tuning.jobs.cancel(job.id),
            lambda: bob.fine_tuning.jobs.list_events(job.id),
            lambda: bob.fine_tuning.jobs.checkpoints.list(job.id),
            lambda: bob.models.retrieve(str(name)),
            lambda: bob.models.delete(str(name)),
            lambda: bob.uploads.parts.create(upload.id, data=b"x"),
            lambda: bob.uploads.complete(upload.id, part_ids=["part_x"]),
            lambda: bob.uploads.cancel(upload.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.BadRequestError):
            bob.fine_tuning.jobs.create(model=MODEL, training_file=training_file)
        assert list(bob.files.list()) == []
        assert name not in [model.id for model in bob.models.list()]
    client.uploads.cancel(upload.id)
