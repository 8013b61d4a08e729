"""Pure ASGI middleware: request ids and timing, Host and Origin, the size of bodies."""

from __future__ import annotations

import re
import secrets
import socket
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import render
from api.metrics import Metrics
from shared.errors import Forbidden, TooLarge, TuneyardError
from shared.settings import Settings, matches

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LOOPBACK = "localhost,127.0.0.1,[[]::1]"
WILDCARDS = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - compared with, not bound to
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
UPLOAD_PATHS = re.compile(r"/datasets|/v1/files|/v1/uploads/[^/]+/parts")
FORM_FIELDS = ("", "application/x-www-form-urlencoded")
# Where in the scope a request has headers for its answer, whatever that will be.
HEADERS = "tuneyard.headers"


class RequestLog:
    """Gives every request an id (`x-request-id`, the client's own if it is a plain one) and times it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(10)
        scope["tuneyard.request_id"] = request_id
        started = time.perf_counter()
        answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(scope.get(HEADERS, {}))
                headers["x-content-type-options"] = "nosniff"
                # To the first byte: a stream that is followed for hours is no slow request.
                seconds = time.perf_counter() - started
                self._metrics.observe(scope, message["status"], seconds)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Starlette answers outside of this, and raises it again for the server's log.
            if not answered:
                self._metrics.observe(scope, 500, time.perf_counter() - started)
            raise


class Guard:
    """Refuses requests with a strange Host (a web page that had its name point here) or Origin."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        own = [LOOPBACK, _literal(socket.gethostname().lower())]
        if settings.host not in WILDCARDS:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            own.append(_literal(host.lower()))
        self._hosts = ",".join([*own, settings.allowed_hosts.lower()])
        self._origins = settings.allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            error = self._check(headers.get("host", "").lower(), headers.get("origin"))
            if error is not None:
                await render(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, host: str, origin: str | None) -> TuneyardError | None:
        name = re.sub(r":\d*$", "", host)
        if not matches(self._hosts, name):
            return Forbidden(
                "This server does not answer to that Host. Its operator can add the name to "
                "TUNEYARD_ALLOWED_HOSTS.",
                code="host_not_allowed",
            )
        if origin is None or _is_same(origin, host) or matches(self._origins, origin):
            return None
        return Forbidden(
            "Web pages of that Origin may not call this server. Its operator can add it to "
            "TUNEYARD_ALLOWED_ORIGINS.",
            code="origin_not_allowed",
        )


class PlainPosts:
    """Lets `curl -d` be: it calls its body a form's fields where nobody says that it is JSON.

    No route takes such a form, and none acts on cookies that a web page's form could use.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        if posted and Headers(scope=scope).get("content-type", "") in FORM_FIELDS:
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*headers, (b"content-type", b"application/json")]
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies over the limit, by what they claim and while they come. Uploads have their own limit."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_upload(scope):
            await self._app(scope, receive, send)
            return
        claimed = Headers(scope=scope).get("content-length", "")
        if claimed.isdecimal() and int(claimed[:20]) > self._limit:
            await render(self._error(), scope["path"])(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._error()
            return message

        await self._app(scope, receive_limited, send)

    def _error(self) -> TooLarge:
        return TooLarge(f"The body is over this server's limit of {self._limit} bytes.")


def _is_upload(scope: Scope) -> bool:
    return scope["method"] == "POST" and UPLOAD_PATHS.fullmatch(scope["path"]) is not None


def _literal(name: str) -> str:
    """The name as a pattern that covers nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return False
    port = DEFAULT_PORTS.get(parts.scheme)
    return port is not None and parts.netloc.removesuffix(port) == host.removesuffix(port)
