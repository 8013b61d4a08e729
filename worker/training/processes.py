"""Runs a tool in a process of its own, under the job's control."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from shared.errors import JobFailure
from shared.events import Control
from shared.lifecycle import FailureCode
from shared.savings import EXPORT_MEMORY_ADVICE
from worker.training.failures import DISK_ADVICE, is_full, tells_of_full_disk

POLL_SECONDS = 0.1


def run_tool(what: str, command: list[str], control: Control, *, scratch: Path, limit_seconds: float) -> str:
    """Run a command to its end and return what it wrote to stdout.

    The process stays in the job's process group, so whatever ends the job's group ends it too; when
    `control` stops the job or the time is up, it is killed and waited for here.

    Args:
        what: what the tool does, for the failure's message (`Converting to GGUF`).
        scratch: a folder for its output, which may be large.

    Raises:
        JobFailure: `export_failed`, with the last line that the tool wrote to stderr or stdout;
            `out_of_disk` or `out_of_memory` where that was the cause.
        JobStopped: the job was stopped meanwhile.
    """
    stdout, stderr = scratch / "tool.stdout", scratch / "tool.stderr"
    deadline = time.monotonic() + limit_seconds
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            while (code := process.poll()) is None:
                control.check()
                if time.monotonic() > deadline:
                    raise _failed(f"{what} took more than {limit_seconds:.0f} s and was stopped.")
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            text, complaints = _take(stdout), _take(stderr)
    if code != 0:
        raise _explain(what, code, text + "\n" + complaints, scratch)
    return text


def _explain(what: str, code: int, output: str, scratch: Path) -> JobFailure:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = lines[-1] if lines else "it wrote nothing"
    # llama.cpp says no more than that it could not write.
    if tells_of_full_disk(said) or is_full(scratch):
        return JobFailure(FailureCode.OUT_OF_DISK, f"{what}: the disk is full.", DISK_ADVICE)
    if code == -signal.SIGKILL:
        return JobFailure(
            FailureCode.OUT_OF_MEMORY,
            f"{what}: the system killed the tool, as it does when memory runs out.",
            EXPORT_MEMORY_ADVICE,
        )
    how = f"exit code {code}" if code > 0 else f"signal {-code}"
    return _failed(f"{what} ended with {how}: {said}")


def _take(file: Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")
    file.unlink()
    return text


def _failed(message: str) -> JobFailure:
    return JobFailure(
        FailureCode.EXPORT_FAILED,
        message,
        "The exports finished before this one are kept. Submit the job without this format, or convert the "
        "merged_16bit export with another version of llama.cpp.",
    )
