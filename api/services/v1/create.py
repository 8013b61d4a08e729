"""What OpenAI's body of `POST /v1/fine_tuning/jobs` says as a job spec.

Only what the spec doesn't know is judged here: OpenAI's own fields and their limits. All else, Tuneyard's
fields beside them included, is judged by the spec, as for `POST /jobs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from api.errors import read_body
from api.services.jobs import load_json
from shared.errors import InvalidRequest
from shared.model_names import PREFIX
from shared.spec import FILE_ID, JobSpec, TrainingSpec, WandbName, WandbSpec

HUB = "hub:"
WANDB = "wandb"
# A model of the hub may have no owner in its name, as gpt2: these are the ones that OpenAI tunes.
OPENAIS = re.compile(r"(gpt-[345]|chatgpt-|o\d|babbage-002|davinci-002)[A-Za-z0-9.:-]*")
# What a multiplier of 1 is.
LEARNING_RATE: float = TrainingSpec.model_fields["learning_rate"].default
# What `auto` makes of the number of rows.
EPOCHS, MOST_EPOCHS = 3, 25
FEWEST_ROWS, MOST_ROWS = 100, 25_000
METHOD = "method.supervised.hyperparameters"
# Where OpenAI's body has what the spec calls so, the longest names first.
PLACES = {
    "dataset.file_id": "training_file",
    "dataset.id": "training_file",
    "dataset": "training_file",
    "validation_dataset.file_id": "validation_file",
    "validation_dataset.id": "validation_file",
    "validation_dataset": "validation_file",
    "name": "suffix",
    "training.seed": "seed",
    "training.num_train_epochs": f"{METHOD}.n_epochs",
    "training.per_device_train_batch_size": f"{METHOD}.batch_size",
    "training.gradient_accumulation_steps": f"{METHOD}.batch_size",
    "training.learning_rate": f"{METHOD}.learning_rate_multiplier",
}

Answer = TypeVar("Answer")
Source = Annotated[str, Field(pattern=rf"{FILE_ID}|^{HUB}.{{1,200}}$")]


Auto = BeforeValidator(lambda value: None if value == "auto" else value)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Hyperparameters(_Body):
    """None where it is `auto`, or left out: the spec's default."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=50)] | None, Auto] = None
    batch_size: Annotated[Annotated[int, Field(ge=1, le=256)] | None, Auto] = None
    learning_rate_multiplier: Annotated[Annotated[float, Field(gt=0)] | None, Auto] = None


class _Supervised(_Body):
    hyperparameters: _Hyperparameters | None = None


class _Method(_Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: _Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


class _Wandb(WandbSpec):
    project: WandbName


class _Integration(_Body):
    type: Literal["wandb"]
    wandb: _Wandb


class _Create(_Body):
    # Tuneyard's own fields are the spec's to judge.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    training_file: Source
    validation_file: Source | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, Any] | None = None
    method: _Method | None = None
    hyperparameters: _Hyperparameters | None = None
    integrations: Annotated[list[_Integration], Field(max_length=1)] | None = None


def parse_create(body: bytes, rows_of: Callable[[str], int | None] = lambda _: None) -> JobSpec:
    """The spec that OpenAI's body asks for.

    Args:
        rows_of: how many rows the file of this id has to train on, where that is known.

    Raises:
        MalformedRequest: the body is not JSON, or names a key twice.
        InvalidRequest: names the first field that is wrong, as OpenAI's body has it where it is OpenAI's.
    """
    with suppress(ValueError, RecursionError):
        load_json(body)
    asked = read_body(_Create, body)
    document = _document(asked)
    if "num_train_epochs" not in document["training"] and (rows := rows_of(asked.training_file)):
        most = document.get("max_samples")
        counted = min(rows, most) if isinstance(most, int) and most > 0 else rows
        document["training"]["num_train_epochs"] = auto_epochs(counted)
    return read_body(JobSpec, json.dumps(document))


def auto_epochs(rows: int) -> int:
    """How often so many rows are gone through where nobody says: as OpenAI's guide has it.

    Three times; oftener where that is no hundred rows in all, and less often where it is more than 25,000.
    """
    if rows * EPOCHS < FEWEST_ROWS:
        return min(MOST_EPOCHS, FEWEST_ROWS // rows)
    return min(EPOCHS, max(1, MOST_ROWS // rows))


def in_openai_terms(work: Callable[[], Answer]) -> Answer:
    """Do it; an error that names a field of the spec names OpenAI's instead."""
    try:
        return work()
    except InvalidRequest as error:
        param = error.param or ""
        place = PLACES.get(param)
        if place is None:
            raise
        # Sentences begin with the field's name, where they have it.
        said = error.message.removeprefix(f"{param} ")
        message = error.message if said == error.message else f"{place} {said}"
        raise InvalidRequest(message, place, error.error_code) from error


def multiplier(learning_rate: float) -> float:
    """The learning rate as a multiple of the default one, without the noise of the division."""
    return float(f"{learning_rate / LEARNING_RATE:.10g}")


def _document(asked: _Create) -> dict[str, Any]:
    _refuse_other_models(asked.model)
    _refuse_other_methods(asked)
    document = dict(asked.model_extra or {})
    for name in ("dataset", "validation_dataset"):
        if name in document:
            raise InvalidRequest(
                f"{PLACES[name]} names the data here: leave {name} out, or use POST /jobs.", param=name
            )
    training = document.pop("training", None) or {}
    if not isinstance(training, dict):
        raise InvalidRequest("training should be an object.", param="training", code="invalid_type")
    document["model"] = asked.model
    document["dataset"] = _source(asked.training_file)
    if asked.validation_file is not None:
        document["validation_dataset"] = _source(asked.validation_file)
    if asked.metadata is not None:
        document["metadata"] = asked.metadata
    reporters = document.get("report_to", [])
    if asked.integrations:
        (integration,) = asked.integrations
        _put(document, WANDB, integration.wandb.model_dump(mode="json"), "integrations")
        if isinstance(reporters, list) and WANDB not in reporters:
            document["report_to"] = [*reporters, WANDB]
    _put(document, "name", asked.suffix, "suffix")
    for name, value, given in _training(asked):
        _put(training, name, value, given)
    return document | {"training": training}


def _refuse_other_models(model: str) -> None:
    if model.startswith(PREFIX):
        raise InvalidRequest(
            "A fine-tuned model can't be trained further here: name its base model, and train on all rows.",
            param="model",
        )
    if OPENAIS.fullmatch(model):
        raise InvalidRequest(
            f"{model} is OpenAI's own and is nowhere to be had. GET /v1/models lists this server's base "
            "models; any of the hub goes too, as OWNER/NAME.",
            param="model",
            code="model_not_found",
        )


def _refuse_other_methods(asked: _Create) -> None:
    method = asked.method
    if method is not None and method.type != "supervised":
        raise InvalidRequest(
            f"Jobs here are supervised: there is no {method.type} method.",
            param="method.type",
            code="unsupported_method",
        )


def _source(name: str) -> dict[str, str]:
    if name.startswith(HUB):
        return {"source": "hub", "id": name.removeprefix(HUB)}
    return {"source": "file", "file_id": name}


def _training(asked: _Create) -> list[tuple[str, Any, str]]:
    """Fields of the spec's `training`, their values (None: its default) and OpenAI's names for them."""
    inner = asked.method.supervised.hyperparameters if asked.method and asked.method.supervised else None
    found = inner or asked.hyperparameters or _Hyperparameters()
    epochs, batch, factor = found.n_epochs, found.batch_size, found.learning_rate_multiplier
    micro = None if batch is None else 2 - batch % 2
    return [
        ("seed", asked.seed, "seed"),
        ("num_train_epochs", epochs, "n_epochs"),
        ("per_device_train_batch_size", micro, "batch_size"),
        ("gradient_accumulation_steps", batch and micro and batch // micro, "batch_size"),
        ("learning_rate", factor and float(f"{factor * LEARNING_RATE:.10g}"), "learning_rate_multiplier"),
    ]


def _put(target: dict[str, Any], name: str, value: Any, given: str) -> None:
    if value is None:
        return
    if name in target:
        raise InvalidRequest(f"{given} and {name} say the same: leave one of them out.", param=given)
    target[name] = value
