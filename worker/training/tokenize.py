"""Conversations to token ids and loss mask, with words that look like control tokens kept as words.

The model's tokenizer would turn a `<|im_end|>` that a user typed into the control token. So a copy of it is
made whose special tokens have secret names; the rendered text carries those names where a delimiter is meant,
and whatever somebody typed is tokenised as ordinary text. For conversations without such words the ids are
exactly those of `apply_chat_template`, for text and tokenizer are otherwise the same.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from shared.data.chatml import END, START, Span
from shared.data.conversation import Call, Conversation
from worker.training.templates import Template, adds_bos

# Some tokenizers mark their tokens for single bytes as special; ordinary text gives those too.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
CUT = "cut_at_a_turns_end"
ESCAPED = "delimiter_escaped"
DELIMITER_IN_TEXT = "delimiter_in_text"
# A text of fewer characters is tokenised whole; a longer one in pieces first, where it may be over the limit.
ALWAYS_TOKENISED = PIECE = 2**16
# Tokens that there may be more of because a piece ended within a word.
BORDER = 256

Refusal = Literal["not_rendered", "too_long"]


@dataclass(frozen=True)
class Tokens:
    """One document.

    Attributes:
        ids: int32 [tokens].
        trained: bool [tokens]; the first token is never trained, for nothing comes before it.
        said: int32, the ids without what the template writes after the last turn's end.
        notes: what was done to it, to be counted.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    said: npt.NDArray[np.int32]
    notes: tuple[str, ...]


class Encoder:
    """Tokenises conversations for one model."""

    def __init__(
        self, tokenizer: Any, template: Template, limit: int | None = None, cuts: bool = False
    ) -> None:
        """
        Args:
            tokenizer: a fast tokenizer of transformers.
            limit: the most tokens of one document, if there is a limit.
            cuts: longer ones are cut at a turn's end, where one that is trained ends in time; else they are
                left for the caller to drop, but for those so long that they needn't be tokenised to know.
        """
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._template = template
        self._limit = limit
        self._cuts = cuts
        self._longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        self._bos: str = tokenizer.bos_token if adds_bos(tokenizer) else ""
        self._text_end: str = template.stop_token or tokenizer.eos_token or ""
        self._copy, self._names, self._original = _secret_copy(backend)
        self._special = _any_of(tuple(self._names))
        self._escape = _any_of(template.escape)
        # Stands for a special token's words that somebody wrote, while a template is at work on them.
        self._words = [text for text in self._names if not _BYTE.fullmatch(text)]
        self._typed = _any_of(tuple(self._words))
        secret = secrets.token_hex(4)
        self._marks = {text: f"\ue002{secret}-{number}\ue003" for number, text in enumerate(self._words)}
        self._mark = re.compile(f"\ue002{secret}-(\\d+)\ue003")
        unknown = tokenizer.unk_token_id
        # Ids that may come only from a secret name. An unknown character gives the unknown token honestly.
        self._control = np.zeros(len(self._original), dtype=bool)
        controls = [backend.token_to_id(text) for text in self._words]
        self._control[[number for number in controls if number not in (None, unknown)]] = True

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens | Refusal]:
        """Each conversation as one document, or why not.

        `not_rendered`: the template can't render it faithfully. `too_long`: far over the limit.
        """
        laid_out = [self._laid_out(conversation) for conversation in conversations]
        texts = [found.text for found in laid_out if isinstance(found, _Text)]
        encodings = iter(self._copy.encode_batch(texts, add_special_tokens=False))
        return [
            self._tokens(conversation, found, next(encodings)) if isinstance(found, _Text) else found
            for conversation, found in zip(conversations, laid_out, strict=True)
        ]

    def _laid_out(self, conversation: Conversation) -> _Text | Refusal:
        notes: tuple[str, ...] = ()
        if any(self._escape.search(turn.content) for turn in conversation.turns):
            conversation, notes = _escaped(conversation, self._template.escape), (ESCAPED,)
        typed = any(self._typed.search(turn.content) for turn in conversation.turns)
        if typed:
            notes = notes or (DELIMITER_IN_TEXT,)
            conversation = _changed(conversation, self._hidden)
        spans = self._plain(conversation) if conversation.plain else self._template.spans(conversation)
        if spans is None:
            return "not_rendered"
        pieces: list[str] = []
        ranges: list[tuple[int, int]] = []
        ends: list[int] = []
        position = 0
        for span in spans:
            piece = self._named(span.text) if span.control else span.text
            if typed:
                piece = self._mark.sub(lambda match: self._words[int(match[1])], piece)
            pieces.append(piece)
            start, position = position, position + len(piece)
            if span.trained:
                if ranges and ranges[-1][1] == start:
                    start = ranges.pop()[0]
                ranges.append((start, position))
            if span.ends_turn:
                ends.append(position)
        text = "".join(pieces)
        # Calls and tools that the template writes may hold what no turn's text does.
        if _SURROGATE.search(text):
            return "not_rendered"
        return self._bounded(_Text(text, ranges, ends, notes))

    def _bounded(self, text: _Text) -> _Text | Refusal:
        """The text, without the turns that are certainly over the limit if it may be cut."""
        most = self._reach(text.text)
        if most >= len(text.text):
            return text
        ends = [end for end in text.ends if end <= most]
        if not self._cuts or not ends:
            return "too_long"
        ranges = [(start, min(end, ends[-1])) for start, end in text.ranges if start < ends[-1]]
        return _Text(text.text[: ends[-1]], ranges, ends, text.notes, cut=True)

    def _reach(self, text: str) -> int:
        """After how many characters a text is over the limit for certain; its length if it may not be.

        Tokenising takes some 500 bytes a token, so long texts are tried in pieces first.
        """
        if self._limit is None or len(text) <= ALWAYS_TOKENISED:
            return len(text)
        if len(text) > (bound := self._limit * self._longest):
            text = text[:bound]
        count = 0
        for number, at in enumerate(range(0, len(text), PIECE), 1):
            count += len(self._copy.encode(text[at : at + PIECE], add_special_tokens=False))
            if count > self._limit + number * BORDER:
                return min(at + PIECE, len(text))
        return len(text)

    def _hidden(self, text: str) -> str:
        return self._typed.sub(lambda match: self._marks[match[0]], text)

    def _plain(self, conversation: Conversation) -> list[Span]:
        """A text as it is, all of it trained, between BOS and the end that generation stops at."""
        words = [Span(turn.content, turn.trained is not False) for turn in conversation.turns]
        return [Span(self._bos, False, True), *words, Span(self._text_end, True, True)]

    def _named(self, text: str) -> str:
        name = self._names.get(text)
        return name or self._special.sub(lambda match: self._names[match[0]], text)

    def _tokens(self, conversation: Conversation, text: _Text, encoding: Encoding) -> Tokens | Refusal:
        ids = np.asarray(encoding.ids, dtype=np.int32)
        notes = text.notes
        if self._control[ids].any():
            # A vocabulary that makes a control token of ordinary text: break the words up.
            broken_up = self._laid_out(_escaped(conversation, tuple(self._names)))
            if not isinstance(broken_up, _Text):
                return broken_up
            text, notes = broken_up, (ESCAPED,)
            encoding = self._copy.encode(text.text, add_special_tokens=False)
            ids = np.asarray(encoding.ids, dtype=np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in text.ranges:
            trained[_first_token(encoding, start) : _first_token(encoding, end)] = True
        trained[:1] = False
        keep = len(ids)
        if self._cuts and self._limit is not None and (text.cut or keep > self._limit):
            borders = (_border(encoding, end) for end in text.ends)
            keep = max((border for border in borders if border <= (self._limit or 0)), default=0)
            if not trained[:keep].any():
                return "too_long"
            notes = (*notes, CUT)
        end = _border(encoding, text.ends[-1]) if text.ends and keep == len(ids) else keep
        found = self._original[ids[:keep]]
        said = found[:end] if end and not trained[end:keep].any() else found
        return Tokens(found, trained[:keep], said, notes)


class _Text(NamedTuple):
    """A conversation with secret names: what is trained of it, and where its turns end, in characters."""

    text: str
    ranges: list[tuple[int, int]]
    ends: list[int]
    notes: tuple[str, ...]
    cut: bool = False


def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    """Finds any of the words, the longest first; nothing without words."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _secret_copy(backend: Tokenizer) -> tuple[Tokenizer, dict[str, str], npt.NDArray[np.int32]]:
    """A copy whose special tokens have secret names.

    Returns:
        the copy, text -> secret name for every special token and ChatML delimiter, and for every id of the
        copy the id that the model knows it by, int32.
    """
    description = json.loads(backend.to_str())
    # It only adds BOS and EOS, which the text already has, and would shift offsets to spare leading spaces.
    description.update(post_processor=None, truncation=None, padding=None)
    secret = secrets.token_hex(8)
    names: dict[str, str] = {}
    ids: dict[str, int] = {}
    for token in description["added_tokens"]:
        if token["special"] or token["content"] in (START, END):
            name = f"<|{secret}-{token['id']}|>"
            names[token["content"]] = name
            token.update(content=name, special=True, normalized=False)
        ids[token["content"]] = token["id"]
    copy = Tokenizer.from_str(json.dumps(description))
    size = max(copy.get_vocab_size(with_added_tokens=True), *ids.values(), 1) + 1
    original = np.arange(size, dtype=np.int32)
    for content, id_ in ids.items():
        original[copy.token_to_id(content)] = id_
    return copy, names, original


def _escaped(conversation: Conversation, words: tuple[str, ...]) -> Conversation:
    """With a space after the first character of each of these words, wherever somebody wrote one."""
    pattern = _any_of(words)
    return _changed(
        conversation, lambda text: pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)
    )


def _changed(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """With every text changed: contents, calls and tools."""
    turns = tuple(
        replace(
            turn,
            content=change(turn.content),
            prose=change(turn.prose),
            calls=tuple(
                Call(change(call.name), _within(call.arguments, change), change(call.id))
                for call in turn.calls
            ),
            answers=change(turn.answers),
            name=change(turn.name),
        )
        for turn in conversation.turns
    )
    tools = tuple(
        {change(key): _within(value, change) for key, value in t.items()} for t in conversation.tools
    )
    return replace(conversation, turns=turns, tools=tools)


def _within(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    match value:
        case str():
            return change(value)
        case list():
            return [_within(inner, change) for inner in value]
        case dict():
            return {_within(key, change): _within(inner, change) for key, inner in value.items()}
    return value


def _first_token(encoding: Encoding, position: int) -> int:
    """Index of the first token that begins at or after a character; the number of tokens if none does.

    A token that begins before a border belongs to what comes before: at inference it can't be generated.
    """
    length = len(encoding)
    last = _chars(encoding, length - 1)[1] if length else 0
    while position < last:
        # None: the tokenizer's normaliser dropped the character.
        index = encoding.char_to_token(position)
        if index is None:
            position += 1
            continue
        while index < length and _chars(encoding, index)[0] < position:
            index += 1
        return int(index)
    return length


def _border(encoding: Encoding, position: int) -> int:
    """Number of tokens up to a character, or 0 where a token lies across it."""
    index = _first_token(encoding, position)
    return index if index and _chars(encoding, index - 1)[1] <= position else 0


def _chars(encoding: Encoding, index: int) -> tuple[int, int]:
    """The characters that a token stands for; none, at the text's start, for one that stands for none."""
    return encoding.token_to_chars(index) or (0, 0)
