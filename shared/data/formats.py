"""Which format a file has, and one function that turns a row of any format into a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Literal, get_args

from shared.data.conversation import Conversation, Dropped, Turn, checked
from shared.data.glaive import parse_glaive
from shared.data.messages import RowError, from_turns, listed, parse_messages, parse_sharegpt
from shared.data.reader import Row
from shared.errors import DatasetError

Format = Literal["glaive", "messages", "sharegpt", "alpaca", "text", "prompt_completion"]
FORMATS: tuple[str, ...] = get_args(Format)
_GLAIVE_HEADER = re.compile(r"(?:USER|ASSISTANT):")
ROWS_LOOKED_AT = 100
# These rows are held in memory, and one may have 16 MiB.
CHARACTERS_LOOKED_AT = 4 * 2**20


def conversations(
    rows: Iterable[Row], data_format: str = "auto", drop_unparsable: bool = False
) -> tuple[str, Iterator[Conversation | Dropped]]:
    """The format (found out from the first rows for `auto`) and every row parsed, in order.

    Raises:
        DatasetError: no rows, or no format that fits.
    """
    found, every = with_format(rows, data_format)
    return found, (parse_row(row, found, line, drop_unparsable) for line, row in every)


def with_format(rows: Iterable[Row], data_format: str = "auto") -> tuple[str, Iterator[Row]]:
    """The format, and every row.

    Raises:
        DatasetError: no rows, or no format that fits.
    """
    iterator = iter(rows)
    first: list[Row] = []
    characters = 0
    for row in iterator:
        first.append(row)
        characters += len(str(row[1]))
        if len(first) >= ROWS_LOOKED_AT or characters >= CHARACTERS_LOOKED_AT:
            break
    if not first:
        raise DatasetError("The file holds no rows.")
    if data_format == "auto":
        data_format = detect_format([row for _, row in first])
    return data_format, chain(_taken(first), iterator)


def _taken(rows: list[Row]) -> Iterator[Row]:
    """Each row, given up here as soon as it is taken."""
    rows.reverse()
    while rows:
        yield rows.pop()


def detect_format(first_rows: list[dict[str, Any]]) -> str:
    """The format that most of these rows fit; the first in `FORMATS` where two fit alike.

    Raises:
        DatasetError: where none fits any row; it names the columns that there are.
    """
    votes = dict.fromkeys(FORMATS, 0)
    for row in first_rows:
        found = _format_of(row)
        if found is not None:
            votes[found] += 1
    best = max(FORMATS, key=lambda name: votes[name])
    if votes[best]:
        return best
    columns = sorted({_printable(str(key)[:40]) for row in first_rows for key in row})[:20]
    raise DatasetError(
        f"The rows have the columns {', '.join(columns) or 'none at all'}, which fit no known format. Wanted "
        "are system and chat (glaive), messages, conversations (sharegpt), instruction and output (alpaca), "
        "prompt and completion, or text."
    )


def _printable(name: str) -> str:
    """A column's name as it can be stored and sent: no half of a surrogate pair, no control characters."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def parse_row(
    row: dict[str, Any], data_format: str, line: int, drop_unparsable: bool = False
) -> Conversation | Dropped:
    """One row as a conversation, or why it can't be used.

    Args:
        data_format: one of `FORMATS`.
        line: 1-based, for reports.
        drop_unparsable: drop a row with a call that can't be parsed, instead of keeping the call's text.
    """
    match data_format:
        case "glaive":
            return parse_glaive(row, line, drop_unparsable)
        case "messages":
            return parse_messages(row, line, drop_unparsable)
        case "sharegpt":
            return parse_sharegpt(row, line, drop_unparsable)
        case "alpaca":
            return _parse_alpaca(row, line)
        case "prompt_completion":
            return _parse_prompt_completion(row, line, drop_unparsable)
        case "text":
            return _parse_text(row, line)
    raise ValueError(f"no format {data_format!r}")


def _format_of(row: dict[str, Any]) -> str | None:
    chat = row.get("chat")
    if isinstance(chat, str) and _GLAIVE_HEADER.search(chat):
        return "glaive"
    for key in ("messages", "conversations", "conversation"):
        turns = listed(row.get(key))
        if isinstance(turns, list):
            first = turns[0] if turns else {}
            return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    if isinstance(row.get("instruction"), str) and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if isinstance(row.get("text"), str):
        return "text"
    return "glaive" if isinstance(chat, str) else None


def _string(row: dict[str, Any], key: str) -> str:
    """A column's text; "" for null and for a column that is absent."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("not_text")
    return value


def _parse_alpaca(row: dict[str, Any], line: int) -> Conversation | Dropped:
    """`instruction`, `output`, and if wanted `input`, `system` and `history` (earlier pairs)."""
    if "instruction" not in row or "output" not in row:
        return Dropped("wrong_format", line)
    turns: list[Turn] = []
    try:
        if system := _string(row, "system"):
            turns.append(Turn("system", system))
        for pair in listed(row.get("history")) or ():
            if not (
                isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
            ):
                raise RowError("not_text")
            turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
        instruction, given = _string(row, "instruction"), _string(row, "input")
        turns.append(Turn("user", "\n\n".join(text for text in (instruction, given) if text)))
        turns.append(Turn("assistant", _string(row, "output")))
    except (RowError, TypeError):
        return Dropped("not_text", line)
    return checked(Conversation(tuple(turns), (), line))


def _parse_prompt_completion(row: dict[str, Any], line: int, drop_unparsable: bool) -> Conversation | Dropped:
    """`prompt` and `completion`, each a text or a list of messages; only the completion is trained on."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return Dropped("wrong_format", line)
    before, after = _messages(prompt, "user"), _messages(completion, "assistant")
    if not isinstance(before, list) or not isinstance(after, list):
        return Dropped("not_text", line)
    return from_turns([*before, *after], row, line, drop_unparsable, untrained=len(before))


def _messages(value: Any, role: str) -> Any:
    """A prompt or completion as messages, which may be written as JSON as CSV files have it."""
    if not isinstance(value, str):
        return value
    found = listed(value)
    is_list = isinstance(found, list) and all(isinstance(m, dict) and "role" in m for m in found)
    return found if is_list and found else [{"role": role, "content": value}]


def _parse_text(row: dict[str, Any], line: int) -> Conversation | Dropped:
    """`text`: a document that is trained on as it is."""
    text = row.get("text")
    if not isinstance(text, str):
        return Dropped("wrong_format" if text is None else "not_text", line)
    return checked(Conversation((Turn("assistant", text, True),), (), line, plain=True))
