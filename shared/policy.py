"""The server's limits on a spec: what is known to be impossible or not allowed here is refused."""

from __future__ import annotations

from shared.errors import InvalidRequest
from shared.models import ModelInfo
from shared.settings import Settings
from shared.spec import HubDataset, JobSpec


def check_spec(spec: JobSpec, settings: Settings, model: ModelInfo, *, high: bool) -> None:
    """
    Raises:
        InvalidRequest: names the field, its value and the limit that it is over.
    """
    _at_most("max_samples", spec.max_samples, settings.max_samples, "this server's cap of samples")
    _at_most("max_seq_length", spec.max_seq_length, settings.max_seq_length, "this server's limit in tokens")
    if model.context_length is not None:
        _at_most("max_seq_length", spec.max_seq_length, model.context_length, f"the context of {model.id}")
    training = spec.training
    _at_most(
        "training.gradient_accumulation_steps",
        training.effective_batch,
        settings.max_effective_batch,
        "this server's limit of the effective batch (batch size x accumulation)",
    )
    for field, dataset in (("dataset", spec.dataset), ("validation_dataset", spec.validation_dataset)):
        if isinstance(dataset, HubDataset) and not settings.dataset_allowed(dataset.id):
            raise InvalidRequest(
                f"The dataset {dataset.id} is not allowed on this server, which allows: "
                f"{settings.dataset_allow}. Its operator sets TUNEYARD_DATASET_ALLOW.",
                param=f"{field}.id",
                code="dataset_not_allowed",
            )
    if spec.priority == "high" and not high:
        raise InvalidRequest(
            "This key may not post jobs of high priority: use normal or low, or ask the operator for a key "
            "made with `tuneyard keys create NAME --high`.",
            param="priority",
            code="priority_not_allowed",
        )
    _check_modules(spec, model)


def _check_modules(spec: JobSpec, model: ModelInfo) -> None:
    if model.modules is None:
        return
    absent = [name for name in spec.lora.target_modules if name not in model.modules]
    if absent:
        raise InvalidRequest(
            f"{model.id} has no modules named {', '.join(absent)}. "
            f"It has: {', '.join(sorted(model.modules))}.",
            param="lora.target_modules",
        )


def _at_most(param: str, value: int | None, limit: int, what: str) -> None:
    if value is not None and value > limit:
        raise InvalidRequest(
            f"{param}: {value} is over {what}, which is {limit}.", param=param, code="over_limit"
        )
