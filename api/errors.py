"""One shape for every error, and one place that renders it."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from shared.errors import (
    InvalidRequest,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    RangeNotSatisfiable,
    RateLimited,
    TuneyardError,
    Unauthorized,
    Unavailable,
)
from shared.storage import StoreUnavailable

logger = logging.getLogger(__name__)

V1 = "/v1/"
MAX_TOLD = 5
MAX_PARAM = 100
# Where FastAPI found the value: no part of the field's name.
PLACES = frozenset({"body", "query", "path", "header", "cookie"})
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# pydantic names the type that a value was held against, where there are several; so it does a dict's key.
UNION_MEMBER = re.compile(r"str|list\[.+\]|dict\[.+\]|\[key\]")
# pydantic names the member of a tagged union in the location; the field that the user wrote has no such part.
UNION_TAGS = frozenset(
    (field, source) for field in ("dataset", "validation_dataset") for source in ("hub", "file")
)

# The class of errors for a full disk.
POSTGRESQL_DISK_FULL = "53100"

CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "union_tag_not_found": "missing_field",
    "int_from_float": "invalid_type",
    "int_parsing": "invalid_type",
    "float_parsing": "invalid_type",
    "bool_parsing": "invalid_type",
    "dict_type": "invalid_type",
    "greater_than": "out_of_range",
    "greater_than_equal": "out_of_range",
    "less_than": "out_of_range",
    "less_than_equal": "out_of_range",
    "finite_number": "out_of_range",
    "int_parsing_size": "out_of_range",
    "too_long": "out_of_range",
    "too_short": "out_of_range",
    "string_too_long": "out_of_range",
    "string_too_short": "out_of_range",
}

Body = TypeVar("Body", bound=BaseModel)


def install(app: FastAPI) -> None:
    """Let this application answer every error in the contract's shape."""
    app.add_exception_handler(TuneyardError, _known)
    app.add_exception_handler(RequestValidationError, _invalid_parameters)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(OperationalError, _database_away)
    app.add_exception_handler(PoolTimeout, _database_away)
    app.add_exception_handler(StoreUnavailable, _store_away)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


def render(error: TuneyardError, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """The error as the response to a request of this path.

    Under `/v1` what is invalid is a 400, and OpenAI's clients are told not to send again what can't be right
    the next time: of 409 and 429 they would.
    """
    told = dict(headers or {})
    status = error.status
    if path.startswith(V1):
        status = MalformedRequest.status if status == InvalidRequest.status else status
        if status < TuneyardError.status and not isinstance(error, RateLimited):
            told["x-should-retry"] = "false"
    if isinstance(error, RateLimited):
        told |= error.headers
    if isinstance(error, Unauthorized):
        told["www-authenticate"] = 'Bearer realm="tuneyard"'
    if isinstance(error, RangeNotSatisfiable):
        told["content-range"] = f"bytes */{error.size}"
    # ASCII with escapes: a message may quote characters that no encoding takes.
    body = json.dumps(error.body())
    return Response(body, status, told, media_type="application/json")


def read_body(model: type[Body], body: bytes | str) -> Body:
    """The JSON document as this model.

    Raises:
        MalformedRequest: it is not JSON.
        InvalidRequest: names the first field that is wrong, and tells of the others.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        # Without pydantic's own error, which repeats what was given: that may be a secret.
        raise _from_findings(error.errors(include_url=False, include_input=False)) from None


def _from_findings(findings: Sequence[Mapping[str, Any]]) -> TuneyardError:
    first = findings[0]
    if first["type"] == "json_invalid":
        return MalformedRequest(f"The body is not valid JSON: {first['ctx']['error']}.")
    findings = _without_echoes(findings)
    first = findings[0]
    sentences = [_sentence(finding) for finding in findings[:MAX_TOLD]]
    if len(findings) > MAX_TOLD:
        sentences.append(f"And {len(findings) - MAX_TOLD} more.")
    return InvalidRequest(" ".join(sentences), param=_param(first), code=_code(first["type"]))


def _without_echoes(findings: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Leave out the lengths of what has wrong items: pydantic counts only the items that are right."""
    within = {finding["loc"][:end] for finding in findings for end in range(len(finding["loc"]))}
    return [f for f in findings if f["type"] not in ("too_short", "too_long") or f["loc"] not in within]


def _code(kind: str) -> str:
    return CODES.get(kind) or ("invalid_type" if kind.endswith("_type") else "invalid_value")


def _param(finding: Mapping[str, Any]) -> str | None:
    parts = [part for part in finding["loc"] if not UNION_MEMBER.fullmatch(str(part))]
    if parts and parts[0] in PLACES and len(parts) > 1:
        parts = parts[1:]
    if tuple(parts[:2]) in UNION_TAGS:
        parts = parts[:1] + parts[2:]
    if finding["type"].startswith("union_tag"):
        parts.append(str(finding["ctx"]["discriminator"]).strip("'"))
    return ".".join(str(part) for part in parts)[:MAX_PARAM] or None


def _sentence(finding: Mapping[str, Any]) -> str:
    kind, name, context = finding["type"], _param(finding), finding.get("ctx") or {}
    if kind == "extra_forbidden":
        return f"There is no field {name}."
    if kind in ("missing", "union_tag_not_found"):
        return f"{name} is missing."
    if kind == "none_required":
        return f"{name} can't be set in this version: leave it out."
    if kind == "union_tag_invalid":
        return f"{name} must be one of {context['expected_tags']}."
    if kind in ("too_long", "string_too_long"):
        found = f"{context['actual_length']}, where " if context.get("actual_length") else ""
        return f"{name} is too long: {found}{context['max_length']} is the most."
    if kind in ("too_short", "string_too_short"):
        return f"{name} is too short: at least {context['min_length']} is needed."
    message = str(finding["msg"])
    if message.startswith("Input "):
        return f"{name or 'The body'} {message.removeprefix('Input ')}."
    if message.startswith("Value error, "):
        return f"{name or ''} {message.removeprefix('Value error, ')}.".lstrip()
    return f"{name or 'The body'}: {message}."


def _known(request: Request, error: Exception) -> Response:
    if not isinstance(error, TuneyardError):
        raise error
    return render(error, request.url.path)


def _invalid_parameters(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    findings = error.errors()
    known = _no_json(request) if findings[0]["type"] == "model_attributes_type" else None
    return render(known or _from_findings(findings), request.url.path)


def _no_json(request: Request) -> TuneyardError | None:
    """What is wrong with a body that was not read, for its header says that it is something else."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given == "application/json" or given.endswith("+json"):
        return None
    return MalformedRequest(
        f"This takes JSON, and the body came as {given[:100] or 'nothing in particular'}: send the header "
        "`Content-Type: application/json`.",
        code="unsupported_content_type",
    )


def _routing(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == MethodNotAllowed.status:
        known: TuneyardError = MethodNotAllowed(f"{request.method} is not possible here.")
        return render(known, request.url.path, {"allow": ", ".join(_allowed(request))})
    if error.status_code == NotFound.status:
        known = NotFound("There is nothing here. /docs lists what there is.", code="unknown_route")
    else:
        known = MalformedRequest(str(error.detail), code="malformed_request")
    return render(known, request.url.path, error.headers)


def _allowed(request: Request) -> list[str]:
    """The methods that the routes of this path have between them."""
    return [
        method
        for method in METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.router.routes
        )
    ]


def _gone(request: Request, _error: Exception) -> Response:
    # Nobody is there to read it.
    return render(MalformedRequest("The request broke off.", code="malformed_request"), request.url.path)


def _database_away(request: Request, error: Exception) -> Response:
    logger.error("The database did not answer: %s", error)
    away = Unavailable("The database does not answer at the moment: try again.")
    if _is_disk_full(error):
        away = Unavailable(
            "The disk of the server's database is full: its operator has to make room.",
            code="storage_unavailable",
        )
    return render(away, request.url.path, {"retry-after": "2"})


def _is_disk_full(error: Exception) -> bool:
    said = getattr(error, "orig", None)
    full = getattr(said, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return full or getattr(said, "sqlstate", None) == POSTGRESQL_DISK_FULL


def _store_away(request: Request, error: Exception) -> Response:
    logger.error("The store did not answer: %s", error.__cause__)
    away = Unavailable(f"{error} Try again.", code="storage_unavailable")
    return render(away, request.url.path, {"retry-after": "2"})


def _unexpected(request: Request, _error: Exception) -> Response:
    # Starlette raises the exception again after this answer, so that the server logs its traceback.
    request_id = request.scope.get("tuneyard.request_id", "unknown")
    logger.error("Request %s failed: %s %r", request_id, request.method, request.url.path)
    error = TuneyardError(
        f"Something went wrong on the server. Its log tells more about request {request_id}."
    )
    return render(error, request.url.path, {"x-request-id": request_id})
