"""Reading the calls that a model writes in its answer, while the answer comes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shared.data.calls import read_call
from shared.data.conversation import Call
from shared.data.glaive import MARKER


@dataclass(frozen=True)
class CallStyle:
    """How calls are written: `opening` before each, then its JSON, then `closing`.

    An empty opening says that an answer which is nothing but JSON is a call.
    """

    opening: str
    closing: str = ""


FUNCTIONCALL = CallStyle(MARKER)


@dataclass(frozen=True)
class Answer:
    """What an answer's end came to: text that was not told yet, and the calls."""

    text: str
    calls: tuple[Call, ...] = ()


class CallReader:
    """Parts an answer that comes in pieces into what is said and what is called."""

    def __init__(self, style: CallStyle) -> None:
        self._style = style
        self._held = ""
        self._calling = False

    def feed(self, text: str) -> str:
        """What can be told of the answer so far: text that is certainly no call."""
        self._held += text
        if self._calling:
            return ""
        opening = self._style.opening
        at = self._held.find(opening) if opening else _json_start(self._held)
        if at >= 0:
            self._calling = True
        else:
            at = len(self._held) - held_back(self._held, [opening])
        # White space before a call is the template's; elsewhere it comes with the next word.
        told = self._held[:at].rstrip()
        self._held = self._held[len(told) :]
        return told

    def end(self) -> Answer:
        """The rest. What can't be read as calls is text."""
        held, self._held = self._held, ""
        found = read_calls(held, self._style) if self._calling else None
        return Answer(held) if found is None else found


def read_calls(text: str, style: CallStyle) -> Answer | None:
    """The calls of a text that begins with one, and what it says besides; None where one can't be read."""
    pieces = text.split(style.opening)[1:] if style.opening else [text]
    calls: list[Call] = []
    said: list[str] = []
    for piece in pieces:
        found = _functioncall(piece) if style == FUNCTIONCALL else _template_calls(piece, style.closing)
        if found is None:
            return None
        calls += found[0]
        said.append(found[1])
    return Answer("".join(said).strip(), tuple(calls)) if calls else None


def held_back(text: str, words: Iterable[str]) -> int:
    """How many of the text's last characters may be the beginning of one of the words."""
    most = 0
    for word in words:
        for length in range(min(len(word) - 1, len(text)), most, -1):
            if text.endswith(word[:length]):
                most = length
                break
    return most


def _json_start(text: str) -> int:
    """0 where an answer begins as JSON, or may still do so; else -1."""
    return 0 if text.lstrip()[:1] in ("{", "[") else -1


def _functioncall(piece: str) -> tuple[list[Call], str] | None:
    found = read_call(piece.strip())
    return None if found is None else ([found[0]], found[1])


def _template_calls(piece: str, closing: str) -> tuple[list[Call], str] | None:
    """The call, or the list of calls, that a piece begins with, and what follows it."""
    body = piece.strip()
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(body)
        calls = [_call(entry) for entry in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None
    return calls, body[end:].strip().removeprefix(closing).strip()


def _call(entry: Any) -> Call:
    """`{"name", "arguments"}`, or with `parameters`, as some templates have it.

    Raises:
        ValueError: it is something else.
    """
    entry = entry.get("function", entry) if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError("no call")
    arguments = entry.get("arguments", entry.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict | list):
        raise ValueError("no arguments")
    call = Call(entry["name"], arguments)
    call.to_json()
    return call
