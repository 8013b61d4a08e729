"""How a conversation is written out for the model: with ChatML, or with the model's own chat template.

Both give spans whose texts, joined, are exactly what the exported template gives at inference.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from shared.data.chatml import (
    END,
    START,
    TOOLS_CONTINUATION,
    TOOLS_INTRODUCTION,
    Span,
    TrainOn,
    chatml_template,
    render,
)
from shared.data.conversation import Conversation, Turn
from shared.data.glaive import find_functions
from shared.data.messages import THINK, as_messages, as_tools

# Characters for private use stand around a turn's number where its content will be.
_MARK = re.compile("\ue000(\\d+)\ue001")
_MARKUP = re.compile(r"<+/?[^<>\s]{1,60}>+|\[/?[A-Z_]{1,40}\]")
# Rendering up to each answer is quadratic work: so many messages in all take a second or two.
MAX_RENDERED = 100_000
_NOT_A_WORD = re.compile(r"[^\w\s]")


_SYSTEM = {"role": "system", "content": "x"}
_USER = {"role": "user", "content": "x"}
_ANSWER = {"role": "assistant", "content": "x"}
_TOLD = {"role": "tool", "name": "look_up", "content": "x"}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Oslo"}}}],
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find_out",
        "description": "x",
        "parameters": {"type": "object", "properties": {}},
    },
}


class Template(Protocol):
    """A way of writing conversations out."""

    @property
    def source(self) -> str:
        """The Jinja template to be exported."""

    @property
    def stop_token(self) -> str | None:
        """The text of the token that ends an assistant's turn; None if there is none."""

    @property
    def escape(self) -> tuple[str, ...]:
        """Delimiters that are no single tokens, so that nobody may be let write them."""

    def spans(self, conversation: Conversation) -> list[Span] | None:
        """The rendered conversation; None where the template can't render it faithfully."""


@dataclass(frozen=True)
class Chatml:
    """ChatML, with the model's BOS first and its EOS after each answer where the model needs them."""

    train_on: TrainOn
    bos: str
    eos: str
    stop_token: str | None
    source: str
    escape: tuple[str, ...]

    def spans(self, conversation: Conversation) -> list[Span] | None:
        return render(conversation, self.train_on, self.bos, self.eos)


def chatml(tokenizer: Any, train_on: TrainOn) -> Chatml:
    """ChatML as this model's tokenizer needs it."""
    has_end = is_added(tokenizer, END)
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    eos = "" if has_end else tokenizer.eos_token or ""
    return Chatml(
        train_on=train_on,
        bos=bos,
        eos=eos,
        stop_token=eos or (END if has_end else None),
        source=chatml_template(bos=bool(bos), eos=bool(eos)),
        escape=() if has_end and is_added(tokenizer, START) else (START, END),
    )


class ModelTemplate:
    """The model's own chat template.

    The conversation is rendered twice, with its contents and with marks in their place. Where the contents
    put for the marks give the first text, every border is known. Elsewhere (calls that the template writes
    itself) an answer is what a rendering up to it has beyond the one with the generation prompt.
    """

    def __init__(self, tokenizer: Any, train_on: TrainOn, own_calls: bool) -> None:
        """
        Args:
            own_calls: hand calls and tools to the template, instead of the text that holds them.

        Raises:
            ValueError: the tokenizer has no chat template, or none that renders a question and an answer.
        """
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("it has no chat template")
        self.source: str = tokenizer.chat_template
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._own_calls = own_calls
        probe = self._marked([_USER, _ANSWER], None)
        pieces = _MARK.split(probe or "")
        if len(pieces) != 5:
            raise ValueError("its chat template doesn't render a question and an answer")
        self._end, self._tail = self._ends(pieces[-1])
        if not self._end:
            raise ValueError("its chat template has no mark at the end of an answer")
        self._prompt = self._generation_prompt()
        if own_calls and not self._writes_calls():
            raise ValueError(
                "its chat template doesn't write tools and calls; functioncall is the style for it"
            )
        self.stop_token: str | None = self._end if is_added(tokenizer, self._end) else tokenizer.eos_token
        self.takes_system = self._apply([_SYSTEM, _USER], None) is not None
        self.escape: tuple[str, ...] = self._delimiters()

    def spans(self, conversation: Conversation) -> list[Span] | None:
        turns, messages, tools = self._messages(
            conversation if self.takes_system else _system_in_question(conversation)
        )
        whole = self._apply(messages, tools)
        if whole is None:
            return None
        if any("tool_calls" in message for message in messages):
            return self._by_prefixes(whole, messages, tools, turns) or self._by_prompts(whole, turns)
        marked = self._marked(messages, tools)
        pieces = _MARK.split(marked or "")
        numbers = [int(number) for number in pieces[1::2]]
        if sorted(numbers) != [number for number, message in enumerate(messages) if message["content"]]:
            return None
        # Some templates keep white space around a content, others don't.
        for strip in (False, True):
            contents = [messages[number]["content"] for number in numbers]
            contents = [text.strip() for text in contents] if strip else contents
            filled = pieces.copy()
            filled[1::2] = contents
            if "".join(filled) == whole:
                return self._by_marks(pieces[::2], numbers, contents, turns)
        return self._by_prefixes(whole, messages, tools, turns) or self._by_prompts(whole, turns)

    def _ends(self, last: str) -> tuple[str, str]:
        """What ends each answer, and what the template writes besides at the conversation's end.

        Args:
            last: what it writes after the last answer.
        """
        pieces = _MARK.split(self._marked([_USER, _ANSWER, _USER, _ANSWER], None) or "")
        if len(pieces) != 9:
            return last.rstrip(), ""
        atoms = self._added("(?s:.)")
        pairs = zip(atoms.findall(pieces[4]), atoms.findall(last), strict=False)
        common = takewhile(lambda pair: pair[0] == pair[1], pairs)
        end = "".join(atom for atom, _ in common).rstrip()
        return (end, last.removeprefix(end).rstrip()) if end else (last.rstrip(), "")

    def _added(self, other: str) -> re.Pattern[str]:
        """Finds the tokenizer's added tokens, the longest first, and else what the pattern `other` says."""
        added = sorted((t.content for t in self._tokenizer.added_tokens_decoder.values()), key=len)
        return re.compile("|".join([*map(re.escape, reversed(added)), other]))

    def _generation_prompt(self) -> str:
        without = self._apply([_USER], None) or ""
        prompted = self._apply([_USER], None, generation=True) or ""
        return prompted.removeprefix(without) if prompted.startswith(without) else ""

    def _writes_calls(self) -> bool:
        text = self._apply([_USER, _CALL], [_TOOL]) or ""
        return all(word in text for word in ("look_up", "Oslo", "find_out"))

    def _delimiters(self) -> tuple[str, ...]:
        """What parts turns without being tokens of their own, so that nobody may be let write it.

        Found by trial: lines that the template writes between contents, where they are more than a word.
        """
        parted = self._added("\n")
        found: set[str] = set()
        turns = [_USER, _ANSWER, _USER, _ANSWER]
        for messages in (turns, [_SYSTEM, *turns], [_USER, _ANSWER, _TOLD, _ANSWER]):
            scaffold = _MARK.split(self._marked(messages, None) or "")[::2]
            if len(scaffold) != len(messages) + 1:
                continue
            # Before the first content there may be a preamble, which is no delimiter.
            found.update(_MARKUP.findall(scaffold[0]))
            for line in (line.strip() for text in scaffold[1:] for line in parted.split(text)):
                found.update(_MARKUP.findall(line) or [line])
        if self._own_calls:
            written = _MARK.split(self._marked([_USER, _CALL, _TOLD, _ANSWER], [_TOOL]) or "")
            found.update(word for text in written[2::2] for word in _MARKUP.findall(text))
        # Reasoning stands in answers' own text.
        found.difference_update(THINK)
        return tuple(
            sorted(w for w in found if len(w) > 2 and _NOT_A_WORD.search(w) and not parted.search(w))
        )

    def _by_marks(
        self, scaffold: list[str], numbers: list[int], contents: list[str], turns: list[Turn]
    ) -> list[Span] | None:
        everything = self._train_on == "all"
        weighed = [everything and turn.trained is not False for turn in turns]
        spans = [Span(scaffold[0], all(weighed[: numbers[0] + 1] if numbers else weighed), True)]
        following = [*numbers[1:], None]
        for number, content, after, coming in zip(numbers, contents, scaffold[1:], following, strict=True):
            turn = turns[number]
            answer = turn.role == "assistant"
            trained = turn.trained if turn.trained is not None else everything or answer
            spans.append(Span(content, trained))
            # Behind a turn's own end is the header of the next one.
            header = weighed[number] if coming is None else all(weighed[number + 1 : coming + 1])
            header = header and (coming is None or weighed[coming])
            if after.startswith(self._end):
                ends = trained if answer else weighed[number]
                spans.append(Span(self._end, ends, True, ends_turn=answer))
                after = after.removeprefix(self._end)
            elif answer:
                return None
            else:
                header = header and weighed[number]
            spans.append(Span(after, header, True))
        return spans

    def _by_prefixes(
        self, whole: str, messages: list[dict[str, Any]], tools: Any, turns: list[Turn]
    ) -> list[Span] | None:
        # Contents and delimiters can't be told apart here, so nobody may have written an end of turn.
        if any(self._end in turn.content for turn in turns):
            return None
        if sum(turn.role == "assistant" for turn in turns) * len(turns) > MAX_RENDERED:
            return None
        weighed = [self._train_on == "all" and turn.trained is not False for turn in turns]
        spans: list[Span] = []
        at = told = 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant" or not turn.content.strip():
                continue
            upto = self._apply(messages[: number + 1], tools)
            before = self._before(messages[:number], tools, upto or "")
            if before is None or upto is None or not upto.startswith(before):
                return None
            upto = upto.rstrip().removesuffix(self._tail).rstrip()
            if not upto.endswith(self._end) or not whole.startswith(upto) or len(before) < at:
                return None
            if _loses_calls(turn, upto[len(before) :]):
                return None
            trained = turn.trained if turn.trained is not None else True
            header = len(before) - len(self._prompt) if before.endswith(self._prompt) else len(before)
            header = max(at, header)
            spans.append(Span(whole[at:header], all(weighed[told:number] or [weighed[number]]), True))
            spans.append(Span(whole[header : len(before)], weighed[number], True))
            spans.append(Span(whole[len(before) : len(upto)], trained, True, ends_turn=True))
            at, told = len(upto), number + 1
        return [*spans, Span(whole[at:], all(weighed[told:] or weighed[-1:]), True)]

    def _by_prompts(self, whole: str, turns: list[Turn]) -> list[Span] | None:
        """Where a template changes earlier answers, as those do that leave old reasoning out.

        Then no rendering up to an answer is the beginning of the whole, but a header that nobody can write
        still shows where each answer begins.
        """
        answers = [turn for turn in turns if turn.role == "assistant"]
        header, *pieces = whole.split(self._prompt) if self._prompt.strip() else [whole]
        written = any(self._prompt.strip() in turn.content for turn in turns)
        if self._train_on == "all" or written or len(pieces) != len(answers):
            return None
        spans = [Span(header, False, True)]
        for turn, piece in zip(answers, pieces, strict=True):
            said, end, after = piece.partition(self._end)
            if not end or _loses_calls(turn, said):
                return None
            trained = turn.trained if turn.trained is not None else bool(turn.content.strip())
            spans.append(Span(self._prompt, False, True))
            spans.append(Span(said + end, trained, True, ends_turn=True))
            spans.append(Span(after, False, True))
        return spans

    def _before(self, messages: list[dict[str, Any]], tools: Any, upto: str) -> str | None:
        """What stands before an answer: the messages before it and its header."""
        if messages or not self._prompt:
            return self._apply(messages, tools, generation=True)
        # Few templates render no messages at all, but the header of an answer shows where it begins.
        found = upto.rfind(self._prompt)
        return None if found < 0 else upto[: found + len(self._prompt)]

    def _messages(self, conversation: Conversation) -> tuple[list[Turn], list[dict[str, Any]], Any]:
        """The turns that are rendered, as messages for the template, and the tools for it."""
        turns = list(conversation.turns)
        if not self._own_calls:
            return turns, [{"role": turn.role, "content": turn.content} for turn in turns], None
        if conversation.tools and turns[0].role == "system":
            system = without_tools(turns[0].content)
            turns[:1] = [replace(turns[0], content=system)] if system else []
        return turns, as_messages(turns), as_tools(conversation.tools) or None

    def _marked(self, messages: list[dict[str, Any]], tools: Any) -> str | None:
        marked = [
            {**message, "content": f"\ue000{number}\ue001"} if message["content"] else message
            for number, message in enumerate(messages)
        ]
        return self._apply(marked, tools)

    def _apply(self, messages: list[dict[str, Any]], tools: Any, generation: bool = False) -> str | None:
        """The rendered text; None where the template refuses, as many do for roles that they don't know."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError):
            return None
        return str(text)


def _loses_calls(turn: Turn, written: str) -> bool:
    """Whether something of a turn with calls is missing in what the template wrote for it.

    Some write the first call only, or no text beside a call. Reasoning may be left out of earlier answers.
    """
    said = turn.prose.rpartition(THINK[1])[2].strip()
    names = Counter(call.name for call in turn.calls)
    return bool(names) and (said not in written or any(written.count(n) < names[n] for n in names))


def _system_in_question(conversation: Conversation) -> Conversation:
    """With the system turn's text before the first question, if that comes next."""
    first, *others = conversation.turns
    if first.role != "system" or not others or others[0].role != "user":
        return conversation
    trained = others[0].trained if others[0].trained is not None else first.trained
    question = replace(others[0], content=f"{first.content}\n\n{others[0].content}", trained=trained)
    return replace(conversation, turns=(question, *others[1:]))


def without_tools(system: str) -> str:
    """A system text without the functions that it lists and the sentence that introduces them."""
    _, start, end = find_functions(system)
    if start == end:
        return system
    before, after = system[:start].rstrip(), system[end:].strip()
    for sentence in (TOOLS_INTRODUCTION, TOOLS_CONTINUATION):
        before = before.removesuffix(sentence.rstrip()).rstrip()
    return "\n\n".join(text for text in (before, after) if text)


def is_added(tokenizer: Any, text: str) -> bool:
    """Whether the text is a token of its own wherever it stands."""
    return any(token.content == text for token in tokenizer.added_tokens_decoder.values())


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
