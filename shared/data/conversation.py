"""What every data format is turned into: a conversation of plain text turns."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

INVALID_TEXT = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Call:
    """One function call.

    Attributes:
        arguments: what its JSON held: an object nearly always.
        id: what a result names it by, for templates that write it; "" without one.
    """

    name: str
    arguments: Any
    id: str = field(default="", compare=False)

    def to_json(self) -> str:
        """`{"name": …, "arguments": …}` on one line, non-ASCII as it is.

        Raises:
            ValueError: for an infinite number, which JSON lacks.
        """
        return json.dumps(
            {"name": self.name, "arguments": self.arguments}, ensure_ascii=False, allow_nan=False
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn.

    Attributes:
        content: the turn's whole text, calls written out as `<functioncall> {json}`.
        trained: False for a turn that must not be trained on (`weight: 0`), True for one that must be
            (a whole text), None for what the role says.
        calls: the calls that `content` holds and that could be parsed, in order.
        prose: `content` without its calls, where it has some.
        answers, name: of a tool's turn the id of the call and the name of the function; "" if not given.
    """

    role: Role
    content: str
    trained: bool | None = None
    calls: tuple[Call, ...] = ()
    prose: str = ""
    answers: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row that can be used.

    Attributes:
        turns: at least one; a system turn comes first.
        tools: the functions on offer, as the row has them; the system turn's text already names them.
        line: 1-based line (JSONL, CSV) or row (JSON array, Parquet, hub) of the file.
        notes: what was remarkable and kept all the same, one word each time it occurs.
        plain: one text to be trained on as it is, without roles (format `text`).
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]
    line: int
    notes: tuple[str, ...] = ()
    plain: bool = False

    def key(self) -> int:
        """64 bits that are equal for conversations that say the same and train the same.

        Line, notes, line endings and white space around a turn play no part.
        """
        return _hash([[turn.role, turn.trained, _normal(turn.content)] for turn in self.turns])

    def said(self) -> int:
        """As `key`, whatever is trained of it."""
        return _hash([[turn.role, _normal(turn.content)] for turn in self.turns])


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that can't be used, and why: one of `REASONS`."""

    reason: str
    line: int


REASONS: dict[str, str] = {
    "wrong_format": "the row lacks the columns of the file's format",
    "not_text": "a number, object or picture where text belongs",
    "invalid_text": "NUL or half of a surrogate pair in the text",
    "empty": "no turn has any text",
    "no_turns": "no turn begins with a known header",
    "leading_text": "text before the first turn's header",
    "unknown_role": "a role other than system, user, assistant and tool",
    "invalid_tools": "the row's tools are no list of functions",
    "invalid_weight": "a weight other than 0 and 1",
    "unparsable_call": "a function call that can't be read with certainty",
    "duplicate": "the same conversation as an earlier row",
    "in_validation": "also in the validation data, so it must not be trained on",
    "nothing_to_train_on": "no assistant turn with text",
    "not_rendered": "the model's chat template can't render it faithfully",
    "too_long": "more tokens than max_seq_length",
}


def _normal(content: str) -> str:
    return content.replace("\r\n", "\n").replace("\r", "\n").strip()


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")


def checked(conversation: Conversation) -> Conversation | Dropped:
    """The last checks that every format shares."""
    for turn in conversation.turns:
        if INVALID_TEXT.search(turn.content):
            return Dropped("invalid_text", conversation.line)
    if not any(turn.content.strip() for turn in conversation.turns):
        return Dropped("empty", conversation.line)
    # An answer without any text stays in the conversation, but nobody should learn to say nothing.
    silent = sum(turn.role == "assistant" and not turn.content.strip() for turn in conversation.turns)
    if silent:
        return replace(conversation, notes=(*conversation.notes, *["empty_answer"] * silent))
    return conversation
