"""Owners' secrets: set, list by name, delete. Nobody reads one back."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from api.context import Caller
from api.errors import read_body
from api.schemas import ListOut, SecretOut
from shared.database import Database
from shared.errors import NotFound
from shared.repository import secrets
from shared.settings import Settings
from shared.vault import VARIABLES, Vault


class SecretIn(BaseModel):
    """A secret's value: printable ASCII without spaces, as tokens are."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    value: Annotated[str, Field(min_length=8, max_length=512, pattern=r"^[\x21-\x7e]+$", repr=False)]


def put(database: Database, settings: Settings, caller: Caller, name: str, body: bytes) -> SecretOut:
    """Keep the caller's secret, encrypted.

    Raises:
        NotFound: there is no secret of that name.
        InvalidRequest: no such value can be one.
    """
    _check_name(name)
    value = read_body(SecretIn, body).value
    sealed = Vault(settings).seal(caller.name, name, value)
    with database.write() as session:
        return SecretOut.of(secrets.put_secret(session, caller.name, name, sealed))


def list_all(database: Database, caller: Caller) -> ListOut[SecretOut]:
    """The names of the caller's own secrets; an admin sees no others' either."""
    with database.read() as session:
        rows = secrets.list_secrets(session, caller.name)
    return ListOut(data=[SecretOut.of(row) for row in rows])


def delete(database: Database, caller: Caller, name: str) -> None:
    """
    Raises:
        NotFound: the caller has none of that name.
    """
    _check_name(name)
    with database.write() as session:
        secrets.delete_secret(session, caller.name, name)


def _check_name(name: str) -> None:
    if name not in VARIABLES:
        raise NotFound(
            f"There is no such secret. There are: {', '.join(VARIABLES)}.",
            param="secret",
            code="secret_not_found",
        )
