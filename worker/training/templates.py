"""How a conversation is written out for the model: with ChatML, or with the model's own chat template.

Both give spans whose texts, joined, are exactly what the exported template gives at inference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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

# Characters for private use stand around a turn's number where its content will be.
_MARK = re.compile("\ue000(\\d+)\ue001")


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

    escape: tuple[str, ...] = ()

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
        probe = self._marked([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], None)
        pieces = _MARK.split(probe or "")
        if len(pieces) != 5:
            raise ValueError("its chat template doesn't render a question and an answer")
        self._end = pieces[-1].rstrip()
        if not self._end:
            raise ValueError("its chat template has no mark at the end of an answer")
        self._prompt = self._generation_prompt()
        if own_calls and not self._writes_calls():
            raise ValueError(
                "its chat template doesn't write tools and calls; functioncall is the style for it"
            )
        self.stop_token: str | None = self._end if is_added(tokenizer, self._end) else tokenizer.eos_token

    def spans(self, conversation: Conversation) -> list[Span] | None:
        turns, messages, tools = self._messages(conversation)
        whole = self._apply(messages, tools)
        if whole is None:
            return None
        if any("tool_calls" in message for message in messages):
            return self._by_prefixes(whole, messages, tools, turns)
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
        return self._by_prefixes(whole, messages, tools, turns)

    def _generation_prompt(self) -> str:
        question = [{"role": "user", "content": "x"}]
        without = self._apply(question, None) or ""
        prompted = self._apply(question, None, generation=True) or ""
        return prompted.removeprefix(without) if prompted.startswith(without) else ""

    def _writes_calls(self) -> bool:
        function = {"name": "look_up", "arguments": {"city": "Oslo"}}
        tool = {"name": "find_out", "description": "x", "parameters": {"type": "object", "properties": {}}}
        question = {"role": "user", "content": "x"}
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
        text = self._apply([question, call], [{"type": "function", "function": tool}]) or ""
        return all(word in text for word in ("look_up", "Oslo", "find_out"))

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
        # Contents and delimiters can't be told apart here, so nobody may have written a delimiter.
        special = self._tokenizer.all_special_tokens
        if any(token in turn.content for turn in turns for token in (*special, self._end)):
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
            upto = upto.rstrip()
            if not upto.endswith(self._end) or not whole.startswith(upto) or len(before) < at:
                return None
            trained = turn.trained if turn.trained is not None else True
            header = len(before) - len(self._prompt) if before.endswith(self._prompt) else len(before)
            header = max(at, header)
            spans.append(Span(whole[at:header], all(weighed[told:number] or [weighed[number]]), True))
            spans.append(Span(whole[header : len(before)], weighed[number], True))
            spans.append(Span(whole[len(before) : len(upto)], trained, True, ends_turn=True))
            at, told = len(upto), number + 1
        return [*spans, Span(whole[at:], all(weighed[told:] or weighed[-1:]), True)]

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
        messages: list[dict[str, Any]] = []
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.calls:
                functions = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
                calls = [{"type": "function", "function": function} for function in functions]
                message.update(content=turn.prose, tool_calls=calls)
            messages.append(message)
        tools = [
            tool if "function" in tool else {"type": "function", "function": tool}
            for tool in conversation.tools
        ]
        return turns, messages, tools or None

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
