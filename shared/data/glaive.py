"""Raw Glaive rows: `system` ("SYSTEM: …") and `chat` ("USER: … ASSISTANT: … <|endoftext|> …").

What is a real header, seen in real rows:
- Glaive separates turns by two or three line breaks, and an assistant's turn ends with `<|endoftext|>`.
  So after `<|endoftext|>` any header is real; two line breaks are enough where an answer must follow (after
  USER and FUNCTION RESPONSE) and in rows without any `<|endoftext|>`; three are Glaive's full separator
  and always enough.
- Rows without any of these (one line a turn, as in the documentation) have a header at each line's start.
- White space is matched up to a bound: an endless run of it must not cost quadratic time.
- A header is followed by a space. `<|endoftext|>\\n\\n\\nASSISTANT:` without one is what the data set's
  makers' replacement left of the words "AI:" in running text, and is put back.
Everything else that looks like a header is words in somebody's text.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

from shared.data.calls import read_call
from shared.data.conversation import Call, Conversation, Dropped, Role, Turn, checked

END = "<|endoftext|>"
MARKER = "<functioncall>"

_ROLES: dict[str, Role] = {
    "SYSTEM": "system",
    "USER": "user",
    "ASSISTANT": "assistant",
    "FUNCTION RESPONSE": "tool",
}
_HEADER = re.compile(
    r"(?P<before>(?:\A|<\|endoftext\|>)\s{0,40}|\n\n{1,40})"
    r"(?P<name>SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):(?P<after>[ \t]|\Z|(?=\s{0,40}<functioncall>))"
)
_LINE_HEADER = re.compile(
    r"(?P<before>(?:\A|\n)\s{0,40})(?P<name>SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):(?P<after>[ \t]?)"
)
_LOST_AI = re.compile(r"[ \t]{0,9}<\|endoftext\|>\s{0,40}ASSISTANT:(?=\s)")
_END_INSIDE = re.compile(r"[ \t]{0,9}<\|endoftext\|>[ \t]*")
_JUNK = re.compile(r"\A(?:\s|﻿|<\|endoftext\|>|<\|im_end\|>)+")
_SYSTEM_PREFIX = re.compile(r"\A\s*SYSTEM:\s*")
# Functions begin on a line of their own; a system text with many such braces holds something else.
_LIST_START = re.compile(r"^\{", re.MULTILINE)
MAX_LIST_STARTS = 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_DECODER = json.JSONDecoder()


def parse_glaive(row: dict[str, Any], line: int, drop_unparsable: bool = False) -> Conversation | Dropped:
    """One row as a conversation."""
    system, chat = row.get("system"), row.get("chat")
    if not isinstance(chat, str) or not isinstance(system, str | None):
        return Dropped("wrong_format" if chat is None else "not_text", line)
    pieces = split_turns(_JUNK.sub("", chat.replace("\r\n", "\n")))
    if pieces is None:
        return Dropped("leading_text", line)
    if not pieces:
        return Dropped("empty" if not chat.strip() else "no_turns", line)
    notes: list[str] = []
    turns = [_turn(role, text, notes) for role, text in pieces]
    if drop_unparsable and "call_unparsable" in notes:
        return Dropped("unparsable_call", line)
    text = _SYSTEM_PREFIX.sub("", (system or "").replace("\r\n", "\n")).strip()
    if text:
        turns.insert(0, Turn("system", text))
    tools = parse_functions(turns[0].content) if turns[0].role == "system" else ()
    return checked(Conversation(tuple(turns), tools, line, tuple(notes)))


def split_turns(chat: str) -> list[tuple[Role, str]] | None:
    """Role and raw text of each turn; None where text stands before the first header, [] without one."""
    headers = _headers(chat)
    if not headers:
        return []
    if chat[: headers[0].start()].strip():
        return None
    ends = [header.start() for header in headers[1:]] + [len(chat)]
    return [
        (_ROLES[header["name"]], chat[header.end() : end]) for header, end in zip(headers, ends, strict=True)
    ]


def _headers(chat: str) -> list[re.Match[str]]:
    """The real headers; see the top of this file."""
    candidates = list(_HEADER.finditer(chat))
    marked = END in chat
    if not marked and all(match.start() == 0 for match in candidates):
        return list(_LINE_HEADER.finditer(chat))
    real: list[re.Match[str]] = []
    for match in candidates:
        before, name = match["before"], match["name"]
        previous = real[-1]["name"] if real else None
        answers = name == "ASSISTANT" and previous in ("USER", "FUNCTION RESPONSE")
        first = match.start() == 0
        certain = END in before or answers or before.count("\n") >= 3 or previous == "SYSTEM"
        if first or ((certain or not marked) and name != "SYSTEM"):
            real.append(match)
    return real


def parse_functions(system: str) -> tuple[dict[str, Any], ...]:
    """The functions that a system text lists as JSON objects one after the other; () if it lists none."""
    return find_functions(system)[0]


def find_functions(system: str) -> tuple[tuple[dict[str, Any], ...], int, int]:
    """The functions that a system text lists, and where in it their list begins and ends (0, 0: nowhere)."""
    starts = [match.start() for match in islice(_LIST_START.finditer(system), MAX_LIST_STARTS)]
    for start in [*starts, system.find("{")]:
        found: list[dict[str, Any]] = []
        position = end = start
        while 0 <= position < len(system) and system[position] == "{":
            try:
                value, end_of_one = _DECODER.raw_decode(system, position)
            except (ValueError, RecursionError):
                break
            if not isinstance(value, dict) or not isinstance(value.get("name"), str):
                break
            found.append(value)
            end = end_of_one
            between = _BETWEEN.match(system, end)
            position = between.end() if between else end
        if found:
            return tuple(found), start, end
    return (), 0, 0


def _turn(role: Role, text: str, notes: list[str]) -> Turn:
    text = text.strip().removesuffix(END).rstrip()
    if END in text:
        if role == "assistant":
            text, count = _LOST_AI.subn(" AI:", text)
            notes.extend(["ai_restored"] * count)
        text = _END_INSIDE.sub(_between, text).strip()
    if role == "assistant" and MARKER in text:
        return calls_turn(text, notes)
    return Turn(role, text)


def _between(match: re.Match[str]) -> str:
    """What is left where `<|endoftext|>` stood: a space, if it parted two words."""
    left = match.string[match.start() - 1 : match.start()]
    right = match.string[match.end() : match.end() + 1]
    return " " if left.strip() and right.strip() else ""


def calls_turn(text: str, notes: list[str], trained: bool | None = None) -> Turn:
    """An assistant's turn with its calls parsed and written back as `<functioncall> {json}`.

    Text around the calls stays as it is; what can't be read stays verbatim and is noted.
    """
    lead, *segments = text.split(MARKER)
    content, prose, calls = lead, lead, list[Call]()
    for segment in segments:
        body = segment.lstrip()
        found = read_call(body) if body.startswith("{") else None
        if found is None:
            notes.append("call_unparsable")
            content += MARKER + segment
            prose += MARKER + segment
            continue
        call, rest, repaired = found
        if repaired:
            notes.append("call_repaired")
        calls.append(call)
        content += f"{MARKER} {call.to_json()}{rest}"
        prose += rest
    return Turn("assistant", content.strip(), trained, tuple(calls), prose.strip() if calls else "")
