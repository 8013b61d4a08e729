"""What would make an export fail, found out before the job trains for hours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from shared.disk import DiskNeed, disk_need
from shared.errors import JobFailure
from shared.events import Control
from shared.lifecycle import FailureCode
from shared.spec import JobSpec
from worker.training.exports.gguf import check_convertible
from worker.training.exports.merged import check_mergeable, open_base
from worker.training.failures import DISK_ADVICE
from worker.training.models import ResolvedModel
from worker.training.workdir import Workdir


def check_exports(
    spec: JobSpec,
    model: ResolvedModel,
    tokenizer: Any,
    workdir: Workdir,
    control: Control,
    *,
    trained: bool = False,
) -> None:
    """Refuse what is known to fail later: too little room, a base that no adapter can be merged into, a model
    that llama.cpp doesn't know.

    Args:
        model: with its weights.
        tokenizer: as it will be exported.
        trained: training is over, and only the exports need room.

    Raises:
        JobFailure: `export_failed` or `out_of_disk`.
    """
    base = open_base(model)
    if any(kind != "adapter" for kind in spec.exports):
        check_mergeable(model, base, spec.lora.target_modules)
    if any(kind.startswith("gguf:") for kind in spec.exports):
        check_convertible(model, tokenizer, workdir.root / "preflight", control)
    adapter = base.adapter_parameters(spec.lora.target_modules, spec.lora.r)
    check_room(disk_need(spec, base.parameters, adapter, trained=trained), workdir)


def check_room(need: DiskNeed, workdir: Workdir) -> None:
    """See that the work folder's disk and the store's have room; other jobs may take it meanwhile.

    Raises:
        JobFailure: `out_of_disk`, with what is needed and what is free.
    """
    # Checkpoints of an attempt that this one goes on from are there already.
    there = _size(workdir.root / "checkpoints")
    store = workdir.store
    if store is None:
        places = [("work folder", workdir.root, need.work - there)]
    elif store.stat().st_dev == workdir.root.stat().st_dev:
        places = [("data folder", workdir.root, need.total - there)]
    else:
        places = [("work folder", workdir.root, need.work - there), ("store", store, need.store)]
    for what, place, needed in places:
        free = shutil.disk_usage(place).free
        if needed > free:
            raise JobFailure(
                FailureCode.OUT_OF_DISK,
                f"The job needs about {_gigabytes(needed)} in the server's {what}, and {_gigabytes(free)} "
                f"are free. At most there will be: {_parts(need)}.",
                DISK_ADVICE,
            )


def _parts(need: DiskNeed) -> str:
    parts = {
        "checkpoints": need.checkpoints,
        "the merged model": need.merged,
        "the 16-bit GGUF that others are made from": need.conversion,
        **need.files,
    }
    return ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
