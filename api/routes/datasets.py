"""Datasets."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from api.dependencies import CallerDep, ContextDep, DatabaseDep, DatasetId, DatasetPage, StoreDep
from api.schemas import DatasetOut, ListOut
from api.services import datasets

router = APIRouter(prefix="/datasets", tags=["datasets"])

# The body is streamed to disk, so no parameter declares it.
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSONL, JSON or CSV."},
                        "format": {"type": "string", "enum": list(datasets.FORMATS), "default": "auto"},
                        "name": {"type": "string", "description": "Shown instead of the file's name."},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=UPLOAD)
async def upload_dataset(context: ContextDep, caller: CallerDep, request: Request) -> DatasetOut:
    """Upload a data file. A file that can't be used is stored too: its `error` says why.

    Small files are looked into at once; larger ones, and packed ones that take more than a few seconds, are
    `uploaded` until that has been done.
    """
    return await datasets.create(context, caller, request.stream(), request.headers)


@router.get("")
def list_datasets(database: DatabaseDep, caller: CallerDep, page: DatasetPage) -> ListOut[DatasetOut]:
    """Your datasets, newest first."""
    return datasets.list_page(database, caller, page)


@router.get("/{dataset_id}")
def get_dataset(database: DatabaseDep, caller: CallerDep, dataset_id: DatasetId) -> DatasetOut:
    """A dataset, with what was found in it."""
    return datasets.get(database, caller, dataset_id)


@router.delete("/{dataset_id}", status_code=204)
def delete_dataset(database: DatabaseDep, store: StoreDep, caller: CallerDep, dataset_id: DatasetId) -> None:
    """Delete a dataset, unless a job that has not ended uses it."""
    datasets.delete(database, store, caller, dataset_id)
