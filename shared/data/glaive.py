"""Raw Glaive rows: `system` ("SYSTEM: …") and `chat` ("USER: … ASSISTANT: … <|endoftext|> …").

What is a real header, seen in real rows:
- Glaive separates turns by two or three line breaks, and an assistant's turn ends with `<|endoftext|>`.
  So after `<|endoftext|>` any header is real, and three breaks, Glaive's full separator, are always enough.
  Two are enough in rows without any `<|endoftext|>`, and where an answer must follow (after USER and
  FUNCTION RESPONSE) in rows whose turns no three breaks separate.
- A reading in which `<|endoftext|>` ends what a user or a function said missed a header: then the next
  looser one is tried (two breaks, then a header at a line's start where an answer must follow). Where none
  makes sense, three breaks within an answer may be its own: then it goes on to `<|endoftext|>`.
- Rows without any of these (one line a turn, as in the documentation) have a header at each line's start.
- Blank lines may hold spaces where a row has no plain ones. White space is matched up to a bound: an
  endless run of it must not cost quadratic time.
- A header is followed by a space; without one it is real after `<|endoftext|>`, three breaks, or where an
  answer must follow. `<|endoftext|>\\n\\n\\nASSISTANT:` without one, in an assistant's turn, is what the data
  set's makers' replacement left of the words "AI:" in running text, and is put back.
- A response that begins as JSON goes on to that JSON's end, whatever stands in it.
Everything else that looks like a header is words in somebody's text.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

from shared.data.calls import read_call
from shared.data.conversation import Call, Conversation, Dropped, Role, Turn, checked
from shared.data.depth import is_too_deep

END = "<|endoftext|>"
MARKER = "<functioncall>"

_ROLES: dict[str, Role] = {
    "SYSTEM": "system",
    "USER": "user",
    "ASSISTANT": "assistant",
    "FUNCTION RESPONSE": "tool",
}
_NAMED = (
    r"(?P<name>SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):"
    r"(?P<space>[ \t]|\Z|(?=\s{0,40}<functioncall>))?"
)
_HEADER = re.compile(r"(?P<before>(?:\A|<\|endoftext\|>)\s{0,40}|\n{2,41})" + _NAMED)
_SPACED_HEADER = re.compile(r"(?P<before>(?:\A|<\|endoftext\|>)\s{0,40}|(?:[ \t]{0,9}\n){2,41})" + _NAMED)
_END_OR_LINE_HEADER = re.compile(r"(?P<before>(?:\A|<\|endoftext\|>|\n)\s{0,40})" + _NAMED)
_LINE_HEADER = re.compile(
    r"(?P<before>(?:\A|\n)\s{0,40})(?P<name>SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):(?P<after>[ \t]?)"
)
_LOST_AI = re.compile(r"[ \t]{0,9}<\|endoftext\|>\s{0,40}ASSISTANT:(?=\s)")
_END_INSIDE = re.compile(r"[ \t]{0,9}<\|endoftext\|>[ \t]*")
_JUNK = re.compile(r"\A(?:\s|﻿|<\|endoftext\|>|<\|im_end\|>)+")
_SYSTEM_PREFIX = re.compile(r"\A\s*SYSTEM:\s*")
# Functions begin on a line of their own; a system text with many such braces holds something else.
_LIST_START = re.compile(r"^\[?[ \t\n]{0,9}(?=\{)", re.MULTILINE)
MAX_LIST_STARTS = 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_DECODER = json.JSONDecoder()
# Responses often hold line breaks that JSON would have escaped.
_RESPONSE_DECODER = json.JSONDecoder(strict=False)
MAX_BROKEN_RESPONSES = 20
MAX_JOINED = 8
# After so many calls of one turn that can't be read, the others are tried by themselves only.
MAX_UNREAD = 20
_LEFTOVER = re.compile(r"^(?:USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)


def parse_glaive(row: dict[str, Any], line: int, drop_unparsable: bool = False) -> Conversation | Dropped:
    """One row as a conversation."""
    system, chat = row.get("system"), row.get("chat")
    if not isinstance(chat, str) or not isinstance(system, str | None):
        return Dropped("wrong_format" if chat is None else "not_text", line)
    pieces = split_turns(_JUNK.sub("", _line_ends(chat)))
    if pieces is None:
        return Dropped("leading_text", line)
    if not pieces:
        return Dropped("empty" if not chat.strip() else "no_turns", line)
    notes: list[str] = []
    turns = [_turn(role, text, notes) for role, text in pieces]
    notes.extend("header_in_text" for turn in turns for _ in _LEFTOVER.finditer(turn.content))
    if drop_unparsable and "call_unparsable" in notes:
        return Dropped("unparsable_call", line)
    text = _SYSTEM_PREFIX.sub("", _line_ends(system or "")).strip()
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


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _headers(chat: str) -> list[re.Match[str]]:
    """The real headers; see the top of this file."""
    candidates = list(_HEADER.finditer(chat))
    if END not in chat:
        if all(match.start() == 0 or match["space"] is None for match in candidates):
            return list(_LINE_HEADER.finditer(chat))
        return _real(chat, candidates, 2)
    plain = [match for match in candidates if match["before"].startswith("\n")]
    if not plain:
        candidates = plain = list(_SPACED_HEADER.finditer(chat))
    full = any(_breaks(match) >= 3 and END not in match["before"] for match in plain)
    first = _real(chat, candidates, 3 if full else 2)
    if _consistent(chat, first):
        return first
    for looser in (candidates, list(_END_OR_LINE_HEADER.finditer(chat))):
        found = _real(chat, looser, 1)
        if _consistent(chat, found):
            return found
    whole = _real(chat, candidates, 3 if full else 2, whole_answers=True)
    return whole if _consistent(chat, whole) else first


def _real(
    chat: str, candidates: list[re.Match[str]], least: int, whole_answers: bool = False
) -> list[re.Match[str]]:
    """The candidates that are headers where an answer's header needs at least so many line breaks.

    Args:
        whole_answers: an answer ends at `<|endoftext|>` and nowhere else.
    """
    marked = END in chat
    real: list[re.Match[str]] = []
    json_ends = broken = 0
    for match in candidates:
        if match.start() < json_ends:
            continue
        before, name = match["before"], match["name"]
        previous = real[-1]["name"] if real else None
        if whole_answers and previous == "ASSISTANT" and END not in before:
            continue
        first = match.start() == 0
        due = name == "ASSISTANT" and previous in ("USER", "FUNCTION RESPONSE")
        answers = due and (_breaks(match) >= least or END in before)
        certain = END in before or _breaks(match) >= 3
        enough = certain or answers or previous == "SYSTEM" or not marked
        written = match["space"] is not None or answers or (certain and name != "ASSISTANT")
        if not (first or (enough and written and name != "SYSTEM")):
            continue
        real.append(match)
        if name == "FUNCTION RESPONSE" and broken < MAX_BROKEN_RESPONSES:
            json_ends = _json_end(chat, match.end())
            broken += not json_ends
    return real


def _breaks(match: re.Match[str]) -> int:
    return match["before"].count("\n")


def _json_end(chat: str, start: int) -> int:
    """Where the JSON object or list ends that a response begins with; 0 if it begins with none."""
    start += len(chat[start : start + 40]) - len(chat[start : start + 40].lstrip())
    if not chat.startswith(("{", "["), start):
        return 0
    try:
        end = _RESPONSE_DECODER.raw_decode(chat, start)[1]
    except (ValueError, RecursionError):
        return 0
    return 0 if chat.find(END, start, end) >= 0 else end


def _consistent(chat: str, headers: list[re.Match[str]]) -> bool:
    """Whether no `<|endoftext|>` ends what a user or a function said, unless the answer comes next."""
    for number, header in enumerate(headers):
        following = headers[number + 1] if number + 1 < len(headers) else None
        if header["name"] not in ("USER", "FUNCTION RESPONSE"):
            continue
        end = following.start() if following else len(chat)
        if chat.find(END, header.end(), end) >= 0:
            return False
        if following and END in following["before"] and following["name"] != "ASSISTANT":
            return False
    return bool(headers)


def parse_functions(system: str) -> tuple[dict[str, Any], ...]:
    """The functions that a system text lists as JSON objects one after the other; () if it lists none."""
    return find_functions(system)[0]


def find_functions(system: str) -> tuple[tuple[dict[str, Any], ...], int, int]:
    """The functions that a system text lists, and where in it their list begins and ends (0, 0: nowhere)."""
    starts = [match.end() for match in islice(_LIST_START.finditer(system), MAX_LIST_STARTS)]
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
            if is_too_deep(value, system[position:end_of_one]):
                break
            found.append(value)
            end = end_of_one
            between = _BETWEEN.match(system, end)
            position = between.end() if between else end
        if found:
            return tuple(found), *_with_brackets(system, start, end)
    return (), 0, 0


def _with_brackets(system: str, start: int, end: int) -> tuple[int, int]:
    """Where a list begins and ends, with the brackets that may stand around it."""
    before, after = system[:start].rstrip(), system[end:].lstrip()
    if before.endswith("[") and after.startswith("]"):
        return len(before) - 1, len(system) - len(after) + 1
    return start, end


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
    at = unread = 0
    while at < len(segments):
        found, used = _read_segments(segments, at, MAX_JOINED if unread < MAX_UNREAD else 1)
        if found is None:
            unread += 1
            notes.append("call_unparsable")
            content += MARKER + segments[at]
            prose += MARKER + segments[at]
        else:
            call, rest, repaired = found
            if repaired:
                notes.append("call_repaired")
            calls.append(call)
            content += f"{MARKER} {call.to_json()}{rest}"
            prose += rest
        at += used
    return Turn("assistant", content.strip(), trained, tuple(calls), prose.strip() if calls else "")


def _read_segments(segments: list[str], at: int, most: int) -> tuple[tuple[Call, str, bool] | None, int]:
    """The call that begins here, and how many segments it takes: a text inside it may hold the marker."""
    body = segments[at].lstrip()
    if not body.startswith("{"):
        return None, 1
    found = read_call(body)
    if found is not None:
        return found, 1
    for more in range(1, min(most, len(segments) - at)):
        body = f"{body}{MARKER}{segments[at + more]}"
        found = read_call(body)
        # Only what is certain: a mend that reaches over a marker could swallow the next call.
        if found is not None and not found[2]:
            return found, more + 1
    return None, 1
