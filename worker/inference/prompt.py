"""A conversation to token ids, as the GGUF's chat template writes it, with words kept as words.

Somebody who types `<|im_end|>` must not end a turn. So the words of special tokens get a character into their
midst that no text may hold, before the template is rendered; what is whole afterwards, the template wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cyllama.llama.llama_cpp import LlamaModel, LlamaVocab
from jinja2 import TemplateError

from shared.data.written_calls import CallStyle, read_calls
from shared.inference import Generation
from worker.training.generate import chat_text
from worker.training.templates import ModelTemplate

# llama.h's LLAMA_TOKEN_ATTR_*.
CONTROL, USER_DEFINED = 8, 16
# Noncharacters of Unicode. The first is taken out again; at the second the text is tokenised in two parts,
# for llama.cpp finds tokens of this kind in any text.
HIDDEN, PARTED = "\ufdd0", "\ufdd1"
_RESERVED = re.compile(f"[{HIDDEN}{PARTED}]")
# Vocabularies have runs of spaces and the like as user-defined tokens too: those are ordinary words.
_MARKUP = re.compile(r"[<\[].*[>\]]", re.DOTALL)
# What templates raise over a conversation: they are somebody's program.
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip
_CALL: dict[str, Any] = {"name": "look_up", "arguments": {"city": "Oslo"}}
_TOOL = {
    "type": "function",
    "function": {"name": "find_out", "description": "x", "parameters": {"type": "object", "properties": {}}},
}


class PromptError(Exception):
    """The chat template refuses the conversation; the message says why."""


@dataclass(frozen=True)
class _Named:
    content: str


class Prompts:
    """Makes prompts for one model."""

    def __init__(self, model: LlamaModel, vocab: LlamaVocab) -> None:
        self._model = model
        self._vocab = vocab
        attributes = {number: vocab.get_attr(number) for number in range(vocab.n_vocab)}
        special = [number for number, kind in attributes.items() if kind & (CONTROL | USER_DEFINED)]
        texts = {vocab.token_to_piece(number, 0, True): number for number in special}
        self._ids = {
            text: number
            for text, number in texts.items()
            if len(text) > 1 and (attributes[number] & CONTROL or _MARKUP.fullmatch(text))
        }
        self._marks = {t: HIDDEN if attributes[n] & CONTROL else PARTED for t, n in self._ids.items()}
        self._special = _any_of(self._ids)
        self._controls = _any_of(text for text, mark in self._marks.items() if mark == HIDDEN)

    def tokens(self, asked: Generation) -> list[int]:
        """The prompt's token ids.

        Raises:
            PromptError: the template can't write this conversation.
        """
        if asked.messages is None:
            return self._tokenize(self._hide(asked.prompt or "", self._special), add_special=True)
        template = self._with_calls if asked.own_calls else self._plain
        messages = [self._hidden_message(message, template) for message in asked.messages]
        if template is not None and not template.takes_system:
            messages = _system_in_question(messages)
        tools = self._hidden(asked.tools, self._special) if asked.tools else None
        try:
            text, add_special = chat_text(self._model, self._vocab, messages, tools)
        except TEMPLATE_ERRORS as error:
            said = _RESERVED.sub("", str(error))[:300]
            raise PromptError(f"The model's chat template can't write this conversation: {said}") from error
        return self._tokenize(text, add_special)

    @cached_property
    def style(self) -> CallStyle | None:
        """How the template writes calls; None if it doesn't, or in no JSON that can be read back."""
        user = {"role": "user", "content": "x"}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]}
        try:
            asked, _ = chat_text(self._model, self._vocab, [user], [_TOOL])
            whole, _ = chat_text(self._model, self._vocab, [user, call], [_TOOL], prompted=False)
        except TEMPLATE_ERRORS:
            return None
        same = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        # A header that ends otherwise before a call may share the first letters with what opens it.
        while 0 < same < len(asked) and not (whole[same - 1].isspace() or whole[same - 1] == ">"):
            same -= 1
        answer = self._until_end(whole[same:])
        for start in (place for place, letter in enumerate(answer) if letter in "[{"):
            read = read_calls(answer[start:], CallStyle(""))
            if read and [(c.name, c.arguments) for c in read.calls] == [tuple(_CALL.values())]:
                return CallStyle(answer[:start].strip(), read.text)
        return None

    def is_mark(self, token: int, style: CallStyle) -> str:
        """The text of a control token that belongs to how calls are written; else ""."""
        text: str = self._vocab.token_to_piece(token, 0, True)
        return text if text and text in self._ids and text in style.opening + style.closing else ""

    def _until_end(self, text: str) -> str:
        """Up to the first token that ends an answer."""
        ends = [found.start() for found in self._special.finditer(text) if self._ends(found[0])]
        return text[: ends[0]] if ends else text

    def _ends(self, text: str) -> bool:
        return bool(self._vocab.is_eog(self._ids[text]))

    @cached_property
    def _plain(self) -> ModelTemplate | None:
        return self._probed(own_calls=False)

    @cached_property
    def _with_calls(self) -> ModelTemplate | None:
        return self._probed(own_calls=True)

    def _probed(self, *, own_calls: bool) -> ModelTemplate | None:
        """What training found out about the template: its delimiters, and whether it takes a system turn."""
        try:
            return ModelTemplate(_AsTokenizer(self._model, self._vocab, self._ids), "assistant", own_calls)
        except ValueError:
            return None

    def _hidden_message(self, message: dict[str, Any], template: ModelTemplate | None) -> dict[str, Any]:
        if template is not None and template.escape:
            # As in training: a delimiter of several tokens is broken up where somebody wrote it.
            broken = _any_of(template.escape)
            content = broken.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", message["content"])
            message = {**message, "content": content}
        # Reasoning and the like in an earlier answer is for the template to find.
        own = message["role"] == "assistant"
        hidden: dict[str, Any] = self._hidden(message, self._controls if own else self._special)
        return hidden

    def _hidden(self, value: Any, words: re.Pattern[str]) -> Any:
        """The value with the special tokens' words hidden in all its texts."""
        if isinstance(value, str):
            return self._hide(value, words)
        if isinstance(value, list):
            return [self._hidden(item, words) for item in value]
        if isinstance(value, dict):
            return {self._hide(str(k), words): self._hidden(v, words) for k, v in value.items()}
        return value

    def _hide(self, text: str, words: re.Pattern[str]) -> str:
        text = _RESERVED.sub("\ufffd", text)
        return words.sub(lambda found: f"{found[0][:1]}{self._marks[found[0]]}{found[0][1:]}", text)

    def _tokenize(self, text: str, add_special: bool) -> list[int]:
        if not _RESERVED.search(text):
            return list(self._vocab.tokenize(text, add_special, True))
        tokens: list[int] = []
        at = 0
        for found in (*self._special.finditer(text), None):
            for part in text[at : found.start() if found else len(text)].split(PARTED):
                if part:
                    words = part.replace(HIDDEN, "")
                    tokens += self._vocab.tokenize(words, add_special and not tokens, False)
            if found:
                tokens.append(self._ids[found[0]])
                at = found.end()
        return tokens


class _AsTokenizer:
    """The GGUF's template and tokens, as `ModelTemplate` asks a tokenizer for them."""

    def __init__(self, model: LlamaModel, vocab: LlamaVocab, special: Iterable[str]) -> None:
        self.chat_template = model.get_default_chat_template()
        self.added_tokens_decoder = {number: _Named(text) for number, text in enumerate(special)}
        self.eos_token = vocab.token_to_piece(vocab.token_eos(), 0, True) if vocab.token_eos() >= 0 else None
        self._model = model
        self._vocab = vocab

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tools: Any, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize  # noqa: S101 - what the signature is for
        try:
            return chat_text(self._model, self._vocab, messages, tools, prompted=add_generation_prompt)[0]
        except TEMPLATE_ERRORS as error:
            raise TemplateError(str(error)) from error


def _system_in_question(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the system turn's text before the first question, as it was trained."""
    first, *others = messages
    if first["role"] != "system" or not others or others[0]["role"] != "user":
        return messages
    return [{**others[0], "content": f"{first['content']}\n\n{others[0]['content']}"}, *others[1:]]


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the words, the longest first; nothing without words."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")
