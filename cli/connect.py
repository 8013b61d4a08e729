"""Finding the server and the key: from the environment, or from the data folder of this box."""

from __future__ import annotations

import os

from cli.client import Client, ConnectionFailed
from shared.settings import Settings


def connect() -> Client:
    """A client for `TUNEYARD_URL` and `TUNEYARD_API_KEY`, or for the server of this box with its local key.

    Raises:
        ConnectionFailed: there is no key to be found.
    """
    settings = Settings()
    key = os.environ.get("TUNEYARD_API_KEY") or _local_key(settings)
    return Client(os.environ.get("TUNEYARD_URL") or local_url(settings), key)


def local_url(settings: Settings) -> str:
    """Where the server of this data folder said it listens, or where the settings say it would."""
    told = settings.server_url_file
    if told.is_file():
        return told.read_text(encoding="utf-8").strip()
    return f"http://{settings.host}:{settings.port}"


def _local_key(settings: Settings) -> str:
    try:
        return settings.local_key_file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConnectionFailed(
            f"No API key: set TUNEYARD_API_KEY, or start a server on this box with `tuneyard serve` "
            f"(it makes {settings.local_key_file})."
        ) from None
    except PermissionError:
        raise ConnectionFailed(
            f"{settings.local_key_file} belongs to the user who runs the server: ask for a key of your own "
            "(`tuneyard keys create NAME`) and set TUNEYARD_API_KEY."
        ) from None
