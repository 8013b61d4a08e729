"""Answers in OpenAI's shape, from an inference process that says what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from api.schemas_chat import ChatRequest
from api.services.v1.completions import Question, Reply, to_json
from shared.errors import InvalidRequest, RateLimited, TuneyardError, Unavailable
from shared.inference import Done, Event, Failed, Generation, Started, Text, to_line
from shared.settings import Settings, ensure_private_dir

pytestmark = pytest.mark.anyio

TOOL = {"type": "function", "function": {"name": "tide"}}
CALL = '<functioncall> {"name": "tide", "arguments": {"city": "%s"}}'


async def reply(settings: Settings, events: Iterable[Event], **body: Any) -> tuple[dict[str, Any], list[Any]]:
    """The whole answer, and the same as the chunks of a stream."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"".join(map(to_line, events)))
        await writer.drain()
        writer.close()

    path = settings.inference_socket()
    ensure_private_dir(path.parent)
    server = await asyncio.start_unix_server(serve, path)
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], **body}
    request = ChatRequest.model_validate_json(json.dumps(asked))
    question = Question(request, "m", Generation(key="k", size=1, owner="ann"))
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    async with server:
        whole = await (await Reply.begin(settings, question)).whole()
        await (await Reply.begin(settings, question)).stream(write)
    return json.loads(to_json(whole)), [json.loads(line[6:]) for line in written if b"[DONE]" not in line]


def said(*texts: str) -> list[Event]:
    return [Started(5), *map(Text, texts), Done("stop", 9)]


async def test_words_and_calls_are_parted(settings: Settings) -> None:
    events = said("Let me", " see.\n<func", CALL[5:] % "Oslo", "\n", CALL % "Rome")
    whole, chunks = await reply(settings, events, tools=[TOOL])
    message = whole["choices"][0]["message"]
    assert message["content"] == "Let me see."
    assert [c["function"]["arguments"] for c in message["tool_calls"]] == [
        '{"city": "Oslo"}',
        '{"city": "Rome"}',
    ]
    assert all(len(c["id"]) == 9 for c in message["tool_calls"])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "Let me see."
    streamed = [c for d in deltas for c in d.get("tool_calls", [])]
    assert [(c["index"], c["function"]["arguments"]) for c in streamed] == [
        (0, ""), (0, '{"city": "Oslo"}'), (1, ""), (1, '{"city": "Rome"}'),
    ]  # fmt: skip
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "tool_calls"


async def test_one_call_at_most_where_that_is_asked_for(settings: Settings) -> None:
    events = said(CALL % "Oslo", "\n", CALL % "Rome")
    whole, _ = await reply(settings, events, tools=[TOOL], parallel_tool_calls=False)
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1


async def test_a_call_that_was_cut_off_is_text(settings: Settings) -> None:
    events = [Started(5), Text((CALL % "Oslo")[:-5]), Done("length", 9)]
    whole, _ = await reply(settings, events, tools=[TOOL])
    assert whole["choices"][0]["message"]["content"] == (CALL % "Oslo")[:-5]
    assert whole["choices"][0]["finish_reason"] == "length"


async def test_half_characters_in_a_call_stay_escapes(settings: Settings) -> None:
    whole, chunks = await reply(settings, said(CALL % "\\ud800"), tools=[TOOL])
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "\\ud800"}'
    assert len(chunks) == 4


@pytest.mark.parametrize(
    ("failed", "error", "code"),
    [
        (Failed("busy", "x"), RateLimited, "rate_limit_exceeded"),
        (Failed("too_long", "x"), InvalidRequest, "context_length_exceeded"),
        (Failed("unusable", "x"), InvalidRequest, "model_unusable"),
        (Failed("away", "x"), Unavailable, "inference_failed"),
    ],
)
async def test_what_fails_before_the_answer_is_an_error(
    settings: Settings, failed: Failed, error: type[TuneyardError], code: str
) -> None:
    with pytest.raises(error) as caught:
        await reply(settings, [failed])
    assert caught.value.error_code == code
    if isinstance(caught.value, RateLimited):
        assert int(caught.value.headers["retry-after"]) > 0


async def test_an_answer_that_breaks_off_is_an_error(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="inference process ended"):
        await reply(settings, [Started(5), Text("a")])
