"""Any rank but the first of a job on several GPUs: `python -m worker.training.rank`, started by rank 0.

Two lines of JSON come on standard input: the job, then its prepared data. The input's end means that rank 0
is gone, and is this process' end.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from shared.errors import OutOfMemory
from shared.events import Artifact, Checkpoint, Entry, GoOn, Progress
from shared.lifecycle import Phase
from shared.plan import Plan
from shared.spec import JobSpec
from worker.checkpoints import FOLDER as CHECKPOINTS
from worker.training.data import PreparedData
from worker.training.engines import engine_of
from worker.training.failures import explain
from worker.training.models import ResolvedModel, fetch_weights, load_tokenizer, settle_tokenizer
from worker.training.pipeline import cap_gpu_memory
from worker.training.ranks import join_group, leave_group, use_share_of_cores
from worker.training.stack import import_stack
from worker.training.trainer import train

logger = logging.getLogger(__name__)


class SilentSink:
    """Rank 0 tells everything."""

    def log(self, entry: Entry) -> None: ...

    def phase(self, phase: Phase) -> None: ...

    def metrics(self, row: dict[str, float | int | None]) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def data_report(self, report: dict[str, Any]) -> None: ...

    def checkpoint(self, checkpoint: Checkpoint) -> None: ...

    def artifact(self, artifact: Artifact) -> None: ...


def main() -> None:
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), name="rank 0", daemon=True).start()
    order = lines.get()
    folder = Path(order["root"]) / "ranks"
    try:
        _run(order, folder, lines)
    except Exception as error:
        logger.exception("Rank %d failed", order["rank"])
        failure = explain(error)
        told: dict[str, Any] = {
            "code": failure.code,
            "message": failure.message,
            "advice": failure.advice,
        }
        if isinstance(failure, OutOfMemory):
            told["of_machine"] = failure.of_machine
        (folder / f"{order['rank']}.failure").write_text(json.dumps(told), encoding="utf-8")
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)


def _run(order: dict[str, Any], folder: Path, lines: queue.Queue[dict[str, Any]]) -> None:
    spec, plan = JobSpec.from_json(order["spec"]), Plan(**order["plan"])
    model = ResolvedModel(**order["model"] | {"path": Path(order["model"]["path"])})
    import_stack(plan.engine)
    cap_gpu_memory(plan, order["gpu_memory_fraction"])
    import datasets

    fetch_weights(model)
    trained = engine_of(plan).load_model(spec, plan, model)
    handed = lines.get()
    rows = {
        name: datasets.Dataset.from_file(handed[name]) for name in ("train", "validation") if name in handed
    }
    data = PreparedData(
        train=rows["train"],
        validation=rows.get("validation"),
        report={},
        sha256=handed["sha256"],
        train_tokens=0,
        longest=0,
        chat_template=handed["chat_template"],
        stop_token=handed["stop_token"],
    )
    tokenizer = load_tokenizer(model)
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    use_share_of_cores()
    (folder / f"{order['rank']}.ready").touch()
    join_group(plan, order["rank"], folder)
    output = Path(order["root"]) / CHECKPOINTS
    # Rank 0 stops the job, and this process with it.
    train(spec, plan, trained, tokenizer, data, output, SilentSink(), GoOn(), model.revision)
    leave_group()


def _listen(lines: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        lines.put(json.loads(line))
    os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main()
