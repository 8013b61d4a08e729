"""Which way of writing conversations out a job has, and what its user should know of it."""

from __future__ import annotations

from typing import Any

from shared.errors import JobFailure
from shared.events import Entry, EventSink
from shared.lifecycle import FailureCode
from shared.spec import JobSpec
from worker.training.templates import ModelTemplate, Template, chatml


def template_for(spec: JobSpec, tokenizer: Any) -> Template:
    """The way of writing conversations out that the spec asks for.

    Raises:
        JobFailure: `model_unavailable`: the model's own template can't be used.
    """
    if spec.chat_template == "chatml":
        return chatml(tokenizer, spec.train_on)
    try:
        return ModelTemplate(tokenizer, spec.train_on, spec.tool_call_style == "template")
    except ValueError as error:
        raise JobFailure(
            FailureCode.MODEL_UNAVAILABLE,
            f"The chat template of {spec.model} can't be used: {error}.",
            "Set chat_template to chatml.",
        ) from error


def warn_of_template(template: Template, spec: JobSpec, sink: EventSink) -> None:
    """Tell the job's log what its user should know of how conversations are written out."""
    if isinstance(template, ModelTemplate):
        if not template.takes_system:
            sink.log(
                Entry(
                    f"The chat template of {spec.model} takes no system turn: its text goes before the first "
                    "question. Ask the trained model in the same way.",
                    "warning",
                )
            )
        if template.escape:
            sink.log(
                Entry(
                    f"Of the chat template of {spec.model}, {' and '.join(template.escape)} are no single "
                    "tokens: where a row's own text holds one, a space breaks it up, which is counted.",
                    "warning",
                )
            )
    elif template.escape:
        follows = f", and {template.stop_token} follows each answer" if template.stop_token else ""
        sink.log(
            Entry(
                f"<|im_start|> and <|im_end|> are no single tokens of {spec.model}: each is several{follows}."
                ' If the model has a chat template of its own, "chat_template": "model" suits it better.',
                "warning",
            )
        )
