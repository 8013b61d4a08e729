"""Owners' secrets, encrypted at rest under a key that is kept apart from the database."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.errors import TuneyardError, Unavailable
from shared.settings import Settings

# By the name of a secret, the variable by which libraries know it.
VARIABLES = {"hub_token": "HF_TOKEN", "wandb_api_key": "WANDB_API_KEY"}
KEY_BYTES = 32
NONCE_BYTES = 12
HIDDEN = "[secret]"


class Vault:
    """AES-256-GCM with the owner and the secret's name as associated data: a row that somebody moves to
    another owner can't be opened.

    The key is `TUNEYARD_SECRETS_KEY`, or in `DATA_DIR/secrets.key` (0600), made when it is first needed.
    """

    def __init__(self, settings: Settings) -> None:
        self._given = settings.secrets_key.get_secret_value() if settings.secrets_key else None
        self._file = settings.root / "secrets.key"

    def seal(self, owner: str, name: str, value: str) -> str:
        """The value, encrypted, as text for the database."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = AESGCM(self._key()).encrypt(nonce, value.encode(), _bound_to(owner, name))
        return base64.b64encode(nonce + sealed).decode()

    def open(self, owner: str, name: str, sealed: str) -> str:
        """
        Raises:
            Unavailable: it was sealed under another key, or for somebody else.
        """
        raw = base64.b64decode(sealed)
        try:
            cipher = AESGCM(self._key())
            return cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], _bound_to(owner, name)).decode()
        except InvalidTag:
            raise Unavailable(
                f"The secret {name} can't be opened with this machine's key: give all machines the same "
                "TUNEYARD_SECRETS_KEY, or set the secret again."
            ) from None

    def _key(self) -> bytes:
        text = self._given if self._given is not None else _kept(self._file)
        try:
            key = base64.urlsafe_b64decode(text)
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            where = "TUNEYARD_SECRETS_KEY" if self._given is not None else str(self._file)
            raise TuneyardError(f"{where} is no key: it is {KEY_BYTES} bytes in URL-safe base64.")
        return key


class Redactor:
    """Takes secrets out of what is written down."""

    def __init__(self, values: Iterable[str]) -> None:
        self._values = sorted(values, key=len, reverse=True)

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text

    def value(self, value: Any) -> Any:
        """The same for all texts in plain JSON types."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value


def _bound_to(owner: str, name: str) -> bytes:
    return f"{owner}\0{name}".encode()


def _kept(path: Path) -> str:
    """The key in the file; the first of several processes that need one makes it."""
    if path.is_file():
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        return path.read_text(encoding="utf-8").strip()
    try:
        made = base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode()
        # Written aside and linked: whoever finds the file finds all of the key.
        aside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(made + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        finally:
            aside.unlink()
    except FileExistsError:
        pass  # Another process was quicker.
    return path.read_text(encoding="utf-8").strip()
