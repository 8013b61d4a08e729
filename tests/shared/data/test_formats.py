"""Every format: found out by itself, and each of its forms turned into the right turns."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.data.chatml import TOOLS_CONTINUATION, TOOLS_INTRODUCTION
from shared.data.conversation import Call, Conversation, Dropped
from shared.data.formats import FORMATS, conversations, detect_format, parse_row
from shared.data.inspect import inspect_file
from shared.errors import DatasetError

SAMPLES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "formats"
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def turns(row: dict[str, Any], name: str) -> list[tuple[str, str]]:
    found = parse_row(row, name, 1)
    assert isinstance(found, Conversation), found
    return [(turn.role, turn.content) for turn in found.turns]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"chat": "USER: q", "system": ""}, "glaive"),
        ({"messages": CHAT}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": json.dumps(CHAT)}, "messages"),
        ({"conversations": CHAT}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"text": "x", "id": 1}, "text"),
    ],
)
def test_the_format_is_found_out(row: dict[str, Any], name: str) -> None:
    assert detect_format([row]) == name


def test_the_format_is_the_majoritys_and_unknown_columns_are_named() -> None:
    assert detect_format([{"text": "x"}, {"messages": CHAT}, {"messages": CHAT}]) == "messages"
    with pytest.raises(DatasetError, match=r"columns answer, question, which fit no known format"):
        detect_format([{"question": "q", "answer": "a"}])
    # A column with the name of Glaive's that holds something else.
    assert detect_format([{"messages": CHAT, "chat": "chat-17"}]) == "messages"
    assert detect_format([{"messages": CHAT, "chat": "USER: a"}]) == "glaive"
    assert detect_format([{"chat": "Human: a"}]) == "glaive"
    with pytest.raises(DatasetError, match="no rows"):
        conversations([])


def test_unknown_columns_are_named_as_what_can_be_stored() -> None:
    with pytest.raises(DatasetError, match=r"columns \\udc00a, a\\x00b, größe, which") as raised:
        detect_format([{"\udc00a": 1, "größe": 2, "a\0b": 3}])
    str(raised.value).encode()


def test_few_long_rows_are_held_to_find_the_format_out() -> None:
    taken: list[int] = []

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number in range(1, 50):
            taken.append(number)
            yield number, {"text": "x" * 2**20}

    name, parsed = conversations(rows())
    assert (name, len(taken)) == ("text", 4)
    assert [row.line for row in parsed] == list(range(1, 50))


def test_openai_messages_with_tools_and_calls() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    row = {
        "tools": [tool],
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}},
                    {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"y": [1]}}},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "1"},
            {"role": "assistant", "content": "So", "function_call": {"name": "f", "arguments": "{}"}},
        ],
    }
    found = parse_row(row, "messages", 1)
    assert isinstance(found, Conversation)
    assert found.tools == (tool,)
    listed = json.dumps(tool["function"], indent=4)
    assert [(turn.role, turn.content) for turn in found.turns] == [
        ("system", f"Be kind.\n\n{TOOLS_CONTINUATION}{listed}"),
        ("user", "ab"),
        (
            "assistant",
            '<functioncall> {"name": "f", "arguments": {"x": "é"}}\n'
            '<functioncall> {"name": "g", "arguments": {"y": [1]}}',
        ),
        ("tool", "1"),
        ("assistant", 'So\n<functioncall> {"name": "f", "arguments": {}}'),
    ]
    assert found.turns[2].calls == (Call("f", {"x": "é"}), Call("g", {"y": [1]}))
    assert found.turns[4].prose == "So"


def test_tools_without_a_system_turn_make_one_as_glaive_has_it() -> None:
    row = {"messages": CHAT, "tools": json.dumps([{"name": "f"}, {"name": "g"}])}
    assert turns(row, "messages")[0] == (
        "system",
        TOOLS_INTRODUCTION + '{\n    "name": "f"\n}\n\n{\n    "name": "g"\n}',
    )


def test_weights() -> None:
    row = {"messages": [{**CHAT[0], "weight": 0}, {**CHAT[1], "weight": 1}, {**CHAT[1], "loss_weight": 0.0}]}
    found = parse_row(row, "messages", 1)
    assert isinstance(found, Conversation)
    assert [turn.trained for turn in found.turns] == [False, None, False]


def test_a_system_turn_keeps_whether_it_is_trained() -> None:
    system = {"role": "system", "content": "S", "weight": 0}
    found = parse_row({"messages": [system, *CHAT], "tools": [{"name": "f"}]}, "messages", 1)
    assert isinstance(found, Conversation)
    assert [turn.trained for turn in found.turns] == [False, None, None]
    for prompt in ("q", [{"role": "system", "content": "S"}, CHAT[0]]):
        row = {"prompt": prompt, "completion": "a", "tools": [{"name": "f"}]}
        found = parse_row(row, "prompt_completion", 1)
        assert isinstance(found, Conversation)
        assert [turn.trained for turn in found.turns] == [False, False, None]


def test_an_empty_answer_is_noted() -> None:
    found = parse_row({"messages": [*CHAT, {"role": "assistant", "content": None}]}, "messages", 1)
    assert isinstance(found, Conversation)
    assert found.notes == ("empty_answer",)


def test_reasoning_is_kept_as_a_think_block() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    for message in (
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    ):
        assert turns({"messages": [message]}, "messages") == [("assistant", "<think>\nhm\n</think>\n\na")]


def test_an_unparsable_call_is_kept_or_drops_the_row() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": '}}
    row = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    found = parse_row(row, "messages", 1)
    assert isinstance(found, Conversation)
    assert found.notes == ("call_unparsable",)
    assert found.turns[0].content == '<functioncall> {"name": "f", "arguments": "{\\"a\\": "}'
    assert parse_row(row, "messages", 4, drop_unparsable=True) == Dropped("unparsable_call", 4)


def test_sharegpt() -> None:
    row = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": "[]",
    }
    assert turns(row, "sharegpt") == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", '<functioncall> {"name": "f", "arguments": {"a": 1}}'),
        ("tool", "1"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize(
    ("value", "content", "arguments", "notes"),
    [
        (
            """{"name": "f", "arguments": '{"a": "it's"}'}""",
            """<functioncall> {"name": "f", "arguments": {"a": "it's"}}""",
            {"a": "it's"},
            (),
        ),
        (
            """<functioncall> {"name": "f", "arguments": '{"a": 1}'}""",
            '<functioncall> {"name": "f", "arguments": {"a": 1}}',
            {"a": 1},
            (),
        ),
        ('{"name":"f","parameters":{"a":1}}', None, None, ("call_unparsable",)),
        ('[{"name":"f", "arguments":{}}, {"nme":"f"}]', None, None, ("call_unparsable",)),
    ],
)
def test_sharegpts_calls(value: str, content: str | None, arguments: Any, notes: tuple[str, ...]) -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
    found = parse_row(row, "sharegpt", 1)
    assert isinstance(found, Conversation)
    turn = found.turns[1]
    assert turn.content == (content or f"<functioncall> {value}")
    assert turn.calls == (() if arguments is None else (Call("f", arguments),))
    assert found.notes == notes


def test_openais_calls_without_readable_arguments() -> None:
    def called(function: dict[str, Any]) -> Conversation | Dropped:
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
        return parse_row({"messages": [CHAT[0], call]}, "messages", 1)

    found = called({"name": "f", "arguments": ""})
    assert isinstance(found, Conversation)
    assert found.turns[1].calls == (Call("f", {}),)
    found = called({"name": "f", "parameters": {"a": 1}})
    assert isinstance(found, Conversation)
    assert found.turns[1].content == '<functioncall> {"name": "f", "parameters": {"a": 1}}'
    assert found.notes == ("call_unparsable",)


@pytest.mark.parametrize(
    ("name", "key", "text"), [("messages", "role", "content"), ("sharegpt", "from", "value")]
)
def test_calls_written_in_an_assistants_text(name: str, key: str, text: str) -> None:
    written = """So: <functioncall> {"name": "f", "arguments": '{"a": 1}'}"""
    row = {"conversations": [{key: "user", text: "q"}, {key: "assistant", text: written, "weight": 0}]}
    found = parse_row(row, name, 1)
    assert isinstance(found, Conversation)
    assert found.turns[1].calls == (Call("f", {"a": 1}),)
    assert found.turns[1].content == 'So: <functioncall> {"name": "f", "arguments": {"a": 1}}'
    assert found.turns[1].trained is False


@pytest.mark.parametrize(
    "value",
    [datetime.datetime(2024, 1, 1), decimal.Decimal("1.5"), b"x", float("nan")],
)
def test_values_that_json_lacks_drop_the_row(value: Any) -> None:
    tools = [{"name": "f", "at": value}]
    assert parse_row({"messages": CHAT, "tools": tools}, "messages", 2) == Dropped("invalid_tools", 2)
    for arguments in ({"a": value}, value):
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        assert parse_row({"messages": [message]}, "messages", 2) == Dropped("not_text", 2)


def test_nulls_give_way_to_the_other_columns_and_keys() -> None:
    said = [
        {"role": None, "from": "human", "content": None, "value": "q"},
        {"from": "gpt", "content": [{"type": "text", "text": None, "value": "a"}]},
    ]
    for name in ("messages", "sharegpt"):
        for columns in (("messages", "conversations"), ("conversations", "messages")):
            row = dict(zip(columns, (None, said), strict=True))
            assert turns(row, name) == [("user", "q"), ("assistant", "a")]


def test_alpaca_prompt_completion_and_text() -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]], "system": "s"}
    assert turns(row, "alpaca") == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "i\n\nx"), ("assistant", "o"),
    ]  # fmt: skip
    assert turns({"instruction": "i", "output": "o", "input": None}, "alpaca") == [
        ("user", "i"),
        ("assistant", "o"),
    ]
    assert turns({"prompt": "p", "completion": "c"}, "prompt_completion") == [
        ("user", "p"),
        ("assistant", "c"),
    ]
    found = parse_row({"prompt": CHAT, "completion": CHAT[1:]}, "prompt_completion", 1)
    assert isinstance(found, Conversation)
    assert [turn.trained for turn in found.turns] == [False, False, None]
    text = parse_row({"text": "x"}, "text", 1)
    assert isinstance(text, Conversation)
    assert text.plain
    assert text.turns[0].trained


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"text": "x"}, "messages", "wrong_format"),
        ({"messages": "x"}, "messages", "not_text"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": ["x"]}, "messages", "not_text"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages", "unknown_role"),
        ({"messages": [{"content": "x"}]}, "messages", "unknown_role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages", "not_text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages", "not_text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "not_text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "empty"),
        ({"messages": [{**CHAT[1], "weight": 0.5}]}, "messages", "invalid_weight"),
        ({"messages": [{**CHAT[1], "weight": True}]}, "messages", "invalid_weight"),
        ({"messages": [{**CHAT[1], "tool_calls": "f"}]}, "messages", "not_text"),
        ({"messages": [{**CHAT[1], "tool_calls": [{"function": {"name": 1}}]}]}, "messages", "not_text"),
        ({"messages": CHAT, "tools": "{broken"}, "messages", "invalid_tools"),
        ({"messages": CHAT, "tools": ["f"]}, "messages", "invalid_tools"),
        ({"messages": CHAT, "system": 5}, "messages", "not_text"),
        ({"conversations": [{"from": "gpt", "value": 1.5}]}, "sharegpt", "not_text"),
        ({"conversations": [{"from": "function_call", "value": None}]}, "sharegpt", "not_text"),
        ({"instruction": "i"}, "alpaca", "wrong_format"),
        ({"instruction": 1, "output": "o"}, "alpaca", "not_text"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "alpaca", "not_text"),
        ({"instruction": "i", "output": "o", "history": 5}, "alpaca", "not_text"),
        ({"prompt": "p"}, "prompt_completion", "wrong_format"),
        ({"prompt": 1, "completion": "c"}, "prompt_completion", "not_text"),
        ({"text": None}, "text", "wrong_format"),
        ({"text": 3}, "text", "not_text"),
        ({"text": " "}, "text", "empty"),
        ({"text": "\ud83d"}, "text", "invalid_text"),
        ({"text": "a\x00b"}, "text", "invalid_text"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], name: str, reason: str) -> None:
    assert parse_row(row, name, 9) == Dropped(reason, 9)


def test_no_row_raises(tmp_path: Path) -> None:
    """Any JSON value in any column of any format: a conversation or a reason, never an exception."""
    values: list[Any] = [
        None,
        0,
        1.5,
        True,
        "",
        "x",
        [],
        {},
        [[]],
        [{}],
        [None],
        {"a": []},
        "[",
        "{",
        [["a", 1]],
    ]
    columns = [
        "chat",
        "system",
        "messages",
        "conversations",
        "tools",
        "instruction",
        "input",
        "output",
        "history",
    ]
    columns += ["prompt", "completion", "text"]
    keys = ["role", "content", "from", "value", "weight", "tool_calls", "function_call", "reasoning_content"]
    rows = [{column: value} for column in columns for value in values]
    rows += [{"messages": CHAT, "chat": "USER: x", column: value} for column in columns for value in values]
    for key in keys:
        for value in values:
            for base in (CHAT[1], {"from": "gpt", "value": "x"}, {"from": "function_call", "value": "x"}):
                rows.append({"messages": [{**base, key: value}], "conversations": [{**base, key: value}]})
    for row in rows:
        for name in FORMATS:
            assert isinstance(parse_row(row, name, 1), Conversation | Dropped)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real rows are not at hand")
@pytest.mark.parametrize(
    ("file", "name", "used", "duplicates"),
    [
        ("alpaca.json", "alpaca", 299, 1),
        ("alpaca_without_input_key.jsonl", "alpaca", 5, 0),
        ("messages.jsonl", "messages", 150, 0),
        ("messages_content_parts.jsonl", "messages", 200, 0),
        ("messages_tools.jsonl", "messages", 50, 0),
        ("sharegpt.json", "sharegpt", 200, 0),
        ("sharegpt_tools.json", "sharegpt", 141, 9),
    ],
)
def test_real_files(file: str, name: str, used: int, duplicates: int) -> None:
    report = inspect_file(SAMPLES / file).to_json()
    assert (report["format"], report["rows_used"]) == (name, used)
    assert report["rows_dropped"] == duplicates == report["dropped"].get("duplicate", {}).get("count", 0)
    assert "call_unparsable" not in report["notes"]
