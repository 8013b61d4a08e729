"""The default job on the cards that the replaced script's guide names: 12, 16 and 24 GB.

Each runs as the planner would have it on a card of that size, in a process that is given no more memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench.standins import CONFIGS, make_model, write_rows
from shared.device import Device
from shared.planner import make_plan
from shared.shape import ModelShape
from shared.spec import JobSpec
from tests.gpu.test_engines import engine_run
from worker.gpus import installed_engines

# Read before the tests' own environment hides it.
MODELS = os.environ.get("TUNEYARD_TEST_MODELS")
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("gib", [12, 16, 24])
def test_the_default_job_runs_in_the_memory_of_a_small_card(gib: int, tmp_path: Path) -> None:
    fields = {
        "dataset": {"source": "file", "file_id": "file-" + "0" * 24, "format": "messages"},
        "training": {"max_steps": 2},
    }
    spec = JobSpec.from_json(fields)
    shape = ModelShape.from_config(CONFIGS["4b"])
    card = Device("cuda", 0, torch.cuda.get_device_name(), gib << 30, installed_engines())
    plan = make_plan(spec, shape, [card])
    assert plan is not None
    model = make_model("4b", Path(MODELS or tmp_path))
    torch.cuda.empty_cache()
    found = engine_run(
        {
            "name": str(gib),
            "engine": plan.engine,
            "plan": plan.model_dump(),
            "spec": fields,
            "cap_gib": gib,
            "model": str(model),
            "rows": str(write_rows(tmp_path / "rows.jsonl", 400)),
            "folder": str(tmp_path),
        }
    )
    peak = found["used"]["peak_memory_bytes"]
    print(f"{gib} GB: {plan.reason} {peak / 2**30:.1f} GiB")
    assert len(found["losses"]) == 2
    assert peak <= gib << 30
    assert plan.micro_batch * plan.accumulation == 8
