"""Nesting has one bound, in rows and in texts of JSON inside them."""

from __future__ import annotations

import json

import pytest

from shared.data.conversation import Conversation, Dropped
from shared.data.depth import MAX_DEPTH
from shared.data.formats import parse_row


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [90, 200, 900, 10_000, 100_000])
def test_json_in_a_text_may_be_as_deep_as_a_row(levels: int) -> None:
    deep = levels > MAX_DEPTH
    tools = f'[{{"name": "f", "parameters": {nested(levels)}}}]'
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = parse_row({"messages": chat, "tools": tools}, "messages", 1)
    assert isinstance(found, Dropped) == deep
    assert not deep or found == Dropped("invalid_tools", 1)
    listed = json.dumps(chat)[:-1] + f', {{"role": "tool", "content": "x", "more": {nested(levels)}}}]'
    found = parse_row({"messages": listed}, "messages", 1)
    assert isinstance(found, Dropped) == deep
    function = {"name": "f", "arguments": nested(levels)}
    called = [*chat, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]
    found = parse_row({"messages": called}, "messages", 1)
    assert isinstance(found, Conversation)
    assert ("call_unparsable" in found.notes) == deep
    system = f'SYSTEM: Use these -\n{{"name": "f", "parameters": {nested(levels)}}}\n'
    call = f'<functioncall> {{"name": "f", "arguments": {nested(levels)}}}'
    glaive = {"system": system, "chat": f"USER: q\n\n\nASSISTANT: {call} <|endoftext|>"}
    found = parse_row(glaive, "glaive", 1)
    assert isinstance(found, Conversation)
    assert (len(found.tools), "call_unparsable" in found.notes) == (0 if deep else 1, deep)
