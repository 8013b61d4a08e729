"""Artifacts of jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from api.dependencies import CallerDep, DatabaseDep, JobId, StoreDep
from api.schemas import ArtifactOut, ListOut
from api.services import artifacts
from api.services.artifacts import Download
from api.streams import FileStream

router = APIRouter(prefix="/jobs/{job_id}/artifacts", tags=["artifacts"])

Name = Annotated[str, Path(description="`adapter.tar`, `model-q4_k_m.gguf`, …")]
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file."},
    206: {"content": {"application/octet-stream": {}}, "description": "The part that Range asked for."},
    304: {"description": "If-None-Match has the file's ETag."},
}


@router.get("")
def list_artifacts(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> ListOut[ArtifactOut]:
    """The job's complete files. Each has its SHA-256, which is also its ETag."""
    return artifacts.list_all(database, caller, job_id)


@router.get("/{name}", response_class=Response, responses=CONTENT)
def download_artifact(
    database: DatabaseDep, store: StoreDep, caller: CallerDep, job_id: JobId, name: Name, request: Request
) -> Response:
    """Download a file. Range goes on with a download that broke off."""
    found = artifacts.download(database, store, caller, job_id, name, request.headers, with_content=True)
    return respond(found)


@router.head("/{name}", response_class=Response, include_in_schema=False)
def head_artifact(
    database: DatabaseDep, store: StoreDep, caller: CallerDep, job_id: JobId, name: Name, request: Request
) -> Response:
    """Size and hash of a file."""
    found = artifacts.download(database, store, caller, job_id, name, request.headers, with_content=False)
    return respond(found)


def respond(found: Download) -> Response:
    """The answer, with the file where there is one to send."""
    if found.content is None:
        return Response(status_code=found.status, headers=found.headers)
    return FileStream(found.content, found.status, found.headers)
