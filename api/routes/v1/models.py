"""Models, as OpenAI's clients list, look up and delete them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from api.dependencies import CallerDep, ContextDep
from api.schemas_v1 import ListV1, ModelDeletedV1, ModelV1
from api.services.v1 import models

router = APIRouter(prefix="/v1/models", tags=["OpenAI: models"])

Name = Annotated[str, Path(description="A base model's id, or `ft:…`; slashes may be written as %2F.")]


@router.get("")
def list_v1_models(context: ContextDep, caller: CallerDep) -> ListV1[ModelV1]:
    """The base models of this server, then your fine-tuned ones."""
    return models.list_all(context, caller)


@router.get("/{model:path}")
def get_v1_model(context: ContextDep, caller: CallerDep, model: Name) -> ModelV1:
    """A model."""
    return models.get(context, caller, model)


@router.delete("/{model:path}")
def delete_v1_model(context: ContextDep, caller: CallerDep, model: Name) -> ModelDeletedV1:
    """Delete what a job has made. The job and its records stay."""
    return models.delete(context, caller, model)
