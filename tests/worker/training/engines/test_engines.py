"""What every engine owes the loop: what it imports first, and words for what fell back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.device import Device
from shared.errors import JobFailure
from shared.lifecycle import FailureCode
from shared.plan import EngineName
from shared.planner import make_plan
from shared.spec import JobSpec
from worker.training.engines import compiled, reference, unsloth
from worker.training.models import ResolvedModel

pytestmark = pytest.mark.train

RUN = """
import json, sys
from pathlib import Path
from shared.events import GoOn, MemorySink
from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.pipeline import run
from worker.training.workdir import Workdir

plan = Plan(
    engine="unsloth", device="cpu", quantization="none", precision="bf16", micro_batch=1, accumulation=8,
    gradient_checkpointing="all", reason="a test",
)
run(JobSpec(), plan, Workdir(root=Path(sys.argv[1]), cache=Path(sys.argv[1])), MemorySink(), GoOn())
"""


def test_unsloth_is_imported_before_all_that_it_changes(tmp_path: Path) -> None:
    package = tmp_path / "unsloth"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\n"
        "loaded = [m for m in ('transformers', 'trl', 'peft', 'datasets') if m in sys.modules]\n"
        "print('too late' if loaded else 'in time', loaded)\n"
        "sys.exit()\n"
    )
    root = Path(__file__).parents[4]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    said = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        capture_output=True, text=True, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert said.stdout == "in time []\n", said.stderr


def test_what_fell_back_is_said() -> None:
    whole = {
        "packing": True,
        "own_attention": True,
        "attention": "sdpa",
        "variable_length": True,
        "layers": 32,
        "fused_layers": 32,
    }
    assert unsloth.shortfalls(whole) == []
    assert "half the speed" in unsloth.shortfalls(whole | {"variable_length": False})[0]
    assert unsloth.shortfalls(whole | {"variable_length": False, "packing": False}) == []
    assert "30 of 32 layers" in unsloth.shortfalls(whole | {"fused_layers": 30})[0]
    foreign = whole | {"own_attention": False, "variable_length": False}
    assert unsloth.shortfalls(foreign)[0].startswith(
        "Unsloth left attention to transformers (sdpa): nobody has"
    )
    assert "no faster" in unsloth.shortfalls(foreign | {"packing": False})[0]
    assert compiled.shortfalls({"graph_breaks": 0, "recompiled": 0}) == []
    assert "3 places" in compiled.shortfalls({"graph_breaks": 3, "recompiled": 0})[0]
    assert "2 graphs" in compiled.shortfalls({"graph_breaks": 0, "recompiled": 2})[0]
    assert reference.shortfalls({}) == []


@pytest.mark.parametrize(
    ("engine", "module", "said"),
    [
        ("compiled", compiled, "does not know models of the type gemma2"),
        ("unsloth", unsloth, "keep packed documents apart in models of the type gemma2"),
    ],
)
def test_an_engine_takes_no_model_of_a_type_that_it_does_not_know(
    engine: EngineName, module: ModuleType, said: str, tmp_path: Path
) -> None:
    spec = JobSpec(engine=engine)
    plan = make_plan(spec, None, [Device("cuda", 0, "GPU", 0, (engine,), 9.0)])
    assert plan is not None
    model = ResolvedModel("a/gemma", tmp_path, config={"model_type": "gemma2"})
    # Before a weight is read: neither the files nor Unsloth are there.
    with pytest.raises(JobFailure, match=said) as failed:
        module.load_model(spec, plan, model)
    assert failed.value.code == FailureCode.MODEL_UNAVAILABLE
    assert failed.value.advice == "Leave engine and precision on auto."


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attention_dropout": 0.1}, "(attention_dropout)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "stored quantised"),
    ],
)
def test_the_compiled_engine_takes_no_model_that_asks_for_what_it_does_not_do(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    spec = JobSpec(engine="compiled")
    plan = make_plan(spec, None, [Device("cuda", 0, "GPU", 0, ("compiled",), 9.0)])
    assert plan is not None
    model = ResolvedModel("a/b", tmp_path, config={"model_type": "llama"} | config)
    with pytest.raises(JobFailure) as failed:
        compiled.load_model(spec, plan, model)
    assert said in failed.value.message
