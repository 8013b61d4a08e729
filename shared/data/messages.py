"""Rows of role and content: OpenAI's `messages`, ShareGPT's `conversations`, with tools and calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from shared.data.calls import read_arguments, read_call
from shared.data.chatml import system_text
from shared.data.conversation import INVALID_TEXT, Call, Conversation, Dropped, Role, Turn, checked
from shared.data.depth import is_too_deep
from shared.data.glaive import MARKER, calls_turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# ShareGPT has a turn of its own for a call.
CALL_ROLES = ("function_call", "tool_call")
# Around reasoning that a row has in a place of its own.
THINK = ("<think>", "</think>")
_WRITTEN_CALL = re.compile(rf"{MARKER}\s*\{{")


class RowError(Exception):
    """A row that must be dropped; the argument is one of `conversation.REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_messages(row: dict[str, Any], line: int, drop_unparsable: bool = False) -> Conversation | Dropped:
    """`{"messages": [{"role", "content", "tool_calls"?, "weight"?}], "tools"?, "system"?}`."""
    return from_turns(_first(row, "messages", "conversations", "conversation"), row, line, drop_unparsable)


def parse_sharegpt(row: dict[str, Any], line: int, drop_unparsable: bool = False) -> Conversation | Dropped:
    """`{"conversations": [{"from", "value"}], "tools"?: JSON, "system"?}`."""
    return from_turns(_first(row, "conversations", "conversation", "messages"), row, line, drop_unparsable)


def from_turns(
    messages: Any, row: dict[str, Any], line: int, drop_unparsable: bool, untrained: int = 0
) -> Conversation | Dropped:
    """A list of messages as a conversation; the first `untrained` messages are a prompt."""
    messages = listed(messages)
    if not isinstance(messages, list) or not messages:
        return Dropped(
            "wrong_format" if messages is None else "empty" if messages == [] else "not_text", line
        )
    notes: list[str] = []
    try:
        turns = [_turn(message, notes, number < untrained) for number, message in enumerate(messages)]
        tools = _tools(_first(row, "tools", "functions"))
        system = _text(row.get("system"), notes)
    except RowError as error:
        return Dropped(error.reason, line)
    if drop_unparsable and "call_unparsable" in notes:
        return Dropped("unparsable_call", line)
    # What stands before a prompt belongs to it.
    trained = False if untrained else None
    if turns[0].role == "system":
        first = turns.pop(0)
        trained = first.trained
        system = f"{system}\n\n{first.content}" if system else first.content
    try:
        system = system_text(system, tools)
    except (TypeError, ValueError, RecursionError):
        return Dropped("invalid_tools", line)
    if system:
        turns.insert(0, Turn("system", system, trained))
    if not turns:
        return Dropped("empty", line)
    return checked(Conversation(tuple(turns), tools, line, tuple(notes)))


def as_messages(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """Turns as a chat template takes them that writes calls itself."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.calls:
            message.update(content=turn.prose, tool_calls=[_as_call(call) for call in turn.calls])
        message |= {"tool_call_id": turn.answers} if turn.answers else {}
        message |= {"name": turn.name} if turn.name else {}
        messages.append(message)
    return messages


def as_tools(tools: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Functions on offer, each in OpenAI's wrapper, as such templates take them."""
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _as_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"type": "function", "function": function, **({"id": call.id} if call.id else {})}


def _first(row: dict[str, Any], *keys: str) -> Any:
    """The first of these that is there and not null; None without one."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def listed(value: Any) -> Any:
    """A list that was written as a JSON text, as CSV and some Parquet files have it; else the value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return value if is_too_deep(found, value) else found
    return value


def _turn(message: Any, notes: list[str], is_prompt: bool) -> Turn:
    if not isinstance(message, dict):
        raise RowError("not_text")
    name = _first(message, "role", "from")
    if not isinstance(name, str):
        raise RowError("unknown_role")
    name = name.strip().lower().replace("-", "_")
    trained = False if is_prompt else _trained(message)
    value = _first(message, "content", "value", "refusal")
    if name in CALL_ROLES:
        if isinstance(value, str) and _WRITTEN_CALL.match(value.lstrip()):
            return calls_turn(value, notes, trained)
        return _with_calls("", _calls_of_text(value, notes), trained)
    role = ROLES.get(name)
    if role is None:
        raise RowError("unknown_role")
    text = _text(value, notes)
    if role == "tool":
        return Turn(
            role, text, trained, answers=_named(message, "tool_call_id"), name=_named(message, "name")
        )
    if role != "assistant":
        return Turn(role, text, trained)
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        notes.append("reasoning_kept")
        text = _think(reasoning) + text
    calls = _tool_calls(message, notes)
    for part in value if isinstance(value, list) else ():
        if isinstance(part, dict) and part.get("type") == "tool_call":
            calls += _calls_of_text(part.get("value"), notes)
    if not calls and _WRITTEN_CALL.search(text):
        return calls_turn(text, notes, trained)
    return _with_calls(text, calls, trained)


def _named(message: dict[str, Any], key: str) -> str:
    """An id or a name; "" without one, and for one that no template could write."""
    value = message.get(key)
    return value if isinstance(value, str) and not INVALID_TEXT.search(value) else ""


def _trained(message: dict[str, Any]) -> bool | None:
    """False for weight 0; None (the role decides) for 1 and for no weight."""
    for key in ("weight", "loss_weight"):
        weight = message.get(key)
        if weight is None:
            continue
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowError("invalid_weight")
        return False if weight == 0 else None
    return None


def _text(content: Any, notes: list[str]) -> str:
    """Content as a text: a string, null, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("not_text")
    pieces: list[str] = []
    for part in content:
        if isinstance(part, str):
            pieces.append(part)
            continue
        if not isinstance(part, dict):
            raise RowError("not_text")
        kind = part.get("type", "text")
        if kind == "tool_call":
            continue
        text = _first(part, "text", "value", "refusal")
        if kind not in ("text", "input_text", "output_text", "refusal", "reasoning") or not isinstance(
            text, str
        ):
            raise RowError("not_text")
        if kind == "reasoning":
            notes.append("reasoning_kept")
            text = _think(text)
        pieces.append(text)
    return "".join(pieces)


def _think(reasoning: str) -> str:
    return f"{THINK[0]}\n{reasoning}\n{THINK[1]}\n\n"


def _tool_calls(message: dict[str, Any], notes: list[str]) -> list[Call | str]:
    """OpenAI's `tool_calls` and the older `function_call`."""
    listed = message.get("tool_calls")
    single = message.get("function_call")
    if listed is None or listed == []:
        listed = [] if single is None else [single]
    if not isinstance(listed, list):
        raise RowError("not_text")
    return [_one_call(call, notes) for call in listed]


def _one_call(call: Any, notes: list[str]) -> Call | str:
    """A parsed call, or its text where its arguments can't be read."""
    if not isinstance(call, dict):
        raise RowError("not_text")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RowError("not_text")
    arguments = function.get("arguments")
    call_id = _named(call, "id")
    if isinstance(arguments, dict | list):
        return Call(name, arguments, call_id)
    if isinstance(arguments, str):
        try:
            # OpenAI gives "" for a function without parameters.
            return Call(name, read_arguments(arguments.strip() or "{}"), call_id)
        except ValueError:
            pass
    notes.append("call_unparsable")
    given = {"name": name, "arguments": arguments} if "arguments" in function else function
    return _dumped(given)


def _calls_of_text(value: Any, notes: list[str]) -> list[Call | str]:
    """The call or calls that a text holds as JSON; the text itself where one of them can't be read."""
    if not isinstance(value, str):
        raise RowError("not_text")
    text = value.strip()
    try:
        found = read_arguments(text)
        own: list[str] = []
        calls = [_one_call(call, own) for call in (found if isinstance(found, list) else [found])]
        if not own:
            return [*calls]
    except (ValueError, RowError):
        # Not JSON, but perhaps quoted as Glaive quotes it.
        mended = read_call(text) if text.startswith("{") else None
        if mended is not None and not mended[1].strip():
            notes.extend(["call_repaired"] * mended[2])
            return [mended[0]]
    notes.append("call_unparsable")
    return [text]


def _with_calls(text: str, calls: list[Call | str], trained: bool | None) -> Turn:
    if not calls:
        return Turn("assistant", text, trained)
    written = [f"{MARKER} {call if isinstance(call, str) else _json(call)}" for call in calls]
    parsed = tuple(call for call in calls if isinstance(call, Call))
    unparsed = [line for line, call in zip(written, calls, strict=True) if isinstance(call, str)]
    content = "\n".join([text, *written] if text else written)
    return Turn("assistant", content, trained, parsed, "\n".join([text, *unparsed] if text else unparsed))


def _json(call: Call) -> str:
    return _dumped({"name": call.name, "arguments": call.arguments})


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RowError("not_text") from None


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """A row's tools: a list of functions, or a JSON text of one; nothing for null, "" and []."""
    if isinstance(value, str):
        text = value
        try:
            value = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            raise RowError("invalid_tools") from None
        if is_too_deep(value, text):
            raise RowError("invalid_tools")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("invalid_tools")
    return tuple(value)
