"""Estimates, and jobs that no worker on line can run, over HTTP."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.clock import utcnow
from shared.device import Device
from shared.plan import EngineName
from shared.repository import jobs, keys
from shared.shape import NEMOTRON_NANO_4B, SMOLLM2_135M
from shared.spec import DEFAULT_MODEL
from shared.tables import WorkerRow
from tests.api.conftest import SPEC, Api, error_of

pytestmark = pytest.mark.anyio
ALL: tuple[EngineName, ...] = ("reference", "compiled", "unsloth")
CPU = Device("cpu", 0, "CPU (x86_64, 2 cores)", 24 << 30)
H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", 80 << 30, ALL, 9.0)


def put_on_line(api: Api, worker: str, *devices: Device) -> None:
    row = WorkerRow(
        id=worker, hostname="box", slots=[d.to_json() for d in devices], started_at=utcnow(), seen_at=utcnow()
    )
    with api.database.write() as session:
        keys.put_worker(session, row)


def use_models(api: Api, root: Path) -> None:
    rooted = api.context.settings.model_copy(update={"models_root": root})
    api.app.state.context = replace(api.context, settings=rooted)


async def test_an_estimate_shows_the_plan_and_why_others_lost(api: Api) -> None:
    put_on_line(api, "cpus", CPU)
    put_on_line(api, "gpus", H100)
    answer = await api.ann.post("/jobs/estimate", json={"training": {"max_steps": 10}})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["plan"]["engine"], told["plan"]["device"]) == ("compiled", "cuda")
    assert told["plan"]["micro_batch"] * told["plan"]["accumulation"] == 8
    assert told["peak_memory_bytes"] == told["plan"]["peak_memory_bytes"] > 10e9
    assert told["seconds"] == pytest.approx(10 * 8 * 4096 / told["plan"]["tokens_per_second"], rel=0.05)
    assert told["disk_bytes"] > 100e6
    assert {other["engine"] for other in told["alternatives"]} == set(ALL)
    for other in told["alternatives"]:
        assert other["reason"]
        assert other["tokens_per_second"] < told["plan"]["tokens_per_second"] * 1.02
        assert other["peak_memory_bytes"] > 0


async def test_without_a_worker_on_line_nothing_is_planned_and_nothing_refused(api: Api) -> None:
    for fields in ({"engine": "compiled"}, {"quantization": "4bit"}, {"precision": "fp8"}):
        assert (await api.ann.post("/jobs", json=fields)).status_code == 201
        told = (await api.ann.post("/jobs/estimate", json=fields)).json()
        assert (told["plan"], told["alternatives"], told["peak_memory_bytes"]) == (None, [], None)


async def test_engine_auto_on_a_cpu_is_the_reference(api: Api) -> None:
    put_on_line(api, "cpus", CPU)
    told = (await api.ann.post("/jobs/estimate", json=SPEC)).json()
    assert (told["plan"]["engine"], told["plan"]["precision"]) == ("reference", "fp32")
    assert (await api.ann.post("/jobs", json=SPEC)).status_code == 201


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"engine": "compiled"}, "engine"),
        ({"engine": "unsloth"}, "engine"),
        ({"quantization": "4bit"}, "quantization"),
        ({"precision": "fp8"}, "precision"),
        ({"precision": "bf16"}, "precision"),
    ],
)
async def test_a_job_that_needs_a_gpu_is_refused_where_there_is_none(
    api: Api, fields: dict[str, Any], param: str
) -> None:
    put_on_line(api, "cpus", CPU)
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, json=SPEC | fields), 422)
        assert (error["code"], error["param"]) == ("needs_gpu", param)
        assert "needs a GPU" in error["message"]
    assert (await api.ann.get("/jobs")).json()["data"] == []
    put_on_line(api, "gpus", H100)
    assert (await api.ann.post("/jobs", json=SPEC | fields)).status_code == 201


async def test_a_job_that_fits_no_gpu_is_refused_with_what_would(api: Api) -> None:
    put_on_line(api, "gpus", replace(H100, name="NVIDIA GeForce RTX 3060", memory_bytes=8 << 30))
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, json={"quantization": "none"}), 422)
        assert (error["code"], error["param"]) == ("does_not_fit", "quantization")
        assert "quantization 4bit" in error["message"]
        assert "RTX 3060, has 8.0 GiB" in error["message"]
    bare = replace(H100, engines=("reference",))
    put_on_line(api, "gpus", bare)
    error = error_of(await api.ann.post("/jobs", json={"engine": "unsloth"}), 422)
    assert (error["code"], error["param"]) == ("not_available_here", "engine")


async def test_more_gpus_than_any_one_worker_has_are_refused(api: Api) -> None:
    fields = {"gpus": 2}
    assert (await api.ann.post("/jobs", json=fields)).status_code == 201
    for worker in ("one", "another"):
        put_on_line(api, worker, H100)
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, json=fields), 422)
        assert (error["code"], error["param"]) == ("not_available_here", "gpus")
        assert "the most that one has is 1" in error["message"]
    put_on_line(api, "two", H100, replace(H100, index=1))
    assert (await api.ann.post("/jobs", json=fields)).json()["spec"]["gpus"] == 2
    assert (await api.ann.post("/jobs/estimate", json=fields)).json()["plan"]["gpus"] == 2


@pytest.mark.parametrize("config", ["[]", '"text"', "[" * 50_000])
async def test_a_local_model_that_is_none_is_refused_and_not_listed(
    api: Api, tmp_path: Path, config: str
) -> None:
    folder = tmp_path / "models" / "odd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    use_models(api, folder.parent)
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, json=SPEC | {"model": "local/odd"}), 422)
        assert (error["code"], error["param"]) == ("model_unreadable", "model")
    listed = await api.ann.get("/models")
    assert listed.status_code == 200
    assert "local/odd" not in listed.text


async def test_a_local_model_of_unknown_kind_has_to_fit_with_its_weights(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "moe"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    tensor = {"dtype": "BF16", "shape": [1_000_000, 24_000], "data_offsets": [0, 48_000_000_000]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(48_000_000_000)  # sparse
    use_models(api, folder.parent)
    put_on_line(api, "gpus", replace(H100, name="NVIDIA L4", memory_bytes=12 << 30, capability=8.9))
    fields = SPEC | {"model": "local/moe", "lora": {"target_modules": ["up_proj"]}}
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, json=fields), 422)
        assert (error["code"], error["param"]) == ("does_not_fit", "model")
        assert "its weights alone take 11.5 GiB" in error["message"]
    put_on_line(api, "more", H100)
    assert (await api.ann.post("/jobs", json=fields)).status_code == 201


async def test_the_models_shape_is_kept_with_the_job(api: Api) -> None:
    for model, shape in ((SPEC["model"], SMOLLM2_135M), (DEFAULT_MODEL, NEMOTRON_NANO_4B)):
        job_id = await api.create(model=model)
        with api.database.read() as session:
            job = jobs.get_job(session, job_id, None)
            assert job.model_shape == shape.to_json()
    # The hub can't be asked here: the job is accepted all the same.
    job_id = await api.create(model="somebody/else")
    with api.database.read() as session:
        assert jobs.get_job(session, job_id, None).model_shape is None
