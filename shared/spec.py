"""The job spec: one frozen, serialisable description of a fine-tuning job.

A job can be replayed from its JSON. A field or value is accepted only once it works: what this version
lacks is refused by the types below.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

MAX_NAME = 200
MAX_METADATA = 16
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
FILE_ID = r"^file-[0-9a-z]{24}$"

DEFAULT_MODEL = "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1"
DEFAULT_DATASET = "glaiveai/glaive-function-calling-v2"
BUNDLED_MODEL = "bundled/smollm2-135m-instruct"
LOCAL_PREFIX = "local/"
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ExportFormat = Literal["adapter", "merged_16bit", "gguf:f16", "gguf:q8_0", "gguf:q5_k_m", "gguf:q4_k_m"]
DataFormat = Literal["auto", "glaive", "messages", "sharegpt", "alpaca", "text", "prompt_completion"]
Engine = Literal["auto", "unsloth", "compiled", "reference"]
Reporter = Literal["wandb", "tensorboard", "mlflow", "trackio"]
Priority = Literal["low", "normal", "high"]


def _plain_text(value: str) -> str:
    if CONTROL_CHARACTERS.search(value):
        raise ValueError("must not contain control characters, NUL or lone surrogates")
    return value


def _repository_id(value: str) -> str:
    if not HUB_ID.fullmatch(value) or ".." in value or "--" in value:
        raise ValueError(
            "must be an id like 'owner/name' (letters, digits, '.', '_', '-'), not a path or an address"
        )
    return value


def _revision(value: str) -> str:
    if not REVISION.fullmatch(value) or ".." in value or "//" in value:
        raise ValueError("must be a branch, tag or commit of the hub repository")
    return value


def _distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) != len(value):
        raise ValueError("must not name anything twice")
    return value


PlainText = Annotated[str, AfterValidator(_plain_text)]
Name = Annotated[PlainText, Field(min_length=1, max_length=MAX_NAME)]
RepositoryId = Annotated[str, Field(max_length=200), AfterValidator(_repository_id)]
Revision = Annotated[str, Field(max_length=200), AfterValidator(_revision)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,100}$")]


class SpecModel(BaseModel):
    """Frozen, strict (no "5" for 5), no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class HubDataset(SpecModel):
    """A data set on the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    id: RepositoryId = DEFAULT_DATASET
    revision: Revision | None = None
    split: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] = "train"
    config: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] | None = None
    format: DataFormat = "auto"


class FileDataset(SpecModel):
    """A file uploaded through POST /datasets."""

    source: Literal["file"]
    file_id: Annotated[str, Field(pattern=FILE_ID)]
    format: DataFormat = "auto"


Dataset = Annotated[HubDataset | FileDataset, Field(discriminator="source")]


class LoraSpec(SpecModel):
    """Low-rank adapters on the named linear modules."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[
        tuple[ModuleName, ...], Field(min_length=1, max_length=64), AfterValidator(_distinct)
    ] = TARGET_MODULES
    use_rslora: bool = False


class TrainingSpec(SpecModel):
    """Hyperparameters of the training loop; the effective batch is batch size x accumulation, in rows."""

    per_device_train_batch_size: Annotated[int, Field(ge=1, le=256)] = 2
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 4
    num_train_epochs: Annotated[float, Field(gt=0, le=100)] = 3
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0
    optim: Literal["adamw_8bit", "adamw_torch"] = "adamw_8bit"
    logging_steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    save_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    save_total_limit: Annotated[int, Field(ge=1, le=100)] = 3
    eval_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    early_stopping_patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42

    @property
    def effective_batch(self) -> int:
        """Rows that an optimiser step learns from, however the plan splits them."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @field_validator("early_stopping_patience")
    @classmethod
    def _patience_counts_evaluations(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("eval_steps", 1) is None:
            raise ValueError("counts evaluations: set training.eval_steps too")
        return patience


# W&B's own limits; its URLs have project and entity as parts of their paths.
WandbName = Annotated[PlainText, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
WandbTag = Annotated[PlainText, Field(min_length=1, max_length=64)]


class WandbSpec(SpecModel):
    """Where at W&B a job's run goes; null leaves it to the settings of the account that reports."""

    project: WandbName | None = None
    name: Name | None = None
    entity: WandbName | None = None
    tags: Annotated[tuple[WandbTag, ...], Field(max_length=20), AfterValidator(_distinct)] = ()


# Jobs are filtered by `metadata[key]=value`, where brackets and quotes have a meaning of their own.
MetadataKey = Annotated[PlainText, Field(min_length=1, max_length=64, pattern=r'^[^"\\\[\]]+$')]
MetadataValue = Annotated[PlainText, Field(max_length=512)]


class JobSpec(SpecModel):
    """What a user asks for. `{}` is a valid spec: the defaults are a complete job."""

    name: Name | None = None
    model: RepositoryId = DEFAULT_MODEL
    model_revision: Revision | None = None
    dataset: Dataset = HubDataset()
    validation_dataset: Dataset | None = None
    max_samples: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0
    chat_template: Literal["chatml", "model"] = "chatml"
    tool_call_style: Literal["functioncall", "template"] = "functioncall"
    max_seq_length: Annotated[int, Field(ge=16, le=1_048_576)] = 4096
    overlong_rows: Literal["drop", "cut"] = "drop"
    unparsable_calls: Literal["keep", "drop"] = "keep"
    packing: bool = True
    train_on: Literal["assistant", "all"] = "assistant"
    quantization: Literal["auto", "4bit", "none"] = "auto"
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    engine: Engine = "auto"
    gpus: Annotated[int, Field(ge=1, le=8)] = 1
    time_limit_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    exports: Annotated[
        tuple[ExportFormat, ...], Field(min_length=1, max_length=6), AfterValidator(_distinct)
    ] = ("adapter",)
    report_to: Annotated[tuple[Reporter, ...], Field(max_length=4), AfterValidator(_distinct)] = ()
    wandb: WandbSpec | None = None
    priority: Priority = "normal"
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] = {}

    @field_validator("model_revision")
    @classmethod
    def _revision_needs_a_hub_model(cls, revision: str | None, info: ValidationInfo) -> str | None:
        if revision is not None and str(info.data.get("model")).startswith((LOCAL_PREFIX, "bundled/")):
            raise ValueError("goes with a model of the hub, not with a local or bundled one")
        return revision

    @field_validator("validation_dataset")
    @classmethod
    def _other_rows_are_evaluated(cls, held_out: Dataset | None, info: ValidationInfo) -> Dataset | None:
        trained = info.data.get("dataset")
        if held_out and trained and held_out.model_copy(update={"format": trained.format}) == trained:
            raise ValueError("is what is trained on: set validation_fraction to hold out a part of it")
        return held_out

    @field_validator("validation_fraction")
    @classmethod
    def _rows_are_held_out_in_one_way(cls, fraction: float, info: ValidationInfo) -> float:
        if fraction and info.data.get("validation_dataset") is not None:
            raise ValueError("and validation_dataset exclude each other: leave one of them out")
        return fraction

    @field_validator("wandb")
    @classmethod
    def _its_run_is_reported(cls, wandb: WandbSpec | None, info: ValidationInfo) -> WandbSpec | None:
        if wandb is not None and "wandb" not in info.data.get("report_to", ("wandb",)):
            raise ValueError("says where the run goes: name wandb in report_to too")
        return wandb

    @field_validator("precision")
    @classmethod
    def _4bit_weights_compute_in_bf16(cls, precision: str, info: ValidationInfo) -> str:
        if info.data.get("quantization") == "4bit" and precision in ("fp32", "fp8"):
            raise ValueError("is auto or bf16 with quantization 4bit")
        return precision

    @field_validator("engine")
    @classmethod
    def _engines_have_their_ways(cls, engine: str, info: ValidationInfo) -> str:
        quantization, precision = info.data.get("quantization"), info.data.get("precision")
        if engine == "compiled" and quantization == "4bit":
            raise ValueError("compiled has no 4-bit weights: leave quantization or engine on auto")
        if engine in ("compiled", "unsloth") and precision == "fp32":
            raise ValueError(f"{engine} computes in bf16: leave precision or engine on auto")
        if engine in ("reference", "unsloth") and precision == "fp8":
            raise ValueError("fp8 is the compiled engine's: leave precision or engine on auto")
        return engine

    @field_validator("gpus")
    @classmethod
    def _gpus_share_the_batch(cls, gpus: int, info: ValidationInfo) -> int:
        training = info.data.get("training")
        if training is not None:
            batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
            if batch % gpus:
                raise ValueError(
                    f"must divide the effective batch (batch size x accumulation), which is {batch}"
                )
        return gpus

    @field_validator("tool_call_style")
    @classmethod
    def _chatml_has_no_calls_of_its_own(cls, style: str, info: ValidationInfo) -> str:
        if style == "template" and info.data.get("chat_template") == "chatml":
            raise ValueError("template is the model's own way to write calls: set chat_template to model too")
        return style

    @field_validator("training")
    @classmethod
    def _evaluations_need_held_out_rows(cls, training: TrainingSpec, info: ValidationInfo) -> TrainingSpec:
        held_out = info.data.get("validation_fraction", 1) or info.data.get("validation_dataset", 1)
        if training.eval_steps is None or held_out:
            return training
        # So that the error's place is the inner field.
        problem = PydanticCustomError(
            "value_error",
            "Value error, needs rows to evaluate: set validation_fraction or validation_dataset",
        )
        raise ValidationError.from_exception_data(
            "TrainingSpec", [{"type": problem, "loc": ("eval_steps",), "input": training.eval_steps}]
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """A spec that was accepted before, from its stored JSON."""
        return cls.model_validate_json(json.dumps(stored))

    def to_json(self) -> dict[str, Any]:
        """The spec with every default written out, as plain JSON types."""
        return self.model_dump(mode="json")


SPEC_EXAMPLE: dict[str, Any] = {
    "name": "function-calling",
    "model": BUNDLED_MODEL,
    "max_seq_length": 512,
    "training": {"max_steps": 4, "learning_rate": 5e-4, "logging_steps": 1},
    "exports": ["adapter", "gguf:q4_k_m"],
}
