"""The HTTP server."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from api.context import Context

GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """Uvicorn, which ends the waits of followers and long polls before it waits for open requests."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
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
