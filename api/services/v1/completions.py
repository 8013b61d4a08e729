"""Chat and text completions: from OpenAI's requests to what a model is asked, and back to its shapes."""

from __future__ import annotations

import hashlib
import json
import secrets
import string
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from api.context import Caller
from api.errors import read_body
from api.schemas_chat import ChatRequest, CompletionRequest, Sampling
from api.services.logs import Write
from api.services.v1.inference import Answering, Servable, find_servable
from shared.data.conversation import INVALID_TEXT, REASONS, Call, Dropped
from shared.data.messages import as_messages, as_tools, parse_messages
from shared.data.written_calls import FUNCTIONCALL, CallReader
from shared.database import Database
from shared.errors import InvalidRequest, TuneyardError
from shared.inference import Done, Generation, Started, Text
from shared.settings import Settings

# Mistral's templates take ids of calls of just this length.
CALL_ID_LENGTH = 9
DEFAULT_COMPLETION_TOKENS = 16
# There is one, and no queue is jumped.
SERVICE_TIER = "default"
DONE = b"data: [DONE]\n\n"

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Question:
    """A request that can be answered: what its client wrote, and what the model is asked."""

    request: Sampling
    model: str
    generation: Generation


def read_chat(settings: Settings, database: Database, caller: Caller, body: bytes) -> Question:
    """The conversation, in the form in which the model was trained.

    Raises:
        NotFound: no such model, or somebody else's.
        InvalidRequest: what is wrong with it, or what the model lacks.
    """
    request = read_body(ChatRequest, body)
    model = find_servable(database, caller, request.model)
    tools = request.offered
    row = {
        "messages": [message.model_dump(exclude_none=True) for message in request.messages],
        # Functions in the system turn, as the training data had them, unless the template writes them.
        "tools": [] if model.own_calls else tools,
    }
    conversation = parse_messages(row, 1)
    if isinstance(conversation, Dropped):
        param = "tools" if conversation.reason == "invalid_tools" else "messages"
        raise InvalidRequest(f"These messages can't be used: {REASONS[conversation.reason]}.", param=param)
    if model.own_calls:
        messages = as_messages(conversation.turns)
    else:
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    generation = _generation(
        settings,
        caller,
        model,
        request,
        messages=messages,
        tools=as_tools(tools) if model.own_calls and tools else None,
        own_calls=model.own_calls,
        max_tokens=request.max_completion_tokens or request.max_tokens,
    )
    return Question(request, model.name, generation)


def read_completion(settings: Settings, database: Database, caller: Caller, body: bytes) -> Question:
    """The text to go on with.

    Raises:
        NotFound: no such model, or somebody else's.
        InvalidRequest: what is wrong with it, or what the model lacks.
    """
    request = read_body(CompletionRequest, body)
    model = find_servable(database, caller, request.model)
    if INVALID_TEXT.search(request.text):
        raise InvalidRequest(f"The prompt can't be used: {REASONS['invalid_text']}.", param="prompt")
    most = request.max_tokens or DEFAULT_COMPLETION_TOKENS
    generation = _generation(settings, caller, model, request, prompt=request.text, max_tokens=most)
    return Question(request, model.name, generation)


def _generation(
    settings: Settings, caller: Caller, model: Servable, request: Sampling, **what: Any
) -> Generation:
    return Generation(
        key=model.key,
        size=model.size,
        owner=caller.name,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        stop=request.stops,
        seed=request.seed,
        seconds=settings.inference_request_seconds,
        **what,
    )


@dataclass(frozen=True)
class Piece:
    """What came of the answer: text, calls, or its end."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    finish: FinishReason | None = None


@dataclass
class Reply:
    """The answer to one request, for either way to give it."""

    answering: Answering
    started: Started
    model: str
    request: Sampling
    id: str = ""
    fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0
    cached: int = 0

    @classmethod
    async def begin(cls, settings: Settings, question: Question) -> Reply:
        """Ask; the model has taken the prompt when this returns.

        Raises:
            TuneyardError: there will be no answer.
        """
        chat = isinstance(question.request, ChatRequest)
        param = "messages" if chat else "prompt"
        socket = settings.inference_socket()
        answering, started = await Answering.begin(socket, question.generation, param)
        made = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        release = f"{question.generation.key} {version('tuneyard')}"
        fingerprint = f"fp_{hashlib.sha256(release.encode()).hexdigest()[:12]}"
        return cls(answering, started, question.model, question.request, made, fingerprint)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object.

        Raises:
            TuneyardError: the model died over it.
        """
        text, finish = "", "stop"
        calls: list[Call] = []
        try:
            async for piece in self._pieces():
                text += piece.text
                calls += piece.calls
                finish = piece.finish or finish
        finally:
            self.answering.close()
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if isinstance(self.request, ChatRequest):
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            message["annotations"] = []
            if calls:
                message |= {"content": text or None, "tool_calls": [_tool_call(call) for call in calls]}
            return self._object("chat.completion", [choice | {"message": message}], usage=True)
        return self._object("text_completion", [choice | {"text": text}], usage=True)

    async def stream(self, write: Write) -> None:
        """The answer as server-sent events, an error in its midst as the last of them."""
        chunks = self._chat_chunks() if isinstance(self.request, ChatRequest) else self._text_chunks()
        try:
            async for chunk in chunks:
                await write(_event(chunk))
            await write(DONE)
        except TuneyardError as error:
            await write(_event(error.body()))
        finally:
            self.answering.close()

    async def _chat_chunks(self) -> AsyncIterator[dict[str, Any]]:
        kind, number = "chat.completion.chunk", 0
        yield self._chunk(kind, {"delta": {"role": "assistant", "content": "", "refusal": None}})
        async for piece in self._pieces():
            if piece.text:
                yield self._chunk(kind, {"delta": {"content": piece.text}})
            for call in piece.calls:
                whole = {"index": number, **_tool_call(call)}
                function = whole["function"]
                begun = {**whole, "function": {"name": function["name"], "arguments": ""}}
                rest = {"index": number, "function": {"arguments": function["arguments"]}}
                yield self._chunk(kind, {"delta": {"tool_calls": [begun]}})
                yield self._chunk(kind, {"delta": {"tool_calls": [rest]}})
                number += 1
            if piece.finish:
                yield self._chunk(kind, {"delta": {}}, piece.finish)
        if self.request.include_usage:
            yield self._object(kind, [], usage=True)

    async def _text_chunks(self) -> AsyncIterator[dict[str, Any]]:
        kind = "text_completion"
        async for piece in self._pieces():
            if piece.text or piece.finish:
                yield self._chunk(kind, {"text": piece.text}, piece.finish)
        if self.request.include_usage:
            yield self._object(kind, [], usage=True)

    async def _pieces(self) -> AsyncIterator[Piece]:
        chat = self.request if isinstance(self.request, ChatRequest) else None
        style = self.started.style or FUNCTIONCALL
        reader = CallReader(style) if chat and chat.offered else None
        while True:
            event = await self.answering.next()
            if isinstance(event, Text):
                yield Piece(reader.feed(event.text) if reader else event.text)
            elif isinstance(event, Done):
                break
        self.tokens, self.cached = event.tokens, event.cached
        finish: FinishReason = event.reason
        if reader and chat:
            rest = reader.end()
            calls = rest.calls[:1] if chat.parallel_tool_calls is False else rest.calls
            yield Piece(rest.text, calls)
            finish = "tool_calls" if calls else finish
        yield Piece(finish=finish)

    def _chunk(self, kind: str, choice: dict[str, Any], finish: FinishReason | None = None) -> dict[str, Any]:
        whole = {"index": 0, **choice, "logprobs": None, "finish_reason": finish}
        chunk = self._object(kind, [whole])
        return chunk | {"usage": None} if self.request.include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]], *, usage: bool = False) -> dict[str, Any]:
        made: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        }
        if isinstance(self.request, ChatRequest):
            made["service_tier"] = SERVICE_TIER
        if usage:
            made["usage"] = self._usage()
        return made

    def _usage(self) -> dict[str, Any]:
        asked, made = self.started.prompt_tokens, self.tokens
        # Clients read these without looking whether they are there.
        none = {"audio_tokens": 0, "image_tokens": 0}
        guessed = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        return {
            "prompt_tokens": asked,
            "completion_tokens": made,
            "total_tokens": asked + made,
            "prompt_tokens_details": none
            | {"cached_tokens": self.cached, "cache_write_tokens": 0, "text_tokens": asked},
            "completion_tokens_details": guessed
            | {"audio_tokens": 0, "reasoning_tokens": 0, "text_tokens": made},
        }


def _tool_call(call: Call) -> dict[str, Any]:
    letters = string.ascii_letters + string.digits
    made = "".join(secrets.choice(letters) for _ in range(CALL_ID_LENGTH))
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    if INVALID_TEXT.search(arguments):
        # Half a surrogate pair, which the model wrote as an escape: it stays one.
        arguments = json.dumps(call.arguments)
    return {"id": made, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % to_json(value)


def to_json(value: dict[str, Any]) -> bytes:
    """ASCII with escapes, for an answer may hold what no encoding takes."""
    return json.dumps(value).encode()
