"""Calls in an answer, however it comes in pieces."""

from __future__ import annotations

import pytest

from shared.data.conversation import Call
from shared.data.written_calls import FUNCTIONCALL, Answer, CallReader, CallStyle, held_back

TEMPLATE = CallStyle("<tool_call>", "</tool_call>")
LISTED = CallStyle("[TOOL_CALLS]")
BARE = CallStyle("")
OSLO, ROME = Call("tide", {"city": "Oslo"}), Call("tide", {"city": "Rome"})


def read(text: str, style: CallStyle, size: int) -> Answer:
    """The whole answer, read in pieces of this many characters."""
    reader = CallReader(style)
    said = "".join(reader.feed(text[at : at + size]) for at in range(0, len(text), size))
    end = reader.end()
    return Answer(said + end.text, end.calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("style", "text", "answer"),
    [
        (FUNCTIONCALL, '<functioncall> {"name": "tide", "arguments": \'{"city": "Oslo"}\'}',
         Answer("", (OSLO,))),
        (FUNCTIONCALL, 'Let me see.\n<functioncall> {"name": "tide", "arguments": {"city": "Oslo"}}\n'
                       '<functioncall> {"name": "tide", "arguments": {"city": "Rome"}}',
         Answer("Let me see.", (OSLO, ROME))),
        (TEMPLATE, '<tool_call>\n{"name": "tide", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>\n'
                   '{"name": "tide", "arguments": {"city": "Rome"}}\n</tool_call>', Answer("", (OSLO, ROME))),
        (LISTED, '[TOOL_CALLS][{"name": "tide", "arguments": {"city": "Oslo"}, "id": "123456789"}, '
                 '{"name": "tide", "arguments": {"city": "Rome"}}]', Answer("", (OSLO, ROME))),
        (BARE, '{"name": "tide", "parameters": {"city": "Oslo"}}', Answer("", (OSLO,))),
        (BARE, "The tide {in Oslo} is high. ", Answer("The tide {in Oslo} is high. ")),
        (BARE, '{"answer": 5}', Answer('{"answer": 5}')),
        (BARE, '["a", "b"]', Answer('["a", "b"]')),
        (TEMPLATE, "a <tool_ca b <", Answer("a <tool_ca b <")),
        # Cut off, or no call at all: what the model said is told as it is.
        (TEMPLATE, 'x <tool_call>\n{"name": "tide", "argu', Answer('x <tool_call>\n{"name": "tide", "argu')),
        (TEMPLATE, '<tool_call>{"name": 5}', Answer('<tool_call>{"name": 5}')),
        (TEMPLATE, '<tool_call>{"name": "a", "arguments": "{"}',
         Answer('<tool_call>{"name": "a", "arguments": "{"}')),
        (FUNCTIONCALL, "<functioncall> call me", Answer("<functioncall> call me")),
        (TEMPLATE, "<tool_call>" + "[" * 100_000, Answer("<tool_call>" + "[" * 100_000)),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_calls_are_told_from_words(style: CallStyle, text: str, answer: Answer, size: int) -> None:
    if size == 1 and len(text) > 1000:
        size = 100
    assert read(text, style, size) == answer


def test_words_are_told_as_soon_as_they_can_be_no_call() -> None:
    reader = CallReader(TEMPLATE)
    assert reader.feed("Let me see. <to") == "Let me see."
    assert reader.feed("morrow>") == " <tomorrow>"
    assert reader.end() == Answer("")


def test_what_may_become_a_word_is_held_back() -> None:
    assert held_back("an e", ["end", "nd"]) == 1
    assert held_back("an en", ["end", "no"]) == 2
    assert held_back("and", ["end"]) == 0
    assert held_back("", ["end"]) == 0
