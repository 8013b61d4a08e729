"""Models."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import CallerDep, SettingsDep
from api.schemas import ListOut, ModelOut
from api.services import system

router = APIRouter(tags=["models"])


@router.get("/models")
def list_models(settings: SettingsDep, _caller: CallerDep) -> ListOut[ModelOut]:
    """The models on this machine. A job may also name a model of the Hugging Face hub."""
    return system.models(settings)
