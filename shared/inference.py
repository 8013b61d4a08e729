"""What the API and the inference process say to each other, one JSON object a line.

The API opens a connection, writes one `Generation`, and reads `Started`, any number of `Text`, and `Done`; or
`Failed` at any point. Closing the connection gives the answer up.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from shared.data.written_calls import CallStyle

# What the inference process says to a model's process that shall give its answer up.
CANCEL = b"cancel\n"

FailureKind = Literal["busy", "too_long", "unusable", "away"]


@dataclass(frozen=True)
class Generation:
    """What a model is asked: a conversation as a chat template takes it, or a bare text to go on with.

    Attributes:
        key: of the GGUF in the store; `size` is its bytes.
        owner: whose request this is: each has a bounded number at once.
        own_calls: tell how the model's template writes calls, and let its marks through.
        seconds: the answer is cut off after so long.
    """

    key: str
    size: int
    owner: str
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    own_calls: bool = False
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    seconds: float = 300.0

    def to_line(self) -> bytes:
        # ASCII with escapes: half a surrogate pair has no other form.
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        found = cls(**json.loads(line))
        return replace(found, stop=tuple(found.stop))


@dataclass(frozen=True)
class Started:
    """The prompt fits and is being read; `style` is how the template writes calls, if it was asked for."""

    prompt_tokens: int
    style: CallStyle | None = None


@dataclass(frozen=True)
class Text:
    """A piece of the answer, whole characters."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end: the model's own or a stop text (`stop`), or a limit (`length`).

    `tokens` counts what was generated, the end of turn included; `cached` those of the prompt that the model
    had from the request before.
    """

    reason: Literal["stop", "length"]
    tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Failed:
    """No (more) answer: too many at once, a prompt beyond the context, a model that can't be used, or one
    that died."""

    kind: FailureKind
    message: str


Event = Started | Text | Done | Failed
_EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Started, Text, Done, Failed)}


def to_line(event: Event) -> bytes:
    """The event as a line."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}).encode() + b"\n"


def from_line(line: bytes) -> Event:
    """The event that a line holds."""
    fields = json.loads(line)
    event = _EVENTS[fields.pop("event")](**fields)
    if isinstance(event, Started) and event.style is not None:
        return replace(event, style=CallStyle(**fields["style"]))
    return event
