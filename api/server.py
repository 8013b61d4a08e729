"""The HTTP server."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from api.context import Context
from api.protocol import BoundedProtocol, raise_file_limit
from shared.settings import Settings

GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """Uvicorn, which ends the waits of followers and long polls before it waits for open requests."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        raise_file_limit()
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=BoundedProtocol,
            access_log=False,
            log_level="warning",
            server_header=False,
            # X-Forwarded-For and -Proto count only from these peers; from nobody unless the operator says so.
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=settings.trusted_proxies,
            ws="none",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        context: Context | None = getattr(self._app.state, "context", None)
        if context is not None:
            context.hub.close()
        await super().shutdown(sockets)
