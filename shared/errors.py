"""Every error that Tuneyard answers with or records, as one tree.

A `TuneyardError` knows its HTTP status, code and type; the API's one handler renders it. A `JobFailure`
ends a job: it knows its failure code, a message for the user and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from shared.lifecycle import FailureCode


class TuneyardError(Exception):
    """An error with a place in the API's contract.

    Args:
        message: what is wrong and what to do about it, for a reader who has not seen the code.
        param: dotted name of the field at fault (`lora.r`), if one is.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "code": self.error_code,
                "message": self.message,
                "param": self.param,
                "type": self.type,
            }
        }


class InvalidRequest(TuneyardError):
    """The request was understood and is not acceptable (422)."""

    status, code, type = 422, "invalid_value", "invalid_request_error"


class MalformedRequest(TuneyardError):
    """The body is not what its content type says (400)."""

    status, code, type = 400, "malformed_json", "invalid_request_error"


class Unauthorized(TuneyardError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class Forbidden(TuneyardError):
    """The request came from a place or with a key that may not do this (403)."""

    status, code, type = 403, "forbidden", "permission_error"


class NotFound(TuneyardError):
    """Absent, or somebody else's: the two can't be told apart from outside."""

    status, code, type = 404, "not_found", "invalid_request_error"


class MethodNotAllowed(TuneyardError):
    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class StateConflict(TuneyardError):
    """The thing exists, in a state that forbids this (409)."""

    status, code, type = 409, "conflict", "invalid_request_error"


class TooLarge(TuneyardError):
    status, code, type = 413, "too_large", "invalid_request_error"


class RangeNotSatisfiable(TuneyardError):
    """A Range that lies outside the file (416); the answer carries Content-Range: bytes */SIZE."""

    status, code, type = 416, "range_not_satisfiable", "invalid_request_error"

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


class QuotaExceeded(TuneyardError):
    status, code, type = 429, "quota_exceeded", "rate_limit_error"


class RateLimited(TuneyardError):
    """The key has made as many requests as it may (429); `headers` say when it may go on."""

    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"

    def __init__(self, message: str, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.headers = headers


class Unavailable(TuneyardError):
    """Something the service needs is down for now (503)."""

    status, code, type = 503, "unavailable", "server_error"


class DatasetError(ValueError):
    """A data file can't be used. `line` is 1-based where one line is at fault."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class LeaseLost(Exception):
    """A writer no longer holds the job's lease: its result is dropped."""


class JobFailure(Exception):
    """Ends a job as `failed`.

    Args:
        code: one of the contract's failure codes.
        message: what went wrong, in one or two sentences.
        advice: what the user can do about it.
    """

    def __init__(self, code: FailureCode, message: str, advice: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.advice = advice


class ProcessLost(Exception):
    """A process of the attempt ended without a word: it counts as the loss of the whole attempt."""


class OutOfMemory(JobFailure):
    """Memory ran out where a cheaper plan may need less; the advice is given where the spec is known.

    Args:
        code: `out_of_memory`.
        message: what went wrong, in one or two sentences.
        of_machine: it was main memory, not a GPU's.
    """

    def __init__(self, code: FailureCode, message: str, *, of_machine: bool) -> None:
        super().__init__(code, message, "")
        self.of_machine = of_machine


class JobStopped(Exception):
    """The pipeline was asked to stop (cancel, pause or hand back), or may not go on yet, and has stopped."""


class NoRoomYet(JobStopped):
    """The disk room that a job or an export needs is free, but promised to others: it is to wait for it.

    Args:
        message: what is needed and where, in one sentence.
        needs: bytes that have to be free, by a folder on each disk.
    """

    def __init__(self, message: str, needs: dict[str, int]) -> None:
        super().__init__(message)
        self.message = message
        self.needs = needs
