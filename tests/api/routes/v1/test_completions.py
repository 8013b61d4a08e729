"""Chat and text completions with OpenAI's own client, from a real model behind a running server."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from tests.api.conftest import error_of
from tests.api.routes.v1.conftest import TEMPLATE, Box
from tests.samples import bundled_gguf

TIDE = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model(box: Box) -> Iterator[str]:
    """The name of a model with the functioncall style, with an inference process that serves it."""
    box.start()
    yield box.job(bundled_gguf(), name="tides")
    box.stop()


def test_without_the_inference_process_the_answer_says_who_starts_it(box: Box) -> None:
    refusal = error_of(chat(box, box.job(bundled_gguf())), 503)
    assert refusal["code"] == "inference_unavailable"
    assert "tuneyard inference" in refusal["message"]


@pytest.fixture(scope="module")
def client(box: Box) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{box.live.url}/v1", api_key=box.keys["ann"], max_retries=0) as client:
        yield client


def strictly(kind: type[BaseModel], value: Any) -> Any:
    """The value as the client's own type, which it must fit: no field missing, ill-typed or unknown."""
    found = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    check_no_extra(found)
    return found


def check_no_extra(value: Any) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, (type(value), value.model_extra)
        for name in type(value).model_fields:
            check_no_extra(getattr(value, name))
    for item in value if isinstance(value, list) else ():
        check_no_extra(item)


def post(box: Box, path: str, body: dict[str, Any], owner: str = "ann") -> httpx.Response:
    headers = {"Authorization": f"Bearer {box.keys[owner]}"}
    return httpx.post(f"{box.live.url}{path}", json=body, headers=headers, timeout=60)


def chat(box: Box, model: str, owner: str = "ann", **body: Any) -> httpx.Response:
    asked = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 8} | body
    return post(box, "/v1/chat/completions", asked, owner)


def test_an_answer_fits_the_clients_types_and_its_counts_are_true(box: Box, model: str) -> None:
    body = chat(box, model, max_tokens=6).json()
    answer = strictly(ChatCompletion, body)
    assert answer.model == model
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (6, answer.usage.prompt_tokens + 6)
    again = strictly(ChatCompletion, chat(box, model, max_tokens=6).json())
    # All but the token that its answer goes on from.
    assert again.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
    assert again.system_fingerprint == answer.system_fingerprint
    assert (
        chat(box, model, max_tokens=6, seed=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    )
    longer = chat(box, model, max_tokens=1, messages=[{"role": "user", "content": "What is the capital of"}])
    # " France" and "?"
    assert longer.json()["usage"]["prompt_tokens"] == answer.usage.prompt_tokens - 2


def test_a_stream_says_the_same_in_openais_events(box: Box, model: str) -> None:
    whole = chat(box, model).json()["choices"][0]["message"]["content"]
    answer = chat(box, model, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    chunks = [strictly(ChatCompletionChunk, json.loads(line[6:])) for line in lines[:-2]]
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {last.id}
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_the_client_streams_and_stops_at_a_stop_text(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model,
        messages=[{"role": "user", "content": "Count: one two three"}],
        temperature=0,
        stop=["e", "!"],
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content
    assert not {"e", "!"} & set(final.choices[0].message.content)


@pytest.mark.anyio
async def test_the_asynchronous_client_gets_both_at_once(box: Box, model: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{box.live.url}/v1", api_key=box.keys["ann"], max_retries=0
    ) as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(
                model=model,
                messages=QUESTION,
                temperature=0,
                max_completion_tokens=8,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        whole = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0,
            max_tokens=8,
        )
        text, answer = await asyncio.gather(streamed(), whole)
        assert text == answer.choices[0].message.content


def test_a_text_goes_on_without_the_template(client: openai.OpenAI, box: Box, model: str) -> None:
    asked = {"model": model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 2}
    answer = strictly(Completion, post(box, "/v1/completions", asked).json())
    assert answer.choices[0].text == " Paris."
    assert answer.usage.prompt_tokens == 5
    *parts, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in parts) == " Paris."
    # Null up to the end, as OpenAI's own: what the client's type says of it is no stream's.
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last.usage is not None
    assert (last.choices, last.usage.completion_tokens) == ([], 2)


def test_a_prompt_is_one_text(box: Box, model: str) -> None:
    prompts: list[Any] = ["", ["a", "b"], [1, 2]]
    for prompt in prompts:
        refusal = error_of(post(box, "/v1/completions", {"model": model, "prompt": prompt}), 400)
        assert refusal["param"] == "prompt"


def test_a_seed_makes_an_answer_come_again(box: Box, model: str) -> None:
    said = [
        chat(box, model, temperature=1.5, top_p=0.9, seed=seed).json()["choices"][0]["message"]["content"]
        for seed in (7, 7, 8)
    ]
    assert said[0] == said[1] != said[2]


def tides(*cities: str) -> list[dict[str, Any]]:
    """A conversation in which each question was answered with a call."""
    messages: list[dict[str, Any]] = []
    for number, city in enumerate(cities):
        messages.append({"role": "user", "content": f"Tide in {city}?"})
        function = {"name": "get_tide", "arguments": json.dumps({"city": city})}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": "2 m"})
        messages.append({"role": "assistant", "content": "2 m."})
    return messages


@pytest.fixture(scope="module")
def template_model(box: Box, model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a model whose own template writes calls."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "template.jinja").write_text(TEMPLATE)
    command = "from gguf.scripts.gguf_new_metadata import main; main()"
    options = ["--chat-template-file", str(folder / "template.jinja")]
    files = [str(bundled_gguf()), str(folder / "model.gguf")]
    subprocess.run(
        [sys.executable, "-c", command, *files, *options], check=True, capture_output=True, timeout=60
    )
    return box.job(folder / "model.gguf", chat_template="model", tool_call_style="template")


@pytest.mark.parametrize("style", ["functioncall", "template"])
def test_calls_come_back_as_tool_calls(
    request: pytest.FixtureRequest, client: openai.OpenAI, box: Box, style: str
) -> None:
    name = request.getfixturevalue("model" if style == "functioncall" else "template_model")
    messages = [*tides("Oslo", "Rome"), {"role": "user", "content": "Tide in Cork?"}]
    asked: dict[str, Any] = {"messages": messages, "tools": [TIDE], "max_tokens": 60}
    answer = strictly(ChatCompletion, chat(box, name, **asked).json())
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_tide", {"city": "Cork"})
    with client.chat.completions.stream(model=name, temperature=0, **asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Cork"}
    # What the client got goes back as it is.
    history = [
        *messages,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "3 m"},
    ]
    assert chat(box, name, messages=history, tools=[TIDE], max_tokens=2).status_code == 200


def test_without_tools_on_offer_a_call_is_text(box: Box, model: str) -> None:
    messages = [*tides("Oslo", "Rome"), {"role": "user", "content": "Tide in Cork?"}]
    answer = chat(box, model, messages=messages, max_tokens=12, tools=[TIDE], tool_choice="none").json()
    assert answer["choices"][0]["message"]["content"].startswith("<functioncall> {")
    assert answer["choices"][0]["finish_reason"] == "length"


def test_control_tokens_that_somebody_types_are_words(box: Box, model: str) -> None:
    def count(text: str) -> int:
        asked = chat(box, model, messages=[{"role": "user", "content": text}], max_tokens=1)
        tokens: int = asked.json()["usage"]["prompt_tokens"]
        return tokens

    # As one token each they would add 2.
    assert count("hi<|im_end|><|im_start|>") - count("hi") > 8
    prompt = {"model": model, "prompt": "<|im_end|>", "max_tokens": 1}
    assert post(box, "/v1/completions", prompt).json()["usage"]["prompt_tokens"] > 4


def test_a_second_inference_process_is_refused_and_harms_nothing(box: Box, model: str) -> None:
    command = [sys.executable, "-m", "cli.main", "inference"]
    done = subprocess.run(
        command, env=box.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Another `tuneyard inference` already runs" in done.stderr
    assert box.settings.inference_socket().parent.stat().st_mode & 0o777 == 0o700
    assert chat(box, model, max_tokens=1).status_code == 200


def test_only_the_owner_and_an_admin_may_ask(box: Box, model: str) -> None:
    refusal = error_of(chat(box, model, "bob"), 404)
    assert refusal["code"] == "model_not_found"
    absent = error_of(chat(box, model.replace(":ann:", ":bob:"), "bob"), 404)
    assert absent["code"] == "model_not_found"
    assert chat(box, model, "root", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "name", ["gpt-4o", "bundled/smollm2-135m-instruct", "../../etc/passwd", "ft:a:b:c:d", "ftjob-" + "0" * 24]
)
def test_what_is_no_finetuned_model_is_not_found(box: Box, model: str, name: str) -> None:
    assert error_of(chat(box, name), 404)["param"] == "model"


def test_a_job_without_a_gguf_says_how_to_get_one(client: openai.OpenAI, box: Box, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="gguf:q4_k_m") as caught:
        client.chat.completions.create(model=box.job(None), messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("no_gguf", "model")
    refusal = error_of(chat(box, f"{model}:ckpt-step-5"), 400)
    assert '"checkpoint": 5' in refusal["message"]


def test_a_job_id_and_a_checkpoint_name_models_too(box: Box, model: str) -> None:
    assert chat(box, "ftjob-" + model.rsplit(":", 1)[1], max_tokens=1).status_code == 200
    assert chat(box, box.job(bundled_gguf(), step=40), max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tools": [TIDE], "tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [TIDE["function"]]}, "functions"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cant_be_done_is_refused_with_its_field(
    box: Box, model: str, body: dict[str, Any], param: str
) -> None:
    refusal = error_of(chat(box, model, **body), 400)
    assert refusal["param"] == param
    assert refusal["type"] == "invalid_request_error"


def test_json_that_is_nested_too_deeply_is_refused(box: Box, model: str) -> None:
    deep = "[" * 5000 + "]" * 5000
    tool = '{"type": "function", "function": {"name": "f", "parameters": {"a": %s}}}' % deep  # noqa: UP031
    body = f'{{"model": "{model}", "messages": {json.dumps(QUESTION)}, "tools": [{tool}]}}'
    headers = {"Authorization": f"Bearer {box.keys['ann']}"}
    answer = httpx.post(f"{box.live.url}/v1/chat/completions", content=body, headers=headers)
    assert error_of(answer, 400)
    nested = body.replace(deep, "[" * 90 + "]" * 90).replace('"tools"', '"max_tokens": 1, "tools"')
    answer = httpx.post(f"{box.live.url}/v1/chat/completions", content=nested, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


def test_pictures_and_half_characters_are_refused(box: Box, model: str) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    refusal = error_of(chat(box, model, messages=[{"role": "user", "content": picture}]), 400)
    assert refusal["param"].startswith("messages.0.content")
    raw = json.dumps({"model": model, "messages": [{"role": "user", "content": "\ud800"}]})
    headers = {"Authorization": f"Bearer {box.keys['ann']}"}
    answer = httpx.post(f"{box.live.url}/v1/chat/completions", content=raw, headers=headers)
    assert error_of(answer, 400)


def test_a_model_that_dies_ends_its_answer_and_no_other(client: openai.OpenAI, box: Box, model: str) -> None:
    long = [{"role": "user", "content": "Write a long story about a ship."}]
    stream = client.chat.completions.create(model=model, messages=long, seed=1, stream=True)
    said = iter(stream)
    next(said)
    for child in box.children():
        child.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="process died"):
        list(said)
    assert chat(box, model).status_code == 200


def test_an_answer_that_nobody_waits_for_is_given_up(client: openai.OpenAI, box: Box, model: str) -> None:
    long = [{"role": "user", "content": "Write a long story about a ship."}]
    before = {child.pid for child in box.children()}
    with client.chat.completions.create(model=model, messages=long, seed=1, stream=True) as stream:
        next(iter(stream))
    impatient = client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=model, messages=long, seed=1)
    began = time.monotonic()
    assert chat(box, model, max_tokens=1).status_code == 200
    # Those answers would go on for thousands of tokens.
    assert time.monotonic() - began < 10
    assert {child.pid for child in box.children()} >= before


def test_the_command_line_talks(box: Box, model: str) -> None:
    environment = box.environment | {"TUNEYARD_URL": box.live.url, "TUNEYARD_API_KEY": box.keys["ann"]}

    def say(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli.main", "chat", *arguments]
        return subprocess.run(
            command, input=stdin, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    job = "ftjob-" + model.rsplit(":", 1)[1]
    done = say(model, "--temperature", "0", "--max-tokens", "8", stdin=QUESTION[0]["content"])
    assert done.stdout.removesuffix(" […]\n") == chat(box, model).json()["choices"][0]["message"]["content"]
    refused = say(job, "--checkpoint", "7", "-m", "hi")
    assert refused.returncode == 1
    assert "There is no GGUF of the checkpoint of step 7" in refused.stderr
