"""Reading a function call as Glaive writes it, whatever its quoting, and only where it is certain.

A call is `{"name": "f", "arguments": …}` with the arguments as an object, as a JSON string, or as JSON in
single quotes that were never escaped (`'{"message": "Hey, let's meet"}'`). JSON's own grammar tells where
such a text ends, so apostrophes and line breaks inside it need no guessing.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any, NoReturn

from shared.data.conversation import Call
from shared.data.depth import is_too_deep

# A repair tries every place for one brace: beyond this it would take too long.
MAX_REPAIRED = 2000
MAX_PLACES = 60
MAX_LITERAL = 20_000

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')
_QUOTED_TAIL = re.compile(r"\s*'\s*\}")
_ONLY_BRACES = re.compile(r"[\s}]*")
# An apostrophe that was escaped as Python or JavaScript would; JSON has no such escape.
_ESCAPED_APOSTROPHE = re.compile(r"(?<!\\)((?:\\\\)*)\\'")
_VALUE_END = re.compile(r"[,\]}]|\Z")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice, and one of its values would be lost")
    return found


_DECODER = json.JSONDecoder(
    strict=False, parse_constant=_refuse_constant, object_pairs_hook=_with_each_key_once
)


def read_call(text: str) -> tuple[Call, str, bool] | None:
    """The call that `text` begins with (a brace), or None where it can't be read with certainty.

    Args:
        text: up to the end of the turn or to the next call's marker.

    Returns:
        the call, the text after it, and whether something had to be mended.
    """
    found = _read(text) or _read_repaired(text) or _read_literal(text)
    if found is None:
        return None
    call, rest, repaired = found
    try:
        call.to_json()
    except (ValueError, RecursionError):
        return None
    if is_too_deep(call.arguments, text):
        return None
    if rest.strip() and _ONLY_BRACES.fullmatch(rest):
        return call, "", True
    return call, rest, repaired


def read_arguments(text: str) -> Any:
    """The JSON value that a string of arguments holds.

    Raises:
        ValueError: where it holds none, or none that JSON could write back.
    """
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip()))
        json.dumps(value, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if is_too_deep(value, text):
        raise ValueError("nested too deeply")
    if text[end:].strip():
        raise ValueError("something follows the arguments")
    if isinstance(value, str):
        raise ValueError("the arguments are a text")
    return value


def _read(text: str) -> tuple[Call, str, bool] | None:
    """A call that is valid JSON, or whose arguments are valid JSON in single quotes."""
    value, end = _decode(text)
    if end:
        call = _from_object(value)
        return None if call is None else (call, text[end:], False)
    head = _HEAD.match(text)
    if head is None or not text.startswith("'", head.end()):
        return None
    name = json.loads(head[1], strict=False)
    body = text[head.end() + 1 :]
    # Each way to read what lies between the quotes, the plainest first.
    for candidate in (body, _unescape_apostrophes(body), _unescape_quotes(body)):
        value, end = _decode(candidate)
        tail = _QUOTED_TAIL.match(candidate, end) if end else None
        if tail is None or not isinstance(value, dict | list):
            continue
        rest = candidate[tail.end() :]
        if candidate is body:
            return Call(name, value), rest, False
        # A mend may have touched what follows the call as well: then nothing may follow.
        if not rest.strip() or _ONLY_BRACES.fullmatch(rest):
            return Call(name, value), "", True
    return None


def _read_repaired(text: str) -> tuple[Call, str, bool] | None:
    """A call up to the end of the text that lacks one closing brace whose place is certain."""
    body = text.strip()
    head = _HEAD.match(body) if len(body) <= MAX_REPAIRED else None
    if head is None:
        return None
    name = json.loads(head[1], strict=False)
    value: Any
    if not body.startswith("'", head.end()):
        # The outer brace is missing: the arguments are complete.
        value, end = _decode(body[head.end() :])
        complete = end == len(body) - head.end() and isinstance(value, dict)
        return (Call(name, value), "", True) if complete else None
    closing = body.rfind("'")
    if closing <= head.end() or not _ONLY_BRACES.fullmatch(body[closing + 1 :]):
        return None
    arguments = body[head.end() + 1 : closing]
    value, end = _decode(arguments)
    if not (end and not arguments[end:].strip() and isinstance(value, dict | list)):
        value = _with_one_brace(arguments)
    return None if value is None else (Call(name, value), "", True)


def _with_one_brace(arguments: str) -> dict[str, Any] | None:
    """The only object that one closing brace more can make of this text; None if there are several."""
    strings = [match.span() for match in _STRING.finditer(arguments)]
    bare = _STRING.sub("", arguments)
    if bare.count("{") - bare.count("}") != 1:
        return None
    found: list[dict[str, Any]] = []
    # A value ends before a comma, a closing bracket or the end of the text.
    places = [match.start() for match in _VALUE_END.finditer(arguments)]
    for place in places if len(places) <= MAX_PLACES else ():
        if any(begin < place < end for begin, end in strings):
            continue
        candidate = arguments[:place] + "}" + arguments[place:]
        value, end = _decode(candidate)
        if end and not candidate[end:].strip() and isinstance(value, dict) and value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else None


def _read_literal(text: str) -> tuple[Call, str, bool] | None:
    """A call written as a Python literal, `{'name': 'f', 'arguments': {'a': True}}`, up to the end."""
    body = text.strip()
    if len(body) > MAX_LITERAL or not body.startswith(("{'", "{ '")):
        return None
    with warnings.catch_warnings():
        # Python warns of escapes that it doesn't know; they are kept as they are.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(body, mode="eval")
            value = ast.literal_eval(tree)
            json.dumps(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    call = _from_object(value)
    twice = any(isinstance(node, ast.Dict) and _has_a_key_twice(node) for node in ast.walk(tree))
    return None if call is None or twice or not _is_plain(value) else (call, "", True)


def _from_object(value: Any) -> Call | None:
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str):
        return None
    if isinstance(arguments, str):
        try:
            arguments = read_arguments(arguments)
        except ValueError:
            return None
    # null, a number or a bare text is JSON, but not what the function would be called with.
    return Call(name, arguments) if isinstance(arguments, dict | list) else None


def _has_a_key_twice(node: ast.Dict) -> bool:
    return len({key.value for key in node.keys if isinstance(key, ast.Constant)}) < len(node.keys)


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back as it is: no tuples, no keys that are not text."""
    return bool(json.loads(json.dumps(value)) == value)


def _decode(text: str) -> tuple[Any, int]:
    """The JSON value that the text begins with and the index after it, or (None, 0)."""
    try:
        return _DECODER.raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):
        return None, 0


def _unescape_apostrophes(text: str) -> str:
    return _ESCAPED_APOSTROPHE.sub(r"\1'", text)


def _unescape_quotes(text: str) -> str:
    return text.replace('\\"', '"')
