"""From exceptions to what the user reads."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from shared.errors import DatasetError, JobFailure, OutOfMemory
from shared.lifecycle import FailureCode
from worker.training.failures import explain


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), FailureCode.OUT_OF_MEMORY),
        (MemoryError(), FailureCode.OUT_OF_MEMORY),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes."),
            FailureCode.OUT_OF_MEMORY,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), FailureCode.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), FailureCode.OUT_OF_DISK),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device"),
            FailureCode.OUT_OF_DISK,
        ),
        (DatasetError("Expected an object", line=7), FailureCode.INVALID_DATASET),
        (ValueError("something else"), FailureCode.INTERNAL_ERROR),
        (FileNotFoundError(errno.ENOENT, "No such file"), FailureCode.INTERNAL_ERROR),
    ],
)
def test_errors_have_their_code_and_advice(error: BaseException, code: FailureCode) -> None:
    failure = explain(error)
    assert failure.code == code
    assert failure.message
    # Who knows the spec gives the advice.
    assert bool(failure.advice) != isinstance(failure, OutOfMemory)


def test_the_cause_counts() -> None:
    error = RuntimeError("writing failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain(error).code == FailureCode.OUT_OF_DISK


def test_out_of_memory_is_told_in_two_sentences() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which …"
    assert explain(torch.OutOfMemoryError(said)).message == (
        "The job ran out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    )


@pytest.mark.parametrize(
    ("error", "of_machine"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), False),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
    ],
)
def test_whose_memory_ran_out_is_told(error: BaseException, of_machine: bool) -> None:
    failure = explain(error)
    assert isinstance(failure, OutOfMemory)
    assert failure.of_machine == of_machine


def test_a_failure_is_itself() -> None:
    failure = JobFailure(FailureCode.DIVERGED, "message", "advice")
    assert explain(failure) is failure


def test_a_line_is_named() -> None:
    assert "(line 7)" in explain(DatasetError("Expected an object", line=7)).message


def test_an_unknown_error_is_told_by_its_last_line() -> None:
    assert explain(KeyError("weights")).message == "KeyError: 'weights'"
    assert explain(RuntimeError()).message == "RuntimeError"
    assert explain(ValueError("first\nsecond")).message == "ValueError: first"
