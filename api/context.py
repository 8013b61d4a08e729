"""What one API process is made of."""

from __future__ import annotations

from dataclasses import dataclass

from api.audit import AuditLog
from api.limits import OpenRequests, RateLimiter
from api.metrics import Metrics
from api.news import Hub
from api.queue_view import QueueView
from api.services.inspection import Inspector
from shared.database import Database
from shared.hub import HubConfigs
from shared.queue import Doorbell
from shared.settings import Settings
from shared.storage import Store


@dataclass(frozen=True)
class Context:
    """Built when the application starts, closed when it stops."""

    settings: Settings
    database: Database
    store: Store
    doorbell: Doorbell
    hub: Hub
    inspector: Inspector
    metrics: Metrics
    configs: HubConfigs
    limiter: RateLimiter
    queue: QueueView
    open_requests: OpenRequests
    audit: AuditLog


@dataclass(frozen=True)
class Caller:
    """Who asks. An admin sees everybody's, an owner only its own; `high` may post jobs of high priority."""

    name: str
    admin: bool
    key_id: int | None = None
    high: bool = False

    @property
    def scope(self) -> str | None:
        """The owner that queries are narrowed to; None for all."""
        return None if self.admin else self.name
