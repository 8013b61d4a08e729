"""From any exception of the pipeline to the failure that its user reads."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from shared.errors import DatasetError, JobFailure, OutOfMemory
from shared.lifecycle import FailureCode
from shared.storage import StoreUnavailable

DISK_ADVICE = "Free space in the server's data folder, or ask for fewer exports, then submit the job again."
STORE_ADVICE = "Submit the job again once GET /readyz says that the store can be used."
DIVERGED_ADVICE = (
    "Lower training.learning_rate (a tenth is a good next try), raise training.warmup_ratio, or look for "
    "broken rows in the data."
)

_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# So little is left where something large did not fit.
NO_SPACE_BYTES = 16 * 1024 * 1024
# Where torch, safetensors and arrow raise errors of their own, the operating system's words are what is left.
_DISK_WORDS = ("no space left on device", "disk quota exceeded")
_GPU_MEMORY_WORDS = ("out of memory", "alloc_failed")
_MAIN_MEMORY_WORDS = ("can't allocate memory", "cannot allocate memory")


def explain(error: BaseException) -> JobFailure:
    """What went wrong, for the user, with a failure code and advice.

    Args:
        error: anything that left the pipeline, except JobStopped and LeaseLost, which are no failures.

    Returns:
        The failure itself where it is one; otherwise one made from the error or from what caused it.
    """
    for cause in _chain(error):
        if isinstance(cause, JobFailure):
            return cause
        if isinstance(cause, DatasetError):
            where = f" (line {cause.line})" if cause.line is not None else ""
            return JobFailure(
                FailureCode.INVALID_DATASET,
                f"{cause}{where}",
                "Correct the data, upload it again and submit the job again.",
            )
        if isinstance(cause, StoreUnavailable):
            return JobFailure(FailureCode.EXPORT_FAILED, str(cause), STORE_ADVICE)
        if out_of_disk(cause):
            return JobFailure(FailureCode.OUT_OF_DISK, "The disk is full.", DISK_ADVICE)
        of_machine = _out_of_main_memory(cause)
        if of_machine or _out_of_gpu_memory(cause):
            message = f"The job ran out of memory: {_first_words(cause)}"
            return OutOfMemory(FailureCode.OUT_OF_MEMORY, message, of_machine=of_machine)
    return JobFailure(
        FailureCode.INTERNAL_ERROR,
        last_line(error),
        "This is not the job's fault as far as the service can tell. Submit it again; if it fails again, "
        "report it with the job's log.",
    )


def tells_of_full_disk(text: str) -> bool:
    """Whether an error's text is the operating system's for a full disk or quota."""
    return any(words in text.lower() for words in _DISK_WORDS)


def is_full(folder: Path) -> bool:
    """Whether the folder's disk may be why something could not be written: some libraries don't say."""
    return shutil.disk_usage(folder).free < NO_SPACE_BYTES


def last_line(error: BaseException) -> str:
    """An exception as the last line of its traceback has it, on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _first_words(error: BaseException) -> str:
    """The first two sentences: torch goes on with a page about its allocator."""
    sentences = last_line(error).split(". ")
    return ". ".join(sentences[:2]).rstrip(".") + "."


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def out_of_disk(error: BaseException) -> bool:
    """Whether the error itself says so."""
    return (isinstance(error, OSError) and error.errno in _DISK_ERRNOS) or tells_of_full_disk(str(error))


def _out_of_gpu_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by its name: this module is also used where torch never came to be loaded.
    return any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _GPU_MEMORY_WORDS)
    )


def _out_of_main_memory(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MAIN_MEMORY_WORDS)
    )
