"""Exports of a job that has succeeded."""

from __future__ import annotations

from fastapi import APIRouter, Response

from api.dependencies import CallerDep, DatabaseDep, DoorbellDep, JobId, SettingsDep
from api.schemas import ExportIn, ExportOut, ListOut
from api.services import exports

router = APIRouter(prefix="/jobs/{job_id}/exports", tags=["exports"])


@router.post("", status_code=201)
def create_export(
    database: DatabaseDep,
    doorbell: DoorbellDep,
    settings: SettingsDep,
    caller: CallerDep,
    job_id: JobId,
    wanted: ExportIn,
    response: Response,
) -> ExportOut:
    """Make another file of the job, from its adapter or a checkpoint; 200 if it is under way or there."""
    export, new = exports.create(database, doorbell, settings, caller, job_id, wanted)
    if not new:
        response.status_code = 200
    return export


@router.get("")
def list_exports(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> ListOut[ExportOut]:
    """The exports that were asked for after the job had succeeded, oldest first."""
    return exports.list_all(database, caller, job_id)
