"""Secrets that an owner's jobs need. They go in, and never come out again."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path

from api.dependencies import BodyDep, CallerDep, DatabaseDep, SettingsDep
from api.schemas import ListOut, SecretOut
from api.services import secrets
from api.services.secrets import SecretIn

router = APIRouter(prefix="/secrets", tags=["secrets"])

# Parsed by itself, so that no error can quote it.
VALUE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SecretIn.model_json_schema()}},
    }
}
Name = Annotated[str, Path(description="`hub_token` or `wandb_api_key`.")]


@router.put("/{secret}", openapi_extra=VALUE)
def put_secret(
    database: DatabaseDep, settings: SettingsDep, caller: CallerDep, secret: Name, body: BodyDep
) -> SecretOut:
    """Set a secret of yours for your jobs that start from now on."""
    return secrets.put(database, settings, caller, secret, body)


@router.get("")
def list_secrets(database: DatabaseDep, caller: CallerDep) -> ListOut[SecretOut]:
    """Which secrets you have set. Their values can't be read."""
    return secrets.list_all(database, caller)


@router.delete("/{secret}", status_code=204)
def delete_secret(database: DatabaseDep, caller: CallerDep, secret: Name) -> None:
    """Forget a secret. Jobs that run keep it to their end."""
    secrets.delete(database, caller, secret)
