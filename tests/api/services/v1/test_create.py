"""OpenAI's body of a new job as a job spec."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.services.v1.create import auto_epochs, in_openai_terms, multiplier, parse_create
from shared.errors import InvalidRequest, MalformedRequest
from shared.spec import FileDataset, HubDataset, JobSpec, WandbSpec

FILE = "file-" + "0" * 24
OTHER = "file-" + "1" * 24
WANDB = {"type": "wandb", "wandb": {"project": "mine", "tags": ["a"]}}
BODY: dict[str, Any] = {"model": "local/tiny", "training_file": FILE}


def parse(**fields: Any) -> JobSpec:
    return parse_create(json.dumps(BODY | fields).encode())


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def method(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_the_least_is_a_job_with_the_defaults() -> None:
    assert parse() == JobSpec(model="local/tiny", dataset=FileDataset(source="file", file_id=FILE))
    same = parse(
        method=method(n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto"),
        suffix=None,
        seed=None,
        metadata=None,
        validation_file=None,
        integrations=None,
    )
    assert same == parse()


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 25), (4, 25), (10, 10), (33, 3), (34, 3), (8333, 3), (8334, 2), (12_501, 1), (10**6, 1)],
)
def test_auto_goes_oftener_through_few_rows(rows: int, epochs: int) -> None:
    assert auto_epochs(rows) == epochs


def test_auto_counts_the_rows_that_are_asked_for() -> None:
    def epochs(**fields: Any) -> float:
        return parse_create(json.dumps(BODY | fields).encode(), lambda _: 8334).training.num_train_epochs

    assert epochs() == epochs(method=method(n_epochs="auto")) == epochs(training={"max_steps": 2}) == 2
    assert epochs(max_samples=20) == 5
    assert epochs(method=method(n_epochs=7)) == epochs(training={"num_train_epochs": 7}) == 7
    assert refused(max_samples=-1).param == "max_samples"


def test_every_field_has_its_place() -> None:
    spec = parse(
        validation_file=OTHER,
        suffix="mine",
        seed=3,
        metadata={"team": "search"},
        method=method(n_epochs=5, batch_size=7, learning_rate_multiplier=0.25),
        lora={"r": 4},
        max_samples=10,
        exports=["adapter", "gguf:q4_k_m"],
        training={"max_steps": 9},
    )
    assert spec.validation_dataset == FileDataset(source="file", file_id=OTHER)
    assert (spec.name, spec.metadata) == ("mine", {"team": "search"})
    assert (spec.lora.r, spec.max_samples, spec.exports) == (4, 10, ("adapter", "gguf:q4_k_m"))
    training = spec.training
    assert (training.seed, training.num_train_epochs, training.max_steps) == (3, 5, 9)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 7)
    assert training.learning_rate == 5e-5
    assert multiplier(training.learning_rate) == 0.25


@pytest.mark.parametrize("size", [1, 2, 3, 8, 255, 256])
def test_the_batch_is_the_effective_one(size: int) -> None:
    assert parse(method=method(batch_size=size)).training.effective_batch == size


def test_the_older_place_of_hyperparameters() -> None:
    assert parse(hyperparameters={"n_epochs": 2}).training.num_train_epochs == 2
    both = parse(hyperparameters={"n_epochs": 2}, method=method(n_epochs=4))
    assert both.training.num_train_epochs == 4


def test_an_integration_is_a_reporter() -> None:
    assert parse(integrations=[WANDB]).report_to == ("wandb",)
    assert parse(integrations=[WANDB], report_to=["tensorboard"]).report_to == ("tensorboard", "wandb")
    assert parse(integrations=[WANDB], report_to=["wandb"]).report_to == ("wandb",)
    assert parse(integrations=[WANDB]).wandb == WandbSpec(project="mine", tags=("a",))
    whole = {"project": "mine", "name": "run 1", "entity": "team", "tags": ["a", "b"]}
    asked = parse(integrations=[{"type": "wandb", "wandb": whole}]).wandb
    assert asked is not None
    assert asked.model_dump(mode="json") == whole
    assert parse(integrations=[]).report_to == ()


def test_a_data_set_of_the_hub_has_a_name_too() -> None:
    assert parse(training_file="hub:owner/rows").dataset == HubDataset(id="owner/rows")


@pytest.mark.parametrize("name", ["gpt2", "openai/gpt-oss-20b", "gpt-neo-125m", "o/1"])
def test_models_of_the_hub_that_are_called_alike_are_none_of_openais(name: str) -> None:
    assert parse(model=name).model == name


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"training_file": None}, "training_file", "invalid_type"),
        ({"model": "gpt-4o-mini-2024-07-18"}, "model", "model_not_found"),
        ({"model": "davinci-002"}, "model", "model_not_found"),
        ({"model": "ft:owner/base:ann:x:" + "0" * 24}, "model", "invalid_value"),
        ({"training_file": "rows.jsonl"}, "training_file", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "out_of_range"),
        ({"seed": -1}, "seed", "out_of_range"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "unsupported_method"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_method"),
        (
            {"integrations": [{"type": "other", "wandb": {"project": "p"}}]},
            "integrations.0.type",
            "invalid_value",
        ),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project", "missing_field"),
        ({"integrations": [WANDB], "report_to": 3}, "report_to", "invalid_type"),
        ({"integrations": [WANDB, WANDB]}, "integrations", "out_of_range"),
        ({"integrations": [WANDB], "wandb": {"project": "p"}}, "integrations", "invalid_value"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "a/b"}}]},
            "integrations.0.wandb.project",
            "invalid_value",
        ),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "api_key": "k"}}]},
            "integrations.0.wandb.api_key",
            "unknown_field",
        ),
        ({"n_epochs": 3}, "n_epochs", "unknown_field"),
        ({"lora": {"r": 0}}, "lora.r", "out_of_range"),
        ({"dataset": {"source": "hub"}}, "dataset", "invalid_value"),
        ({"suffix": "a", "name": "b"}, "suffix", "invalid_value"),
        ({"seed": 1, "training": {"seed": 2}}, "seed", "invalid_value"),
        ({"training": 3}, "training", "invalid_type"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(**fields)
    assert (error.param, error.error_code) == (param, code)


@pytest.mark.parametrize("value", [0, 51, 1.5, "many", True])
def test_hyperparameters_have_openais_limits(value: Any) -> None:
    error = refused(method=method(n_epochs=value))
    assert error.param == "method.supervised.hyperparameters.n_epochs"


def test_a_key_twice_and_no_json_are_malformed() -> None:
    for body in (b'{"model": "a", "model": "b"}', b"{"):
        with pytest.raises(MalformedRequest):
            parse_create(body)


def test_an_error_about_the_spec_names_openais_field() -> None:
    def fail() -> None:
        raise InvalidRequest("No such dataset.", param="dataset.file_id", code="dataset_not_found")

    with pytest.raises(InvalidRequest) as caught:
        in_openai_terms(fail)
    assert (caught.value.param, caught.value.error_code) == ("training_file", "dataset_not_found")


def test_a_sentence_about_the_spec_begins_with_openais_field() -> None:
    with pytest.raises(InvalidRequest, match=r"^validation_file is what is trained on") as caught:
        in_openai_terms(lambda: parse(validation_file=FILE))
    assert caught.value.param == "validation_file"
