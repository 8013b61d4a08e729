"""Files, as OpenAI's clients upload, list and fetch them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from api.dependencies import CallerDep, ContextDep, DatabaseDep, FileId, StoreDep
from api.routes.artifacts import respond
from api.schemas_v1 import FileDeletedV1, FileV1, ListV1
from api.services.v1 import files
from shared.ids import DATASET_ID
from shared.repository.jobs import Page

router = APIRouter(prefix="/v1/files", tags=["OpenAI: files"])

MAX_FILES = 10_000
# The body is streamed to disk, so no parameter declares it.
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": files.LIFETIMES.start,
                            "maximum": files.LIFETIMES.stop - 1,
                        },
                        "format": {"type": "string", "default": "auto", "description": "As POST /datasets."},
                    },
                }
            }
        },
    }
}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file."}
}


async def _page(
    after: Annotated[
        str | None, Query(pattern=f"^{DATASET_ID.pattern}$", description="Last id of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_FILES)] = MAX_FILES,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    return Page(after, limit, oldest_first=order == "asc")


@router.post("", openapi_extra=UPLOAD)
async def upload_file(context: ContextDep, caller: CallerDep, request: Request) -> FileV1:
    """Upload a file. One with the purpose `fine-tune` is a dataset and is looked into."""
    return await files.create(context, caller, request.stream(), request.headers)


@router.get("")
def list_files(
    database: DatabaseDep,
    caller: CallerDep,
    page: Annotated[Page, Depends(_page)],
    purpose: Annotated[str | None, Query(max_length=50)] = None,
) -> ListV1[FileV1]:
    """Your files, of one purpose or all."""
    return files.list_page(database, caller, page, purpose)


@router.get("/{file_id}")
def get_file(database: DatabaseDep, caller: CallerDep, file_id: FileId) -> FileV1:
    """A file."""
    return files.get(database, caller, file_id)


@router.get("/{file_id}/content", response_class=Response, responses=CONTENT)
def get_file_content(database: DatabaseDep, store: StoreDep, caller: CallerDep, file_id: FileId) -> Response:
    """The file itself."""
    return respond(files.content(database, store, caller, file_id))


@router.delete("/{file_id}")
def delete_file(database: DatabaseDep, store: StoreDep, caller: CallerDep, file_id: FileId) -> FileDeletedV1:
    """Delete a file, unless a job that has not ended uses it."""
    return files.delete(database, store, caller, file_id)
