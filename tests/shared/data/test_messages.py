"""Forms of messages that are less common, or older."""

from __future__ import annotations

import json
from typing import Any

from shared.data.conversation import Conversation
from shared.data.formats import parse_row

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def turns(row: dict[str, Any], name: str) -> list[tuple[str, str]]:
    found = parse_row(row, name, 1)
    assert isinstance(found, Conversation)
    return [(turn.role, turn.content) for turn in found.turns]


def test_roles_in_any_case_and_results_by_any_name() -> None:
    values = {"System": "s", "Human": "h", "function-call": '{"name": "f", "arguments": {}}'}
    values |= {"function_response": "1", "Observation": "2", "GPT": "g"}
    row = {"conversations": [{"from": key, "value": value} for key, value in values.items()]}
    assert [role for role, _ in turns(row, "sharegpt")] == [
        "system", "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip


def test_older_forms_of_openais_rows() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I can't."}
    row = {"messages": [CHAT[0], refused], "functions": [{"name": "f", "parameters": {}}]}
    found = parse_row(row, "messages", 1)
    assert isinstance(found, Conversation)
    assert found.turns[-1].content == "I can't."
    assert found.tools == ({"name": "f", "parameters": {}},)


def test_ids_of_calls_and_results_are_kept() -> None:
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": f"c{number}", "type": "function", "function": function} for number in (1, 2)]
    results = [{"role": "tool", "tool_call_id": f"c{n}", "name": "f", "content": "x"} for n in (2, 1)]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    found = parse_row({"messages": [CHAT[0], asked, *results, CHAT[1]]}, "messages", 1)
    assert isinstance(found, Conversation)
    assert [call.id for call in found.turns[1].calls] == ["c1", "c2"]
    assert [(turn.answers, turn.name) for turn in found.turns[2:4]] == [("c2", "f"), ("c1", "f")]


def test_prompt_and_completion_as_json_of_messages() -> None:
    row = {"prompt": json.dumps([CHAT[0]]), "completion": json.dumps([CHAT[1]])}
    assert turns(row, "prompt_completion") == [("user", "q"), ("assistant", "a")]
    assert turns({"prompt": "[1, 2]", "completion": "[]"}, "prompt_completion") == [
        ("user", "[1, 2]"),
        ("assistant", "[]"),
    ]


def test_an_older_call_beside_an_empty_list_of_calls() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": []}
    row = {"messages": [CHAT[0], {**asked, "function_call": {"name": "f", "arguments": "{}"}}]}
    assert turns(row, "messages") == [
        ("user", "q"),
        ("assistant", '<functioncall> {"name": "f", "arguments": {}}'),
    ]
