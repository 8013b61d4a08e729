"""What would make an export fail, found out before the job trains for hours."""

from __future__ import annotations

from typing import Any

from shared.disk import disk_need
from shared.events import Control
from shared.spec import JobSpec
from worker.training.exports.gguf import check_convertible
from worker.training.exports.merged import check_mergeable, open_base
from worker.training.models import ResolvedModel
from worker.training.room import Room
from worker.training.workdir import Workdir


def check_exports(
    spec: JobSpec,
    model: ResolvedModel,
    tokenizer: Any,
    workdir: Workdir,
    control: Control,
    room: Room,
    *,
    trained: bool = False,
) -> None:
    """Refuse what is known to fail later: a base that no adapter can be merged into, a model that llama.cpp
    doesn't know, too little room on the disk; have the room reserved.

    Args:
        model: with its weights.
        tokenizer: as it will be exported.
        trained: training is over, and only the exports need room.

    Raises:
        JobFailure: `export_failed` or `out_of_disk`.
        NoRoomYet: the room is promised to others.
    """
    base = open_base(model)
    if any(kind != "adapter" for kind in spec.exports):
        check_mergeable(model, base, spec.lora.target_modules)
    if any(kind.startswith("gguf:") for kind in spec.exports):
        check_convertible(model, tokenizer, workdir.root / "preflight", control)
    adapter = base.adapter_parameters(spec.lora.target_modules, spec.lora.r)
    room.reserve(disk_need(spec, base.parameters, adapter, trained=trained))
