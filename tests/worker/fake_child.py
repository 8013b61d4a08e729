"""A child process with a pipeline that trains nothing: `python -m tests.worker.fake_child`.

What it does is the first word of the job's name; everything around the pipeline is the real thing.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.disk import DiskNeed
from shared.errors import JobFailure, ProcessLost
from shared.events import Artifact, Checkpoint, Control, Entry, EventSink, Progress, TrainingControl
from shared.exports import artifact_name
from shared.lifecycle import FailureCode, Phase
from shared.plan import EngineName, Plan
from shared.spec import JobSpec
from tests.samples import size_and_hash
from worker.checkpoints import FOLDER, checkpoint_folder, complete_checkpoints
from worker.child import main
from worker.export_order import ADAPTER_FILE, LaterExport
from worker.reservations import free_bytes
from worker.training.room import Room
from worker.training.workdir import Workdir

# A pipeline that is never stopped ends by itself: nothing outlives a test that failed.
AT_MOST_SECONDS = 300
STEP_SECONDS = 0.1


def pipeline(
    spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: TrainingControl
) -> list[Artifact]:
    word = (spec.name or "succeed").split()[0]
    sink.phase(Phase.TRAINING)
    sink.log(
        Entry(
            "started",
            data={
                "pid": os.getpid(),
                "plan": plan.engine,
                "samples": spec.max_samples,
                "gpus": list(workdir.gpus),
            },
        )
    )
    if word == "succeed":
        return _succeed(workdir, sink)
    if word == "odd":
        sink.log(Entry("odd \x00\ud800", data={"deep": [float("nan"), {"er": "\udfff"}]}))
        return []
    if word == "tell":
        return _tell(workdir, sink, (spec.name or "").split()[1])
    if word in ("fail", "lost", "starved"):
        _fail(word, sink)
    if word == "die":
        time.sleep(0.3)  # long enough for the log to be written
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "forever":
        _train_until_stopped(sink, control, checks=True)
    if word == "roomy":
        return _hold_room(spec, workdir, sink, control)
    if word == "hungry":
        _run_out_of_memory(workdir, sink, attempts=int((spec.name or "").split()[1]))
        return _succeed(workdir, sink)
    if word in ("patient", "lasting", "saving"):
        held = int((spec.name or "").split()[-1])
        _train_until_told_to_leave(workdir, sink, control, held, saves=word == "saving")
        return {"patient": lambda *_: [], "lasting": _succeed, "saving": _publish_all}[word](workdir, sink)
    if word == "loading":
        sink.phase(Phase.LOADING_MODEL)
        _train_until_stopped(sink, control, checks=False)
    if word == "deaf":
        subprocess.Popen(["/bin/sleep", str(AT_MOST_SECONDS)])
        _train_until_stopped(sink, control, checks=False)
    raise AssertionError(word)


def _fail(word: str, sink: EventSink) -> None:
    if word == "starved":
        sink.phase(Phase.PREPARING_DATA)
        raise JobFailure(FailureCode.OUT_OF_MEMORY, "A process that prepared data was killed.", "Add memory.")
    if word == "lost":
        raise ProcessLost("The job's process on GPU 1 ended unexpectedly (signal 9).")
    raise ValueError("the pipeline broke")


def _hold_room(spec: JobSpec, workdir: Workdir, sink: EventSink, control: TrainingControl) -> list[Artifact]:
    with _most_of_the_disk(workdir, sink):
        if (spec.name or "").endswith("forever"):
            _train_until_stopped(sink, control, checks=True)
    return _succeed(workdir, sink)


@contextmanager
def _most_of_the_disk(workdir: Workdir, sink: EventSink) -> Iterator[None]:
    """Two of them are more than there is."""
    with Room(workdir, sink) as room:
        room.reserve(DiskNeed(free_bytes(workdir.root) * 6 // 10, 0, 0, 0, 0, {}, 0))
        sink.log(Entry("has room"))
        yield


def _tell(workdir: Workdir, sink: EventSink, ending: str) -> list[Artifact]:
    """Write the owner's hub token wherever a job can write."""
    token = os.environ.get("HF_TOKEN", "none")
    told = {"length": len(token), "home": os.environ.get("HF_HOME"), "data": str(workdir.data_cache)}
    sink.log(Entry(f"token {token}", data={**told, "list": [token], token: "key"}))
    sink.data_report({"token": token})
    logging.getLogger("tests").warning("logged %s", token)
    if ending == "fail":
        raise ValueError(f"refused {token}")
    if ending == "die":
        time.sleep(0.3)  # long enough for the log to be written
        print(f"died of {token}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return []


def _run_out_of_memory(workdir: Workdir, sink: EventSink, attempts: int) -> None:
    """In as many attempts, each time after step 2."""
    if int(workdir.root.name.partition("-")[0]) <= attempts:
        sink.progress(Progress(step=2, total_steps=3, epoch=0.5))
        raise MemoryError("no room for 4 GiB")


def _train_until_told_to_leave(
    workdir: Workdir, sink: EventSink, control: TrainingControl, held: int, *, saves: bool
) -> None:
    """Five steps, each with a row; one that is told to leave ends with a checkpoint. In the first attempt the
    step `held` lasts until then, or until the process gets SIGUSR1."""
    let_go = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: let_go.set())
    if not workdir.root.name.startswith("1-"):
        held = 0
    done = max(complete_checkpoints(workdir.root / FOLDER), default=0)
    sink.log(Entry(f"from step {done}"))
    for step in range(done + 1, 6):
        sink.metrics({"step": step, "loss": 1.0 / step})
        sink.progress(Progress(step=step, total_steps=5, epoch=step / 5))
        deadline = time.monotonic() + AT_MOST_SECONDS
        while step == held and not (control.leaving() or let_go.is_set()) and time.monotonic() < deadline:
            control.check()
            time.sleep(0.01)
        time.sleep(STEP_SECONDS)
        if not control.leaving():
            control.check()
        if saves or control.leaving():
            _checkpoint(workdir, sink, step)
            control.check()


def _checkpoint(workdir: Workdir, sink: EventSink, step: int) -> None:
    folder = checkpoint_folder(workdir.root / FOLDER, step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w")
    (folder / ADAPTER_FILE).write_bytes(f"step {step}".encode())
    sink.checkpoint(Checkpoint(step=step, path=folder, bytes=1, metrics={"loss": 0.3}))


def _succeed(workdir: Workdir, sink: EventSink) -> list[Artifact]:
    for step in range(1, 4):
        sink.metrics({"step": step, "loss": 1.0 / step, "grad_norm": float("nan")})
        sink.progress(Progress(step=step, total_steps=3, epoch=step / 3, loss=1.0 / step))
    _checkpoint(workdir, sink, 3)
    return _publish_all(workdir, sink)


def _publish_all(workdir: Workdir, sink: EventSink) -> list[Artifact]:
    given = [file.read_bytes() for file in (workdir.dataset_file, workdir.validation_file) if file]
    content = b"".join(given) or b"adapter"
    _publish(workdir.root / "manifest.json", b"{}", sink, listed=False)
    return [_publish(workdir.root / "adapter.tar", content, sink)]


def export(later: LaterExport, workdir: Workdir, sink: EventSink, control: Control) -> list[Artifact]:
    """The second word of the job's name says what an export of it does."""
    words = (later.spec.name or "").split()
    word = words[1] if len(words) > 1 else "succeed"
    sink.log(Entry("exporting", data={"pid": os.getpid()}))
    if word == "fail":
        raise ValueError("the export broke")
    if word == "roomy":
        with _most_of_the_disk(workdir, sink):
            pass
    if word == "die":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "forever":
        _train_until_stopped(sink, control, checks=True)
    content = (later.weights or later.adapter).read_bytes() + b" as " + later.format.encode()
    return [_publish(workdir.root / artifact_name(later.format, later.checkpoint), content, sink)]


def _publish(path: Path, content: bytes, sink: EventSink, *, listed: bool = True) -> Artifact:
    path.write_bytes(content)
    size, sha256 = size_and_hash(path)
    artifact = Artifact(name=path.name, kind="adapter", path=path, bytes=size, sha256=sha256, listed=listed)
    sink.artifact(artifact)
    return artifact


def _train_until_stopped(sink: EventSink, control: Control, *, checks: bool) -> None:
    step = 0
    deadline = time.monotonic() + AT_MOST_SECONDS
    while time.monotonic() < deadline:
        step += 1
        sink.log(Entry(f"step {step}", type="metrics", data={"step": step}))
        if checks:
            control.check()
        time.sleep(0.02)


def warm_up(engine: EngineName) -> None:
    """Stands for the imports."""
    # Sent through what the worker's own environment lets pass.
    time.sleep(float(os.environ.get("TORCH_TEST_SLOW_IMPORT_SECONDS", "0")))
    Path(os.environ["TMPDIR"], "warm").write_text(engine)


if __name__ == "__main__":
    main(pipeline, export, warm_up)
