"""Answers from fine-tuned models, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from api.dependencies import BodyDep, CallerDep, DatabaseDep, SettingsDep
from api.schemas_chat import ChatRequest, CompletionRequest, Sampling
from api.services.v1 import completions
from api.services.v1.completions import Question, Reply
from api.streams import EventStream, unless_gone
from shared.settings import Settings

router = APIRouter(prefix="/v1", tags=["OpenAI: answers"])


def _body_of(model: type[Sampling]) -> dict[str, Any]:
    """What the docs say of the body: it is parsed strictly by itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("/chat/completions", openapi_extra=_body_of(ChatRequest))
async def create_chat_completion(
    settings: SettingsDep, database: DatabaseDep, caller: CallerDep, request: Request, body: BodyDep
) -> Response:
    """Let a fine-tuned model answer a conversation; as server-sent events with `"stream": true`."""
    question = await to_thread.run_sync(completions.read_chat, settings, database, caller, body)
    return await _answer(settings, request, question)


@router.post("/completions", openapi_extra=_body_of(CompletionRequest))
async def create_completion(
    settings: SettingsDep, database: DatabaseDep, caller: CallerDep, request: Request, body: BodyDep
) -> Response:
    """Let a fine-tuned model go on with a text, without its chat template."""
    question = await to_thread.run_sync(completions.read_completion, settings, database, caller, body)
    return await _answer(settings, request, question)


async def _answer(settings: Settings, request: Request, question: Question) -> Response:
    begun = Reply.begin(settings, question)
    if question.request.stream:
        reply = await unless_gone(request.receive, begun)
        return EventStream(reply.stream) if reply else Response()

    async def whole() -> dict[str, Any]:
        return await (await begun).whole()

    answer = await unless_gone(request.receive, whole())
    return Response(completions.to_json(answer) if answer else b"", media_type="application/json")
