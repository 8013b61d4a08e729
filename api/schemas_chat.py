"""The bodies of chat and text completions: what OpenAI's API takes, as far as it can be kept here.

A field that changes the answer and can't be honoured is refused; one that is only a label is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_STOPS = 4
ROLES = Literal["system", "developer", "user", "assistant", "tool", "function"]

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=1, le=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Body):
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message. What clients send back of an answer may have fields more, which are null."""

    model_config = ConfigDict(extra="allow")

    role: ROLES
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    def model_post_init(self, _: Any) -> None:
        unknown = [name for name, value in (self.model_extra or {}).items() if value not in (None, [])]
        if unknown:
            raise ValueError(f"has no field {unknown[0][:100]}")


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """What both kinds of completion take."""

    model: Annotated[str, Field(min_length=1, max_length=500)]
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    # Labels.
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops) or any(len(stop) > 1000 for stop in stops):
            raise ValueError(f"takes at most {MAX_STOPS} texts of 1 to 1000 characters")
        return value

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("must be 1: ask again for another answer")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value:
            raise ValueError("can't be set here: leave it out")
        return value


class ResponseFormat(Body):
    type: str

    @field_validator("type")
    @classmethod
    def _text(cls, value: str) -> str:
        if value != "text":
            raise ValueError("must be text: answers can't be held to a schema here")
        return value


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    store: bool | None = None
    modalities: list[str] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    # What other kinds of models do.
    audio: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    # Labels, and hints of how to be faster.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    service_tier: str | None = None

    @field_validator("logprobs", "top_logprobs", "store")
    @classmethod
    def _not_set(cls, value: int | None) -> int | None:
        if value:
            raise ValueError("can't be had here: leave it out")
        return value

    @field_validator("audio", "moderation", "reasoning_effort", "verbosity", "web_search_options")
    @classmethod
    def _null(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("can't be had here: leave it out")
        return value

    @field_validator("modalities")
    @classmethod
    def _only_text(cls, value: list[str] | None) -> list[str] | None:
        if value not in (None, ["text"]):
            raise ValueError('must be ["text"]: models here answer in nothing else')
        return value

    @field_validator("functions", "function_call")
    @classmethod
    def _by_its_newer_name(cls, value: Any) -> Any:
        if value:
            raise ValueError("is the older name: use tools and tool_choice")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _auto_or_none(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if value not in (None, "auto", "none"):
            raise ValueError("must be auto or none: a model can't be made to call a function here")
        return value

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The functions that the model may call, as the client wrote them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: str | list[str]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: str | list[str]) -> str | list[str]:
        if value == "" or (isinstance(value, list) and (len(value) != 1 or not value[0])):
            raise ValueError("must be one text, and not an empty one")
        return value

    @field_validator("best_of")
    @classmethod
    def _best_of_one(cls, value: int | None) -> int | None:
        return cls._one(value)

    @field_validator("echo", "suffix", "logprobs")
    @classmethod
    def _unset(cls, value: int | str | None) -> int | str | None:
        if value is not None and value is not False:
            raise ValueError("can't be had here: leave it out")
        return value

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
