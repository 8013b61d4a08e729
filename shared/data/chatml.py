"""Rendering with ChatML: the Jinja template that is exported, and the same text as spans.

A turn is `<|im_start|>role\\ncontent<|im_end|>`, turns are joined by a line break. Tools and calls
are written as Glaive has them, so that a model trained on Glaive is asked just as it was trained.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

from shared.data.conversation import Conversation

START, END = "<|im_start|>", "<|im_end|>"
TOOLS_INTRODUCTION = (
    "You are a helpful assistant with access to the following functions. Use them if required -\n"
)
TOOLS_CONTINUATION = "You have access to the following functions. Use them if required -\n"

TrainOn = Literal["assistant", "all"]

_TOOLS = (
    "{% for tool in tools %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ (tool.function if tool.function is defined else tool) | tojson(indent=4) }}{% endfor %}"
)
_CALLS = (
    "{% if message.tool_calls is defined and message.tool_calls %}"
    "{% for call in message.tool_calls %}"
    "{% set function = call.function if call.function is defined else call %}"
    "{% if not loop.first or message.content %}{{ '\\n' }}{% endif %}"
    "{{ '<functioncall> {\"name\": ' + (function.name | tojson) + ', \"arguments\": ' }}"
    "{{ function.arguments if function.arguments is string else function.arguments | tojson }}{{ '}' }}"
    "{% endfor %}{% endif %}"
)


def chatml_template(bos: bool = False, eos: bool = False) -> str:
    """The Jinja template.

    Args:
        bos: the model's tokenizer begins every text with its BOS token.
        eos: the model has no `<|im_end|>` token: its own EOS follows each assistant's end of turn.
    """
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% if tools %}{% if messages[0].role != 'system' %}"
        + f"{{{{ '{START}system\\n{_escaped(TOOLS_INTRODUCTION)}' }}}}"
        + _TOOLS
        + f"{{{{ '{END}\\n' }}}}"
        + "{% endif %}{% endif %}"
        + "{% for message in messages %}"
        + "{% if not loop.first %}{{ '\\n' }}{% endif %}"
        + f"{{{{ '{START}' + message.role + '\\n' }}}}"
        + "{% if message.content %}{{ message.content }}{% endif %}"
        + "{% if loop.first and tools and message.role == 'system' %}"
        + f"{{{{ '\\n\\n{_escaped(TOOLS_CONTINUATION)}' }}}}"
        + _TOOLS
        + "{% endif %}"
        + _CALLS
        + f"{{{{ '{END}' }}}}"
        + ("{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}" if eos else "")
        + "{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ '\\n{START}assistant\\n' }}}}{{% endif %}}"
    )


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n")


CHATML_TEMPLATE = chatml_template()


class Span(NamedTuple):
    """A piece of the rendered text.

    Attributes:
        control: the template's own text, whose special tokens are meant as such; else somebody's words.
        ends_turn: the last piece of a turn, where a conversation may be cut.
    """

    text: str
    trained: bool
    control: bool = False
    ends_turn: bool = False


def render(
    conversation: Conversation, train_on: TrainOn = "assistant", bos: str = "", eos: str = ""
) -> list[Span]:
    """The conversation as spans, whose texts joined are what the template gives.

    Args:
        train_on: `assistant`: what assistants say and their end of turn; `all`: everything.
        bos, eos: the model's tokens, where `chatml_template` is made with them.
    """
    everything = train_on == "all"
    spans = [Span(bos, everything, True)] if bos else []
    for number, turn in enumerate(conversation.turns):
        # An answer without any text would teach the model to say nothing.
        says = turn.role == "assistant" and bool(turn.content.strip())
        trained = turn.trained if turn.trained is not None else everything or says
        header = everything and turn.trained is not False
        if number:
            spans.append(Span("\n", header))
        spans.append(Span(START, header, True))
        spans.append(Span(f"{turn.role}\n", header))
        spans.append(Span(turn.content, trained))
        ends = eos if turn.role == "assistant" else ""
        spans.append(Span(END, trained, True, ends_turn=not ends))
        if ends:
            spans.append(Span(ends, trained, True, ends_turn=True))
    return spans


def system_text(system: str, tools: tuple[dict[str, Any], ...]) -> str:
    """The system turn's content for a row with a column of tools, just as the template writes it.

    Raises:
        TypeError, ValueError, RecursionError: the tools hold what JSON can't write, as Parquet's can.
    """
    if not tools:
        return system
    listed = "\n\n".join(
        json.dumps(function_of(tool), ensure_ascii=False, allow_nan=False, indent=4, separators=(",", ": "))
        for tool in tools
    )
    if not system:
        return TOOLS_INTRODUCTION + listed
    return f"{system}\n\n{TOOLS_CONTINUATION}{listed}"


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The function itself, without OpenAI's wrapper around it."""
    function = tool.get("function")
    return function if isinstance(function, dict) else tool
