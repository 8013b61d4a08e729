"""Raw Glaive rows: real headers, odd turns, and conversations written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data import glaive
from shared.data.chatml import render
from shared.data.conversation import Call, Conversation, Dropped, Turn
from shared.data.glaive import find_functions, parse_functions, parse_glaive

SAMPLES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "glaive"
END = " <|endoftext|>\n\n\n"


def parsed(chat: str, system: str | None = None, **options: Any) -> Conversation:
    found = parse_glaive({"system": system, "chat": chat}, 1, **options)
    assert isinstance(found, Conversation), found
    return found


def turns(chat: str, system: str | None = None) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in parsed(chat, system).turns]


DOCUMENTED = """<|im_start|>system
You are a helpful assistant with access to functions...<|im_end|>
<|im_start|>user
What's the weather in Tokyo?<|im_end|>
<|im_start|>assistant
<functioncall> {"name": "get_weather", "arguments": {"city": "Tokyo"}}<|im_end|>
<|im_start|>tool
{"temperature": 22, "condition": "sunny"}<|im_end|>
<|im_start|>assistant
The weather in Tokyo is sunny with a temperature of 22°C.<|im_end|>"""
SYSTEM = "SYSTEM: You are a helpful assistant with access to functions..."
LINES = [
    "USER: What's the weather in Tokyo?",
    'ASSISTANT: <functioncall> {"name": "get_weather", "arguments": {"city": "Tokyo"}}',
    'FUNCTION RESPONSE: {"temperature": 22, "condition": "sunny"}',
    "ASSISTANT: The weather in Tokyo is sunny with a temperature of 22°C.",
]


@pytest.mark.parametrize(
    "row",
    [
        {"system": SYSTEM, "chat": "\n".join(LINES)},
        {"system": SYSTEM, "chat": "\n\n\n".join(LINES)},
        {"chat": "\n".join([SYSTEM, *LINES])},
        {"chat": "\n\n".join([SYSTEM, *LINES])},
        {"system": None, "chat": "<|im_end|>\n" + "\r\n".join([SYSTEM, *LINES])},
        {
            "system": SYSTEM + "\n",
            "chat": f"{LINES[0]}\n\n\n"
            """ASSISTANT: <functioncall> {"name": "get_weather", "arguments": '{"city": "Tokyo"}'}"""
            f"{END}{LINES[2]}\n\n\n{LINES[3]}{END}",
        },
    ],
)
def test_the_documented_example_byte_for_byte(row: dict[str, Any]) -> None:
    found = parse_glaive(row, 1)
    assert isinstance(found, Conversation)
    assert "".join(span.text for span in render(found)) == DOCUMENTED


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        # A header needs a blank line before it; Glaive's replacement of "AI:" left one without.
        (
            f'USER: The book is "\nASSISTANT: A Modern Approach", two copies.{END}ASSISTANT: Sure.{END}',
            [("user", 'The book is "\nASSISTANT: A Modern Approach", two copies.'), ("assistant", "Sure.")],
        ),
        (
            f'USER: q\n\n\nASSISTANT: a{END}FUNCTION RESPONSE: ["in \nASSISTANT: Top"]{END}ASSISTANT: b{END}',
            [("user", "q"), ("assistant", "a"), ("tool", '["in \nASSISTANT: Top"]'), ("assistant", "b")],
        ),
        (
            f"USER: q\n\n\nASSISTANT: developments in{END}ASSISTANT:\n1. x{END}",
            [("user", "q"), ("assistant", "developments in AI:\n1. x")],
        ),
        # An assistant that writes a dialogue: its turn goes on until <|endoftext|>.
        (
            f"USER: q\n\n\nASSISTANT: Like so:\n\nUSER: hi\n\nASSISTANT: ho{END}USER: ok{END}",
            [("user", "q"), ("assistant", "Like so:\n\nUSER: hi\n\nASSISTANT: ho"), ("user", "ok")],
        ),
        (
            f"USER: q\n\nASSISTANT: a <|endoftext|>\n\nUSER: r\n\nASSISTANT: b{END}",
            [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ),
        # Prose, then the call in a turn of its own.
        (
            f"USER: q\n\n\nASSISTANT: wait{END}ASSISTANT: <functioncall> "
            f"""{{"name": "f", "arguments": '{{}}'}}{END}FUNCTION RESPONSE: 1\n\n\nASSISTANT: done{END}""",
            [
                ("user", "q"),
                ("assistant", "wait"),
                ("assistant", '<functioncall> {"name": "f", "arguments": {}}'),
                ("tool", "1"),
                ("assistant", "done"),
            ],
        ),
        # A row that ends on a user's turn.
        (
            "USER: q\n\n\nASSISTANT: a\n\n\nUSER: left alone",
            [("user", "q"), ("assistant", "a"), ("user", "left alone")],
        ),
        (
            "USER: My USER: and ASSISTANT: words\n\n\nASSISTANT: a",
            [("user", "My USER: and ASSISTANT: words"), ("assistant", "a")],
        ),
        (
            "USER: q\n\n\nASSISTANT: one <|endoftext|> two <|endoftext|>",
            [("user", "q"), ("assistant", "one two")],
        ),
    ],
)  # fmt: skip
def test_turns_begin_at_real_headers(chat: str, expected: list[tuple[str, str]]) -> None:
    assert turns(chat) == expected


TWO_EXCHANGES = [("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "1. a\n2. b")]


@pytest.mark.parametrize(
    "chat",
    [
        f"USER: hi\n\n\nASSISTANT: yo{END}USER:more\n\n\nASSISTANT: 1. a\n2. b{END}",
        f"USER:hi\n\n\nASSISTANT:yo{END}USER:\nmore\n\n\nASSISTANT:\n1. a\n2. b{END}",
        "USER: hi\n\n\nASSISTANT: yo\n\n\nUSER:more\n\n\nASSISTANT:\n1. a\n2. b",
        "USER: hi\n \n \nASSISTANT: yo <|endoftext|>\n \n \nUSER: more\n\t\n\nASSISTANT: 1. a\n2. b",
        "USER: hi\nASSISTANT: yo <|endoftext|>\nUSER: more\nASSISTANT: 1. a\n2. b <|endoftext|>",
        "USER: hi\r\r\rASSISTANT: yo <|endoftext|>\r\r\rUSER: more\r\r\rASSISTANT: 1. a\r2. b <|endoftext|>",
        # Two breaks here, three there: `<|endoftext|>` in the user's words says that a header was missed.
        f"USER: hi\n\nASSISTANT: yo{END}USER: more\n\n\nASSISTANT: 1. a\n2. b{END}",
    ],
)  # fmt: skip
def test_headers_that_vary_a_little_are_headers(chat: str) -> None:
    found = parsed(chat)
    assert [(turn.role, turn.content) for turn in found.turns] == TWO_EXCHANGES
    assert found.notes == ()


def test_a_header_that_stays_in_a_text_is_noted() -> None:
    found = parsed(f"USER: Write a play:\n\nASSISTANT: hello\n\nUSER: ho\n\n\nASSISTANT: Done.{END}")
    assert found.turns[0].content == "Write a play:\n\nASSISTANT: hello\n\nUSER: ho"
    assert found.turns[1].content == "Done."
    assert found.notes == ("header_in_text", "header_in_text")


@pytest.mark.parametrize("breaks", ["\n\n", "\n\n\n"])
def test_a_response_in_json_goes_on_to_its_end(breaks: str) -> None:
    response = '{"t": "a\n\n\nUSER: b\n\nASSISTANT: c"}'
    chat = (
        f"USER: q{breaks}ASSISTANT: w <|endoftext|>{breaks}FUNCTION RESPONSE: {response}{breaks}ASSISTANT: d"
    )
    assert turns(f"{chat} <|endoftext|>") == [
        ("user", "q"), ("assistant", "w"), ("tool", response), ("assistant", "d"),
    ]  # fmt: skip


def test_a_marker_inside_a_calls_own_text() -> None:
    calls = [Call("f", {"a": "say <functioncall> {x} <functioncall>"}), Call("g", {})]
    content = "\n".join(f"<functioncall> {call.to_json()}" for call in calls)
    found = parsed(f"USER: q\n\n\nASSISTANT: {content}{END}")
    assert found.turns[1].calls == tuple(calls)
    assert found.turns[1].content == content
    assert found.notes == ()


def test_several_calls_and_prose_around_them_survive() -> None:
    chat = (
        'USER: q\n\n\nASSISTANT: First.\n<functioncall> {"name": "f", "arguments": \'{"a": "it\'s"}\'}\n'
        f'<functioncall> {{"name": "g", "arguments": {{"b": [1, 2.5]}}}} and last.{END}'
    )
    turn = parsed(chat).turns[1]
    assert turn.content == (
        'First.\n<functioncall> {"name": "f", "arguments": {"a": "it\'s"}}\n'
        '<functioncall> {"name": "g", "arguments": {"b": [1, 2.5]}} and last.'
    )
    assert turn.calls == (Call("f", {"a": "it's"}), Call("g", {"b": [1, 2.5]}))
    assert turn.prose == "First.\n\n and last."


def test_a_call_that_cannot_be_read_is_kept_verbatim_or_drops_the_row() -> None:
    call = """<functioncall> {"name": "f", "arguments": '{"a": [User data]}'}"""
    chat = f"USER: q\n\n\nASSISTANT: {call}{END}"
    found = parsed(chat)
    assert found.turns[1].content == call
    assert found.notes == ("call_unparsable",)
    dropped = parse_glaive({"chat": chat}, 7, drop_unparsable=True)
    assert dropped == Dropped("unparsable_call", 7)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chat": None}, "wrong_format"),
        ({"chat": 5}, "not_text"),
        ({"chat": "USER: q", "system": 5}, "not_text"),
        ({"chat": " \n "}, "empty"),
        ({"chat": "hello there"}, "no_turns"),
        ({"chat": "hello\n\n\nUSER: q\n\n\nASSISTANT: a"}, "leading_text"),
        ({"chat": "USER: \n\n\nASSISTANT: <|endoftext|>"}, "empty"),
        ({"chat": "USER: q\n\n\nASSISTANT: \x00"}, "invalid_text"),
        ({"chat": "USER: q\n\n\nASSISTANT: \udc00"}, "invalid_text"),
    ],
)
def test_unusable_rows_say_why(row: dict[str, Any], reason: str) -> None:
    assert parse_glaive(row, 3) == Dropped(reason, 3)


def test_functions_of_the_system_text() -> None:
    text = 'with access -\n{\n "name": "f", "parameters": {}\n}\n\n{"name": "g"}\n'
    assert [function["name"] for function in parse_functions(text)] == ["f", "g"]
    assert parse_functions("no access to external functions") == ()
    assert parse_functions('set notation {a, b} and {"name": "f"}') == ()


def test_functions_in_one_list() -> None:
    functions = [{"name": "a", "parameters": {}}, {"name": "b"}]
    for text in (
        json.dumps(functions),
        json.dumps(functions).replace(", {", ",\n{"),
        json.dumps(functions, indent=2),
    ):
        system = f"Use these:\n{text}\nBe kind."
        found, start, end = find_functions(system)
        assert list(found) == functions
        assert system[start:end] == text


def test_hostile_rows_take_linear_time() -> None:
    fillers = ["\n", " ", "\n \n", "<|endoftext|>", "USER:", "\\", "{", '"', "<functioncall> {"]
    fillers += ["\n\n\nFUNCTION RESPONSE: [", '\n\n\nFUNCTION RESPONSE: {"a": "', '<functioncall> {"a": "']
    for filler in fillers:
        chat = f"USER: q\n\n\nASSISTANT: {filler * 200_000}"
        assert isinstance(parse_glaive({"chat": chat}, 1), Conversation | Dropped)


# Words that look like structure, without what makes a header real: the blank line before it, in text that a
# user or a function wrote, and <|endoftext|> in what an assistant wrote.
_words = st.lists(
    st.sampled_from(
        ["USER:", "ASSISTANT: x", "FUNCTION RESPONSE:", "it's", "{", "}", "'", '"', "\\", "\n",
         "\nASSISTANT: y", "\n\nnew paragraph", "°C", "👍", "<|im_end|>", "<|im_start|>user", "SYSTEM:"]
    )
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8),
    min_size=1, max_size=6,
).map(" ".join).map(str.strip).filter(lambda text: bool(text) and "functioncall" not in text)  # fmt: skip
_prose = _words.filter(lambda text: not text.startswith(("\n", "USER:", "ASSISTANT", "FUNCTION", "SYSTEM")))
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\\", exclude_categories=("Cs", "Cc")), max_size=12)
    | st.sampled_from(["it's", "a\nb", 'say "x"', "back\\slash", "'}", "Hey, let's meet'}"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_'", max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
_call = st.builds(
    Call,
    st.text("abcdefgh_-", min_size=1, max_size=10),
    st.dictionaries(st.text("abcde_", min_size=1, max_size=6), _json, max_size=3),
)


def _call_turn(prose: str, calls: list[Call]) -> Turn:
    text = "\n".join([*([prose] if prose else []), *(f"<functioncall> {call.to_json()}" for call in calls)])
    return Turn("assistant", text, None, tuple(calls), prose)


_assistant = st.builds(lambda text: Turn("assistant", text), _prose) | st.builds(
    _call_turn, st.just("") | _prose, st.lists(_call, min_size=1, max_size=2)
)
_exchange = st.tuples(
    st.builds(lambda text: Turn("user", text), _prose),
    st.lists(_assistant, min_size=1, max_size=2),
    st.none() | st.tuples(st.builds(lambda text: Turn("tool", text), _prose), _assistant),
).map(lambda parts: [parts[0], *parts[1], *(parts[2] or ())])
_turns = st.lists(_exchange, min_size=1, max_size=3).map(
    lambda parts: [turn for part in parts for turn in part]
)


def written(conversation: list[Turn], system: str, separator: str, quoted: bool) -> dict[str, str]:
    """A conversation as the data set's makers wrote it."""
    names = {"user": "USER", "assistant": "ASSISTANT", "tool": "FUNCTION RESPONSE"}
    chat = ""
    for turn in conversation:
        text = turn.content
        if turn.calls and quoted:
            calls = [
                f'<functioncall> {{"name": "{call.name}", "arguments": '
                f"'{json.dumps(call.arguments, ensure_ascii=False)}'}}"
                for call in turn.calls
            ]
            text = "\n".join([*([turn.prose] if turn.prose else []), *calls])
        chat += f"{names[turn.role]}: {text}"
        chat += f" <|endoftext|>{separator}" if turn.role == "assistant" else separator
    return {"system": f"SYSTEM: {system}\n", "chat": chat}


_dialogue = st.sampled_from(["\n\nASSISTANT: ", "\n\nUSER: "])


@given(_turns, st.lists(_dialogue, min_size=1, max_size=3))
def test_dialogues_in_what_users_and_functions_say_where_three_breaks_separate(
    conversation: list[Turn], inner: list[str]
) -> None:
    said = [
        Turn(turn.role, f"{turn.content}{''.join(f'{header}x' for header in inner)}")
        if turn.role in ("user", "tool")
        else turn
        for turn in conversation
    ]
    found = parse_glaive(written(said, "s", "\n\n\n", quoted=False), 1)
    assert isinstance(found, Conversation)
    assert [(turn.role, turn.content) for turn in found.turns[1:]] == [
        (turn.role, turn.content) for turn in said
    ]


def test_an_answer_that_holds_a_dialogue_of_its_own_goes_on_to_its_end() -> None:
    play = "Here it is:\n\n\nUSER: Is this a play?\n\n\nThe end."
    chat = (
        f"USER: Write one.\n\n\nASSISTANT: {play} <|endoftext|>\n\n\nUSER: Thanks\n\n\nASSISTANT: Any time."
    )
    found = parse_glaive({"chat": chat}, 1)
    assert isinstance(found, Conversation)
    assert [turn.content for turn in found.turns] == ["Write one.", play, "Thanks", "Any time."]
    assert found.notes == ("header_in_text",)


def test_a_turn_of_calls_that_cannot_be_read_takes_no_time_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def read_nothing(text: str) -> None:
        tried.append(text)

    monkeypatch.setattr(glaive, "read_call", read_nothing)
    said = "<functioncall> {" * 1000
    found = parse_glaive({"chat": f"USER: a\n\n\nASSISTANT: {said}"}, 1)
    assert isinstance(found, Conversation)
    assert found.turns[1].content == said
    assert found.notes == ("call_unparsable",) * 1000
    assert len(tried) < 1300


@given(_turns, _prose, st.sampled_from(["\n\n", "\n\n\n"]), st.booleans())
def test_what_is_written_as_glaive_is_read_back_equal(
    conversation: list[Turn], system: str, separator: str, quoted: bool
) -> None:
    found = parse_glaive(written(conversation, system, separator, quoted), 1)
    assert isinstance(found, Conversation)
    assert found.turns[0] == Turn("system", system)
    assert [(turn.role, turn.content) for turn in found.turns[1:]] == [
        (turn.role, turn.content) for turn in conversation
    ]
    assert [turn.calls for turn in found.turns[1:]] == [turn.calls for turn in conversation]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real rows are not at hand")
def test_every_real_row_survives() -> None:
    for name in ("glaive_raw", "glaive_chat_only_raw", "glaive_from_sharegpt"):
        lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for line, text in enumerate(lines, 1):
            row = json.loads(text)
            found = parse_glaive(row, line)
            assert isinstance(found, Conversation)
            chat = row["chat"]
            headers = sum(chat.count(f"{word}: ") for word in ("USER", "ASSISTANT", "FUNCTION RESPONSE"))
            assert len([turn for turn in found.turns if turn.role != "system"]) == headers
            assert sum(len(turn.calls) for turn in found.turns) == chat.count("<functioncall>")
            assert not any("<|endoftext|>" in turn.content for turn in found.turns)
            assert found.notes == ()
