"""One job on several GPUs: rank 0 is the job's own process, which starts the others and ends them with it.

Every rank sees one GPU, loads the model onto it and trains on its share of each step's rows; gradients are
averaged over all. Ranks meet through a file in the attempt's folder and talk over the loopback interface.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from shared.errors import JobFailure, JobStopped, OutOfMemory, ProcessLost
from shared.events import TrainingControl
from shared.lifecycle import FailureCode
from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.models import ResolvedModel
from worker.training.overlap import Loading
from worker.training.workdir import Workdir

if TYPE_CHECKING:
    from worker.training.data import PreparedData

MODULE = "worker.training.rank"
POLL_SECONDS = 0.1
# A rank that waits for others which write a checkpoint, or compile, is not lost.
PATIENCE = timedelta(hours=1)
END_SECONDS = 20.0
NOTICE_SECONDS = 3.0

_BREAKING_OFF = threading.Lock()


class Ranks:
    """The other ranks of a job; also the job's control, which stops when one of them has failed.

    Does nothing for a job on one GPU.
    """

    def __init__(self, plan: Plan, workdir: Workdir, control: TrainingControl) -> None:
        self._plan = plan
        self._workdir = workdir
        self._control = control
        self._folder = workdir.root / "ranks"
        self._processes: list[subprocess.Popen[str]] = []
        self._before: dict[str, str | None] = {}
        self._joined = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and self._joined:
            # A broken connection is noticed before the end of the process behind it.
            deadline = time.monotonic() + NOTICE_SECONDS
            while self._failure() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        failure = self._failure() if error is not None else None
        self._end(failed=error is not None)
        if failure is not None and not isinstance(error, JobStopped):
            # That a peer is gone is all that this rank's own error can say; sums that it had no part in may
            # even look like training that diverged.
            raise failure from error

    def check(self) -> None:
        """
        Raises:
            JobStopped: the job's control said so.
            JobFailure: another rank has failed.
            ProcessLost: another rank is gone.
        """
        self._control.check()
        failure = self._failure()
        if failure is not None:
            raise failure

    def leaving(self) -> bool:
        return self._control.leaving()

    def start(self, spec: JobSpec, model: ResolvedModel) -> None:
        """Start the other ranks: they import and load the model while this one prepares the data."""
        if self._plan.gpus == 1:
            return
        self._folder.mkdir()
        told = asdict(replace(model, path=Path())) | {"path": str(model.path)}
        order: dict[str, Any] = {"spec": spec.to_json(), "plan": self._plan.model_dump(), "model": told}
        order["gpu_memory_fraction"] = self._workdir.gpu_memory_fraction
        for rank in range(1, self._plan.gpus):
            environment = os.environ | self._environment(rank)
            if self._plan.device == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = str(self._workdir.gpus[rank])
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                # What it prints goes where this process' output goes.
                env=environment,
                cwd=Path(__file__).parents[2],
                text=True,
            )
            self._processes.append(process)
            self._say(process, order | {"rank": rank, "root": str(self._workdir.root)})
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def join(self, data: PreparedData) -> None:
        """Give the others the data, wait until all are ready, and form the group that trains together."""
        if self._plan.gpus == 1:
            return
        handed: dict[str, Any] = {
            "chat_template": data.chat_template,
            "stop_token": data.stop_token,
            "sha256": data.sha256,
        }
        for name, rows in (("train", data.train), ("validation", data.validation)):
            if rows is not None:
                handed[name] = str(_keep(Path(rows.cache_files[0]["filename"]), self._folder))
        for process in self._processes:
            self._say(process, handed)
        while not all((self._folder / f"{rank}.ready").exists() for rank in range(1, self._plan.gpus)):
            self.check()
            time.sleep(POLL_SECONDS)
        environment = self._environment(0)
        self._before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        self._joined = True
        use_share_of_cores()
        # On a thread: one that dies at this moment would be waited for as long as one that compiles.
        Loading(lambda: join_group(self._plan, 0, self._folder), self).result()

    def leave(self) -> None:
        """Training is over: from here on this rank is alone."""
        self._end(failed=False)

    def _environment(self, rank: int) -> dict[str, str]:
        """What accelerate reads. Each rank sees one GPU, which to it is the first."""
        threads = max(1, (os.cpu_count() or 1) // self._plan.gpus)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self._plan.gpus),
            "LOCAL_RANK": "0" if self._plan.device == "cuda" else str(rank),
            "LOCAL_WORLD_SIZE": str(self._plan.gpus),
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": str(threads),
        }

    def _say(self, process: subprocess.Popen[str], line: dict[str, Any]) -> None:
        try:
            if process.stdin is not None:
                process.stdin.write(json.dumps(line) + "\n")
                process.stdin.flush()
        except BrokenPipeError:
            return  # It has just ended: `check` tells.

    def _failure(self) -> JobFailure | ProcessLost | None:
        """What a rank that failed says of it, and of one that said nothing, how it ended.

        The first that ran out of memory, else the first that is gone: the others lose their connection to
        it, and say no more than that.
        """
        failed = [
            self._told(rank, code)
            for rank, process in enumerate(self._processes, start=1)
            if (code := process.poll())
        ]
        failed.sort(key=lambda f: (not isinstance(f, OutOfMemory), not isinstance(f, ProcessLost)))
        return failed[0] if failed else None

    def _told(self, rank: int, code: int) -> JobFailure | ProcessLost:
        try:
            told = json.loads((self._folder / f"{rank}.failure").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            gpu = self._workdir.gpus[rank] if self._plan.device == "cuda" else rank
            return ProcessLost(f"The job's process on GPU {gpu} ended unexpectedly ({how}).")
        if "of_machine" in told:
            return OutOfMemory(FailureCode(told["code"]), told["message"], of_machine=told["of_machine"])
        return JobFailure(FailureCode(told["code"]), told["message"], told["advice"])

    def _watch(self) -> None:
        """Free this rank from an operation in which it waits for one that is gone."""
        while any(process.poll() is None for process in self._processes):
            time.sleep(POLL_SECONDS)
            if any(process.poll() for process in self._processes):
                break
        else:
            return
        if self._joined and self._plan.device == "cuda":
            # With gloo the connection's end is an error by itself.
            break_off()

    def _end(self, *, failed: bool) -> None:
        processes, self._processes = self._processes, []
        if not processes:
            return
        if failed:
            for process in processes:
                process.kill()
        if self._joined:
            leave_group(abort=failed and self._plan.device == "cuda")
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            self._joined = False
        deadline = time.monotonic() + END_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def use_share_of_cores() -> None:
    """For the thread that trains."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def join_group(plan: Plan, rank: int, folder: Path) -> None:
    """Meet the other ranks."""
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if plan.device == "cuda" else "gloo",
        store=dist.FileStore(str(folder / "store"), plan.gpus),  # type: ignore[attr-defined]
        rank=rank,
        world_size=plan.gpus,
        timeout=PATIENCE,
    )


def leave_group(*, abort: bool = False) -> None:
    """Forget the group, so that this process can train alone again.

    Args:
        abort: others are gone, and what waits for them on the GPU never ends by itself.
    """
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    if abort:
        break_off()
    elif dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def break_off() -> None:
    """End the group without the others; on any thread, and any number of times."""
    import torch.distributed as dist

    # torch takes a group that is gone, or never came to be, for an error of its own.
    with _BREAKING_OFF:
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()


def _keep(file: Path, folder: Path) -> Path:
    """The file under a name that stays while the job runs: the cache may give it up."""
    kept = folder / file.name
    try:
        os.link(file, kept)
    except OSError:
        shutil.copyfile(file, kept)
    return kept
