"""Files that come in parts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from api.dependencies import CallerDep, ContextDep, UploadId
from api.schemas_v1 import UploadPartV1, UploadV1
from api.services.v1 import uploads
from api.services.v1.uploads import CompleteUpload, CreateUpload

router = APIRouter(prefix="/v1/uploads", tags=["OpenAI: uploads"])

# The body is streamed to disk, so no parameter declares it.
PART: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("")
def create_upload(context: ContextDep, caller: CallerDep, wanted: CreateUpload) -> UploadV1:
    """Begin a file that comes in parts. It stays open for an hour."""
    return uploads.create(context, caller, wanted)


@router.post("/{upload_id}/parts", openapi_extra=PART)
async def add_upload_part(
    context: ContextDep, caller: CallerDep, upload_id: UploadId, request: Request
) -> UploadPartV1:
    """Upload a part of at most 64 MiB. Several may come at the same time."""
    return await uploads.add_part(context, caller, upload_id, request.stream(), request.headers)


@router.post("/{upload_id}/complete")
async def complete_upload(
    context: ContextDep, caller: CallerDep, upload_id: UploadId, wanted: CompleteUpload
) -> UploadV1:
    """Make a file of the parts, in the order that is given."""
    return await uploads.complete(context, caller, upload_id, wanted)


@router.post("/{upload_id}/cancel")
def cancel_upload(context: ContextDep, caller: CallerDep, upload_id: UploadId) -> UploadV1:
    """Call an upload off: its parts are deleted."""
    return uploads.cancel(context, caller, upload_id)
