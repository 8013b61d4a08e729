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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from shared.data.chatml import END, START, Span
from shared.data.conversation import Conversation
from worker.training.templates import Template, adds_bos

# Some tokenizers mark their tokens for single bytes as special; ordinary text gives those too.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
CUT = "cut_at_a_turns_end"
ESCAPED = "delimiter_escaped"
DELIMITER_IN_TEXT = "delimiter_in_text"


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

    def __init__(self, tokenizer: Any, template: Template, limit: int | None = None) -> None:
        """
        Args:
            tokenizer: a fast tokenizer of transformers.
            limit: the most tokens of one document; longer ones are cut at a turn's end, or left for the
                caller to drop where None or where no turn that is trained ends in time.
        """
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._template = template
        self._limit = limit
        self._bos: str = tokenizer.bos_token if adds_bos(tokenizer) else ""
        self._text_end: str = template.stop_token or tokenizer.eos_token or ""
        self._copy, self._names, self._original = _secret_copy(backend)
        self._special = re.compile(
            "|".join(map(re.escape, sorted(self._names, key=len, reverse=True))) or r"\Z"
        )
        unknown = tokenizer.unk_token_id
        # Ids that may come only from a secret name. An unknown character gives the unknown token honestly.
        self._control = np.zeros(len(self._original), dtype=bool)
        controls = [backend.token_to_id(text) for text in self._names if not _BYTE.fullmatch(text)]
        self._control[[number for number in controls if number not in (None, unknown)]] = True

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens | None]:
        """Each conversation as one document; None for one that the template can't render faithfully."""
        laid_out = [self._laid_out(conversation) for conversation in conversations]
        texts = [found.text for found in laid_out if found is not None]
        encodings = iter(self._copy.encode_batch(texts, add_special_tokens=False))
        return [
            None if found is None else self._tokens(conversation, found, next(encodings))
            for conversation, found in zip(conversations, laid_out, strict=True)
        ]

    def _laid_out(self, conversation: Conversation) -> _Text | None:
        notes: tuple[str, ...] = ()
        if any("<|im_" in turn.content for turn in conversation.turns):
            notes = (DELIMITER_IN_TEXT,)
            if self._template.escape:
                conversation, notes = _escaped(conversation, self._template.escape), (ESCAPED,)
        spans = self._plain(conversation) if conversation.plain else self._template.spans(conversation)
        if spans is None:
            return None
        pieces: list[str] = []
        ranges: list[tuple[int, int]] = []
        ends: list[int] = []
        position = 0
        for span in spans:
            piece = self._named(span.text) if span.control else span.text
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
        return None if _SURROGATE.search(text) else _Text(text, ranges, ends, notes)

    def _plain(self, conversation: Conversation) -> list[Span]:
        """A text as it is, all of it trained, between BOS and the end that generation stops at."""
        words = [Span(turn.content, turn.trained is not False) for turn in conversation.turns]
        return [Span(self._bos, False, True), *words, Span(self._text_end, True, True)]

    def _named(self, text: str) -> str:
        name = self._names.get(text)
        return name or self._special.sub(lambda match: self._names[match[0]], text)

    def _tokens(self, conversation: Conversation, text: _Text, encoding: Encoding) -> Tokens | None:
        ids = np.asarray(encoding.ids, dtype=np.int32)
        notes = text.notes
        if self._control[ids].any():
            # A vocabulary that makes a control token of ordinary text: break the words up.
            broken_up = self._laid_out(_escaped(conversation, tuple(self._names)))
            if broken_up is None:
                return None
            text, notes = broken_up, (ESCAPED,)
            encoding = self._copy.encode(text.text, add_special_tokens=False)
            ids = np.asarray(encoding.ids, dtype=np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in text.ranges:
            trained[_first_token(encoding, start) : _first_token(encoding, end)] = True
        trained[:1] = False
        keep = len(ids)
        if self._limit is not None and keep > self._limit:
            borders = (_border(encoding, end) for end in text.ends)
            keep = max((border for border in borders if border <= self._limit), default=0)
            if trained[:keep].any():
                notes = (*notes, CUT)
            else:
                keep = len(ids)
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
    turns = []
    for turn in conversation.turns:
        content = turn.content
        for word in words:
            content = content.replace(word, f"{word[:1]} {word[1:]}")
        turns.append(replace(turn, content=content))
    return replace(conversation, turns=tuple(turns))


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
