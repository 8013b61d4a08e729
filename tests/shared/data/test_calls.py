"""Function calls in every quoting that real rows have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.calls import read_arguments, read_call
from shared.data.conversation import Call


@pytest.mark.parametrize(
    ("text", "arguments", "repaired"),
    [
        ("""{"name": "f", "arguments": '{"country": "France"}'}""", {"country": "France"}, False),
        ("""{"name": "f", "arguments": '{"m": "Hey, let's meet"}'}""", {"m": "Hey, let's meet"}, False),
        ("""{"name": "f", "arguments": '{\n  "a": "x\ny"\n}'}""", {"a": "x\ny"}, False),
        ("""{"name": "f", "arguments": {\n "a": 1.75\n}}""", {"a": 1.75}, False),
        ("""{"name": "f", "arguments": "{\\"a\\": \\"b\\"}"}""", {"a": "b"}, False),
        ("""{"name": "f", "arguments": '[5, 10]'}""", [5, 10], False),
        ("""{"name": "f", "arguments": '{"q": "Je suis étudiant"}'}""", {"q": "Je suis étudiant"}, False),
        ("""{"name": "f", "arguments": '{"t": "life\\'s full"}'}""", {"t": "life's full"}, True),
        ("""{"name": "f", "arguments": '{\\"t\\": 1}'}""", {"t": 1}, True),
        ("""{"name": "f", "arguments": '{"s": "A"}'}}""", {"s": "A"}, True),
        ("""{"name": "f", "arguments": '{"s": "A"}'""", {"s": "A"}, True),
        ("""{"name": "f", "arguments": {"s": "A"}""", {"s": "A"}, True),
        ("""{"name": "f", "arguments": '{"s": {"t": 1}'}""", {"s": {"t": 1}}, True),
        ("""{'name': 'f', 'arguments': {'s': True, 'n': None}}""", {"s": True, "n": None}, True),
    ],
)  # fmt: skip
def test_read(text: str, arguments: Any, repaired: bool) -> None:
    assert read_call(text) == (Call("f", arguments), "", repaired)
    written = read_call(Call("f", arguments).to_json())
    assert written == (Call("f", arguments), "", False)


@pytest.mark.parametrize(
    "text",
    [
        """{"name": "f", "arguments": '{"range": [70001, Infinity]}'}""",
        """{"name": "f", "arguments": {"x": NaN}}""",
        """{"name": "f", "arguments": {"x": 1e999}}""",
        """{"name": "f", "arguments": '{"data": [User provided data]}'}""",
        """{"name": "f", "arguments": null}""",
        """{"name": "f", "arguments": 'Tokyo'}""",
        """{"name": "f", "parameters": {}}""",
        """{"name": "f", "arguments": {}, "more": 1}""",
        """{"name": 5, "arguments": {}}""",
        """{"name": "f", "arguments": '{"artist": "Ed Sheeran", "title": " """,
        """{"name": "f", "arguments": {"n": 12""",
        """{"name": "f", "arguments": '{"say": "the "best" day"}'}""",
        # Two places for the missing brace give two meanings.
        """{"name": "f", "arguments": '{"a": {"b": 1, "c": 2}'}""",
        """{'name': 'f', 'arguments': {1: 2}}""",
        """{'name': 'f', 'arguments': {'a': (1, 2)}}""",
        """{'name': 'f', 'arguments': __import__('os')}""",
        # A key twice: which of the two is meant, nobody knows.
        '{"name": "f", "arguments": {"a": 1, "a": 2}}',
        """{"name": "f", "arguments": '{"a": {"b": 1, "b": 2}}'}""",
        '{"name": "f", "name": "g", "arguments": {}}',
        """{'name': 'f', 'arguments': {'a': 1, 'a': 2}}""",
        "{" * 5000,
        '{"name": "f", "arguments": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
def test_what_is_uncertain_is_not_read(text: str) -> None:
    assert read_call(text) is None


def test_what_follows_the_call_is_given_back() -> None:
    assert read_call("""{"name": "f", "arguments": '{}'} so it's done""") == (
        Call("f", {}),
        " so it's done",
        False,
    )


def test_arguments_that_are_no_json_value() -> None:
    for text in ("", "Tokyo", '"Tokyo"', "{} {}", "[NaN]", '{"a": 1, "a": 2}', "[" * 5000):
        with pytest.raises(ValueError):  # noqa: PT011 - any kind of ValueError says it
            read_arguments(text)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=5), _json, max_size=4), st.booleans(), st.sampled_from([None, 2]))
def test_single_quoted_json_is_read_whatever_it_holds(
    value: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found = read_call(f"""{{"name": "f", "arguments": '{body}'}} rest""")
    assert found == (Call("f", json.loads(body)), " rest", False)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    for candidate in (
        text,
        "{" + text,
        f'{{"name": "f", "arguments": {text}',
        f"""{{"name": "f", "arguments": '{text}'}}""",
    ):
        found = read_call(candidate)
        if found is not None:
            assert json.loads(found[0].to_json())["name"] == found[0].name
