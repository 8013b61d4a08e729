"""Names of fine-tuned models: `ft:<base>:<owner>:<suffix>:<id>`, and `…:ckpt-step-N` for a checkpoint.

None of the parts holds a colon: ids of models and names of owners can't, suffixes are made so. `<id>` is the
job's id without `ftjob-`; it alone finds the job, and the name as a whole must be that job's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.ids import ALPHABET

PREFIX = "ft:"
JOB_PREFIX = "ftjob-"
MAX_SUFFIX = 64
NAME = re.compile(
    r"ft:(?P<base>[^:]{1,200}):(?P<owner>[^:]{1,100}):(?P<suffix>[^:]{0,64})"
    rf":(?P<id>[{ALPHABET}]{{24}})(:ckpt-step-(?P<step>[0-9]{{1,9}}))?"
)
NOT_IN_SUFFIX = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class TunedModel:
    """What a name says. `step` is None for the job's result, else the step of a checkpoint of it."""

    base: str
    owner: str
    suffix: str
    job_id: str
    step: int | None = None

    def __str__(self) -> str:
        name = f"{PREFIX}{self.base}:{self.owner}:{self.suffix}:{self.job_id.removeprefix(JOB_PREFIX)}"
        return name if self.step is None else f"{name}:ckpt-step-{self.step}"


def tuned_model(base: str, owner: str, job_name: str | None, job_id: str, step: int | None = None) -> str:
    """The name of what a job made: its result, or the checkpoint of a step.

    Args:
        job_name: the spec's `name`, from which the suffix is made; None and what holds no letter or digit
            give an empty one.
    """
    suffix = NOT_IN_SUFFIX.sub("-", job_name or "").strip("-")[:MAX_SUFFIX]
    return str(TunedModel(base, owner, suffix, job_id, step))


def parse_tuned_model(name: str) -> TunedModel | None:
    """The parts of a name; None for what is no name of a fine-tuned model (a base model's id, say)."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    step = int(found["step"]) if found["step"] else None
    return TunedModel(found["base"], found["owner"], found["suffix"], JOB_PREFIX + found["id"], step)
