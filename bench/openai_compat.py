"""How near `/v1` is to OpenAI's API: route by route, field by field, by the official client's own types.

    python -m bench.openai_compat

starts a server and a worker of its own, trains the bundled model for two steps, makes every call that the
client has for fine-tuning, files, uploads, models, answers and webhooks, and holds each answer's JSON against
the type that the client declares for it. A field that is missing or of another type without a reason in
`bench/openai_reasons.py` ends it with exit code 1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pydantic
from openai.types import (
    Completion,
    FileDeleted,
    FileObject,
    Model,
    ModelDeleted,
    Upload,
    completion_create_params,
    file_create_params,
    file_list_params,
    upload_complete_params,
    upload_create_params,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent, job_create_params, job_list_params
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart
from openai.types.webhooks import (
    DeletedWebhookEndpoint,
    WebhookEndpoint,
    WebhookEndpointTestResult,
    WebhookEndpointWithSecret,
    WebhookEventTypeList,
    webhook_create_params,
)

from bench.openai_reasons import ABSENT, DIFFERENT, NULL, ROUTES_ABSENT

MODEL = "bundled/smollm2-135m-instruct"
ROW = '{"messages":[{"role":"user","content":"%s"},{"role":"assistant","content":"%s %d"}]}\n'
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}
TIDE = {"type": "function", "function": {"name": "get_tide", "parameters": PLACE}}
SHORT = {
    "max_seq_length": 128,
    "exports": ["adapter", "gguf:q8_0"],
    "training": {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "eval_steps": 2},
}
MISSING = "not in the answer"
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Line:
    """One line of the table. `verdict` is same, different, absent, more (than OpenAI has), or WRONG."""

    route: str
    field: str
    verdict: str
    why: str = ""


def compare(
    route: str, kind: type[pydantic.BaseModel], value: dict[str, Any], prefix: str = ""
) -> Iterator[Line]:
    """The JSON of an answer against the client's type for it, strictly, with what lies inside."""
    for name, field in kind.model_fields.items():
        key, place = f"{kind.__name__}.{name}", prefix + name
        if name not in value:
            yield _line(route, place, key, "absent" if key in ABSENT else "WRONG", MISSING)
            continue
        try:
            adapter = pydantic.TypeAdapter(field.annotation)
            adapter.validate_json(json.dumps(value[name]), strict=True)
        except pydantic.ValidationError as error:
            errors = error.errors()
            if key not in NULL or any(found["input"] is not None for found in errors):
                yield Line(route, place, "WRONG", str(errors[0]["msg"]))
                continue
            yield Line(route, place, "different", NULL[key])
        else:
            yield _line(route, place, key, "different" if key in DIFFERENT else "same")
        inner, content = _model_in(field.annotation), value[name]
        content = content[0] if isinstance(content, list) and content else content
        if inner is not None and isinstance(content, dict):
            yield from compare(route, inner, content, f"{place}.")
    for name in sorted(set(value) - set(kind.model_fields)):
        yield Line(route, prefix + name, "more", "Tuneyard's own")


def parameters(route: str, kind: Any, called: str = "", known: Any = None) -> Iterator[Line]:
    """The fields of a request, from the client's type for it.

    Args:
        called: the type's name in the tables above, where another one has the same.
        known: the type of a like request, for what both have means the same.
    """
    for name in kind.__annotations__:
        shared = known is not None and name in known.__annotations__
        key = f"{'Chat' if shared else called or kind.__name__}.{name}"
        verdict = "absent" if key in ABSENT else "different" if key in DIFFERENT else "same"
        yield _line(route, f"(sent) {name}", key, verdict)


def probe(client: openai.OpenAI, hook_url: str, wait: Callable[[str], None]) -> list[Line]:
    """Make every call and compare every answer.

    Args:
        client: with a key that has no webhooks yet.
        hook_url: answers to POST.
        wait: returns when the job with this id has ended.
    """
    calls = _Calls(client)
    lines = [
        *parameters("POST /fine_tuning/jobs", job_create_params.JobCreateParams),
        *parameters("GET /fine_tuning/jobs", job_list_params.JobListParams),
        *parameters("POST /files", file_create_params.FileCreateParams),
        *parameters("GET /files", file_list_params.FileListParams),
        *parameters("POST /uploads", upload_create_params.UploadCreateParams),
        *parameters("POST /uploads/{id}/complete", upload_complete_params.UploadCompleteParams),
        *parameters("POST /webhook_endpoints", webhook_create_params.WebhookCreateParams),
        *parameters("POST /chat/completions", chat_params.CompletionCreateParamsBase, "Chat"),
        *parameters(
            "POST /completions",
            completion_create_params.CompletionCreateParamsBase,
            "Text",
            chat_params.CompletionCreateParamsBase,
        ),
        *_files(calls),
        *_uploads(calls),
        *_jobs(calls, wait),
        *_webhooks(calls, hook_url),
    ]
    lines += [Line(route, "", "absent", why) for route, why in ROUTES_ABSENT.items()]
    return lines


class _Calls:
    """Makes calls by path, as the client sends them, and compares the JSON that comes back."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.client = client
        self.last: Any = None

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer as it came."""
        answer = self.client.with_options(max_retries=0)._client.request(
            method, f"{self.client.base_url}{path}", headers=self.client.auth_headers, **options
        )
        answer.raise_for_status()
        return answer

    def __call__(
        self, method: str, path: str, kind: Any, *, listed: bool = False, **options: Any
    ) -> Iterator[Line]:
        self.last = self.send(method, path, **options).json()
        route = f"{method} /{re.sub(r'(ftjob-|file-|upload_|we_)[^/]+|ft:.+', '{id}', path)}"
        if not listed:
            yield from compare(route, kind, self.last)
            return
        for name, wanted in (("object", "list"), ("has_more", None)):
            right = name in self.last and wanted in (None, self.last[name])
            yield Line(route, name, "same" if right else "WRONG")
        yield from compare(route, kind, self.last["data"][0], "data[].")


def _files(calls: _Calls) -> Iterator[Line]:
    for purpose, content in (("fine-tune", _rows("hi", 16)), ("user_data", "anything")):
        form = {"purpose": purpose, "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        yield from calls("POST", "files", FileObject, data=form, files={"file": ("rows.jsonl", content)})
    yield from calls("GET", f"files/{calls.last['id']}", FileObject)
    yield from calls("DELETE", f"files/{calls.last['id']}", FileDeleted)
    yield from calls("GET", "files?limit=1&order=asc&purpose=fine-tune", FileObject, listed=True)


def _uploads(calls: _Calls) -> Iterator[Line]:
    body = {"bytes": 4, "filename": "x", "mime_type": "text/plain", "purpose": "user_data"}
    yield from calls("POST", "uploads", Upload, json=body)
    upload = calls.last["id"]
    yield from calls("POST", f"uploads/{upload}/parts", UploadPart, files={"data": b"abcd"})
    parts = {"part_ids": [calls.last["id"]]}
    yield from calls("POST", f"uploads/{upload}/complete", Upload, json=parts)
    yield from calls("POST", "uploads", Upload, json=body)
    yield from calls("POST", f"uploads/{calls.last['id']}/cancel", Upload)


def _jobs(calls: _Calls, wait: Callable[[str], None]) -> Iterator[Line]:
    made = [
        calls.client.files.create(file=("r.jsonl", _rows(word, 16).encode()), purpose="fine-tune").id
        for word in ("train", "held out")
    ]
    body = {"model": MODEL, "training_file": made[0], "validation_file": made[1], "suffix": "succeed"}
    yield from calls("POST", "fine_tuning/jobs", FineTuningJob, json=body | SHORT)
    job = calls.last["id"]
    yield from calls("GET", "fine_tuning/jobs", FineTuningJob, listed=True)
    wait(job)
    yield from calls("GET", f"fine_tuning/jobs/{job}", FineTuningJob)
    name = calls.last["fine_tuned_model"]
    yield from calls("GET", f"fine_tuning/jobs/{job}/events", FineTuningJobEvent, listed=True)
    yield from calls("GET", f"fine_tuning/jobs/{job}/checkpoints", FineTuningJobCheckpoint, listed=True)
    yield from calls("GET", "models", Model, listed=True)
    yield from calls("GET", f"models/{name}", Model)
    yield from _answers(calls, name)
    yield from calls("DELETE", f"models/{name}", ModelDeleted)
    # The tests' worker never ends a job of this name by itself.
    yield from calls("POST", "fine_tuning/jobs", FineTuningJob, json=body | SHORT | {"suffix": "forever"})
    job = calls.last["id"]
    for line in calls("POST", f"fine_tuning/jobs/{job}/pause", FineTuningJob):
        # The client's type doesn't name this status; the reason is given.
        key = "FineTuningJob.status"
        yield line if line.field != "status" else _line(line.route, "status", key, "different")
    while calls.client.fine_tuning.jobs.retrieve(job).status == "pausing":
        time.sleep(0.05)
    for word in ("resume", "cancel"):
        yield from calls("POST", f"fine_tuning/jobs/{job}/{word}", FineTuningJob)


def _answers(calls: _Calls, name: str) -> Iterator[Line]:
    # After two calls the smallest model makes a third.
    said = [turn for city in ("Oslo", "Rome") for turn in _call(city)]
    messages = [*said, {"role": "user", "content": "Tide in Cork?"}]
    asked = {"model": name, "messages": messages, "tools": [TIDE], "temperature": 0, "max_tokens": 60}
    yield from calls("POST", "chat/completions", ChatCompletion, json=asked)
    yield from _stream(calls, "chat/completions", ChatCompletionChunk, asked)
    asked = {"model": name, "prompt": "hi", "max_tokens": 4}
    yield from calls("POST", "completions", Completion, json=asked)
    yield from _stream(calls, "completions", Completion, asked)


def _call(city: str) -> list[dict[str, Any]]:
    call = {"name": "get_tide", "arguments": json.dumps({"city": city})}
    return [
        {"role": "user", "content": f"Tide in {city}?"},
        {"role": "assistant", "tool_calls": [{"id": f"call-{city}", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": f"call-{city}", "content": "2 m"},
        {"role": "assistant", "content": "2 m."},
    ]


def _stream(calls: _Calls, path: str, kind: Any, asked: dict[str, Any]) -> Iterator[Line]:
    """The events of a stream against one type: a line for each field, the worst that was found of it."""
    body = asked | {"stream": True, "stream_options": {"include_usage": True}}
    text = calls.send("POST", path, json=body).text
    found: dict[str, Line] = {}
    for event in (json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")):
        for line in compare(f"POST /{path} (stream)", kind, event):
            # One that some events have and others have not is there.
            if line.field not in found or _weight(line) > _weight(found[line.field]):
                found[line.field] = line
    yield from found.values()


def _weight(line: Line) -> int:
    there = line.verdict != "absent" and line.why != MISSING
    return there + (there and line.verdict == "WRONG")


def _webhooks(calls: _Calls, hook_url: str) -> Iterator[Line]:
    yield from calls("GET", "webhook_event_types", WebhookEventTypeList)
    body = {"name": "x", "url": hook_url, "event_types": ["fine_tuning.job.succeeded"]}
    yield from calls("POST", "webhook_endpoints", WebhookEndpointWithSecret, json=body)
    path = f"webhook_endpoints/{calls.last['id']}"
    yield from calls("GET", path, WebhookEndpoint)
    yield from calls("POST", path, WebhookEndpoint, json={"name": "y"})
    yield from calls("GET", "webhook_endpoints", WebhookEndpoint, listed=True)
    yield from calls("POST", f"{path}/rotate_secret", WebhookEndpointWithSecret, json={})
    event = {"event_type": "fine_tuning.job.succeeded"}
    yield from calls("POST", f"{path}/test", WebhookEndpointTestResult, json=event)
    yield from calls("DELETE", path, DeletedWebhookEndpoint)


def _rows(word: str, count: int) -> str:
    return "".join(ROW % (word, word, n) for n in range(count))


def _line(route: str, place: str, key: str, verdict: str, otherwise: str = "") -> Line:
    return Line(route, place, verdict, DIFFERENT.get(key) or ABSENT.get(key) or otherwise)


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The model that an Optional or a List holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TUNEYARD_WEBHOOK_PRIVATE": "true", "TUNEYARD_STANDBY": "off"}
        command = [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--data-dir", f"{folder}/data"]
        served = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert served.stdout is not None
            found = re.search(r"ready at (\S+)", served.stdout.readline())
            assert found, "the server did not start"
            key = Path(folder, "data", "local.key").read_text().strip()
            client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key=key)
            # It answers to POST, with a 404, as well as any.
            lines = probe(client, f"{found[1]}/nothing", lambda job: _wait(client, job))
        finally:
            served.terminate()
            served.wait()
    print("| route | field | | why |\n|---|---|---|---|")
    for line in lines:
        print(f"| {line.route} | {line.field} | {line.verdict} | {line.why} |")
    counts = Counter(line.verdict for line in lines)
    print(f"\nopenai {openai.__version__}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    return 1 if counts["WRONG"] else 0


def _wait(client: openai.OpenAI, job: str) -> None:
    while client.fine_tuning.jobs.retrieve(job).status not in ENDED:
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
