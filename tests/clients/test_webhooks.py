"""Webhooks with the official client: registered, signed, tried again, checked with `unwrap`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.clients.conftest import MODEL, ROWS, Box
from tests.clients.receiver import Receiver, receiver
from tests.conftest import wait_for

EVENTS: list[Any] = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as opened:
        yield opened


@pytest.fixture
def client(box: Box) -> Iterator[openai.OpenAI]:
    with box.client(box.eve) as opened:
        yield opened


def start(client: openai.OpenAI, suffix: str) -> str:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix=suffix).id


def test_an_end_is_told_signed_and_again_until_it_is_taken(
    client: openai.OpenAI, box: Box, hook: Receiver
) -> None:
    made = client.webhooks.create(name="ci", url=hook.url, event_types=EVENTS)
    with box.client(box.bob) as bob:
        others = bob.webhooks.create(name="bob", url=f"{hook.url}&bob", event_types=EVENTS)
    hook.statuses = [500, 302, 200]
    job_id = start(client, "succeed")
    wait_for(lambda: len(hook.taken) == 3)
    for headers, body in hook.taken:
        event = client.webhooks.unwrap(body, headers, secret=made.signing_secret)
        assert event.type == "fine_tuning.job.succeeded"
        assert event.data.id == job_id
        assert headers["webhook-id"] == event.id
        assert headers["host"] == f"127.0.0.1:{hook.port}"
    assert len({headers["webhook-id"] for headers, _ in hook.taken}) == 1
    headers, body = hook.taken[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers, secret=made.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=others.signing_secret)
    assert wait_for(lambda: client.webhooks.retrieve(made.id).model_extra == {"last_error": None})
    failed, cancelled = start(client, "fail"), start(client, "forever")
    wait_for(lambda: client.fine_tuning.jobs.retrieve(cancelled).status == "running")
    client.fine_tuning.jobs.cancel(cancelled)
    wait_for(lambda: len(hook.taken) == 5)
    told = [json.loads(body) for _, body in hook.taken[3:]]
    assert [(event["type"], event["data"]["id"]) for event in told] == [
        ("fine_tuning.job.failed", failed),
        ("fine_tuning.job.cancelled", cancelled),
    ]
    assert client.webhooks.delete(made.id).deleted
    with box.client(box.bob) as bob:
        assert bob.webhooks.delete(others.id).deleted


def test_registering(box: Box, hook: Receiver) -> None:
    with box.client(box.eve, _strict_response_validation=True) as client, box.client(box.bob) as bob:
        assert client.webhooks.event_types.list().data == EVENTS
        made = client.webhooks.create(name="one", url=hook.url, event_types=EVENTS[:1])
        assert made.signing_secret.startswith("whsec_")
        assert [found.id for found in client.webhooks.list(limit=1)] == [made.id]
        assert "signing_secret" not in client.webhooks.retrieve(made.id).to_dict()
        assert client.webhooks.update(made.id, name="two", event_types=EVENTS).name == "two"
        tested = client.webhooks.test(made.id, event_type=EVENTS[1])
        assert (tested.status_code, tested.event_type) == (200, EVENTS[1])
        rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        client.webhooks.test(made.id, event_type=EVENTS[0])
        headers, body = hook.taken[-1]
        for secret in (made.signing_secret, rotated.signing_secret):
            assert client.webhooks.unwrap(body, headers, secret=secret).type == EVENTS[0]
        last = client.webhooks.rotate_secret(made.id)
        client.webhooks.test(made.id, event_type=EVENTS[0])
        headers, body = hook.taken[-1]
        client.webhooks.unwrap(body, headers, secret=last.signing_secret)
        for secret in (made.signing_secret, rotated.signing_secret):
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.unwrap(body, headers, secret=secret)
        for call in (
            lambda: bob.webhooks.retrieve(made.id),
            lambda: bob.webhooks.update(made.id, name="x"),
            lambda: bob.webhooks.rotate_secret(made.id),
            lambda: bob.webhooks.test(made.id, event_type=EVENTS[0]),
            lambda: bob.webhooks.delete(made.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.BadRequestError) as wrong:
            client.webhooks.create(name="x", url="ftp://example.org", event_types=EVENTS)
        assert wrong.value.param == "url"
        with pytest.raises(openai.BadRequestError):
            client.webhooks.create(name="x", url=hook.url, event_types=["batch.failed"])
        assert client.webhooks.delete(made.id).deleted


def test_a_webhook_that_nobody_answers_is_told_of(client: openai.OpenAI) -> None:
    made = client.webhooks.create(name="gone", url="http://127.0.0.1:9/", event_types=EVENTS)
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.test(made.id, event_type=EVENTS[0])
    assert caught.value.code == "webhook_unreachable"
    start(client, "succeed")
    wait_for(lambda: (client.webhooks.retrieve(made.id).model_extra or {})["last_error"])
    client.webhooks.delete(made.id)


def test_the_command_line(box: Box, hook: Receiver) -> None:
    def tuneyard(*arguments: str) -> str:
        environment = {"TUNEYARD_URL": box.url, "TUNEYARD_API_KEY": box.eve}
        done = CliRunner().invoke(app, ["webhooks", *arguments], env=environment)
        assert done.exit_code == 0, done.output
        return done.stdout

    secret = tuneyard("create", hook.url, "--event", "succeeded").splitlines()[-1]
    headers = {"Authorization": f"Bearer {box.eve}"}
    (made,) = httpx.get(f"{box.url}/v1/webhook_endpoints", headers=headers).json()["data"]
    assert made["event_types"] == EVENTS[:1]
    assert secret.startswith(made["signing_secret_hint"].removesuffix("…"))
    listed = tuneyard("list")
    assert made["id"] in listed
    assert secret not in listed
    assert "200" in tuneyard("test", made["id"])
    tuneyard("delete", made["id"])
    assert made["id"] not in tuneyard("list")
