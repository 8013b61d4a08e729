"""What of an owner's secrets goes to a process of its."""

from __future__ import annotations

import logging
from pathlib import Path

from shared.database import Database
from shared.errors import TuneyardError
from shared.repository import secrets
from shared.settings import Settings
from shared.vault import VARIABLES, Vault
from worker.caches import owner_cache

HUB_TOKEN = VARIABLES["hub_token"]

logger = logging.getLogger(__name__)


class OwnerSecrets:
    """Reads owners' secrets as their jobs start."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._vault = Vault(settings)
        self._database = database
        self._caches = settings.root / "cache"

    def of(self, owner: str) -> dict[str, str]:
        """By variable. One that can't be opened here is left out, and the worker's log says so."""
        with self._database.read() as session:
            rows = secrets.list_secrets(session, owner)
        found = {}
        for row in rows:
            try:
                found[VARIABLES[row.name]] = self._vault.open(owner, row.name, row.sealed)
            except (TuneyardError, OSError) as error:
                logger.error("The secret %s of %s: %s", row.name, owner, error)
        return found

    def hub_cache(self, owner: str, secrets: dict[str, str]) -> Path | None:
        """The owner's own folder for what its token opens on the hub; None without a token."""
        if HUB_TOKEN not in secrets:
            return None
        return owner_cache(self._caches, owner)
