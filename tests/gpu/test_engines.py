"""The engines against each other: losses, gradients, and documents that don't see each other.

Models: the default one's stand-in of random weights (4.5 B parameters), and SmolLM2 where
TUNEYARD_TEST_SMOLLM2 names the folder that the bundled model was converted to.

Tolerances. All engines start from the same adapters and see the same rows without dropout. In bfloat16 a
product keeps 8 bits, and each engine rounds at other places: losses agree to 1%. nf4 and float8 replace the
weights themselves by others that lie some per cent away, which moves the loss from the first step on: they
get bounds of their own, against the reference with the same quantisation where there is one.

How far a gradient in bfloat16 is from that in float32 is the model's own: each layer rounds what the ones
before it have rounded, which random weights of 32 layers bring to 8%. So an engine may be no further off
than the reference is in bfloat16, and a little. Rounding has no direction: what is lost or counted twice
shows along the float32 gradient, where each engine must be as long as it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.standins import make_model, write_rows

pytestmark = pytest.mark.train

STEPS = 50
ROOT = Path(__file__).parents[2]
# An engine's gradients may be so much further from float32's than the reference's in bfloat16.
NO_FURTHER = 1.1
# And that one by so much at most.
REFERENCE_OFF = 0.12
# Name: what runs, whom it is compared with, relative bounds of the loss at every step, of the gradients'
# length along float32's, and of their distance from it where that isn't the reference's own.
RUNS: dict[str, dict[str, Any]] = {
    "reference": {"order": {"engine": "reference"}},
    "fp32": {"order": {"engine": "reference", "precision": "fp32", "steps": 1, "checkpointing": "all"}},
    "reference-4bit": {"order": {"engine": "reference", "quantization": "4bit"}},
    "compiled": {"order": {"engine": "compiled"}, "with": "reference", "loss": 0.01, "along": 0.02},
    "compiled-some": {
        "order": {"engine": "compiled", "checkpointing": "some"},
        "with": "reference",
        "loss": 0.01,
        "along": 0.02,
    },
    "fp8": {
        "order": {"engine": "compiled", "precision": "fp8"},
        "with": "reference",
        "loss": 0.03,
        "along": 0.05,
        "gradient": 0.25,
    },
    "unsloth": {
        "order": {"engine": "unsloth", "checkpointing": "all"},
        "with": "reference",
        "loss": 0.01,
        "along": 0.02,
    },
    "unsloth-4bit": {
        "order": {"engine": "unsloth", "quantization": "4bit", "checkpointing": "all"},
        "with": "reference-4bit",
        "loss": 0.01,
    },
}
COMPARED = [name for name, run in RUNS.items() if "with" in run]


@pytest.fixture(scope="module", params=["4b", "smollm2"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs all engines on the model, once for all tests, and gives what one printed."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "smollm2":
        if "TUNEYARD_TEST_SMOLLM2" not in os.environ:
            pytest.skip("TUNEYARD_TEST_SMOLLM2 names no folder")
        model = Path(os.environ["TUNEYARD_TEST_SMOLLM2"])
    else:
        model = make_model("4b", Path(os.environ.get("TUNEYARD_TEST_MODELS", folder)))
        torch.cuda.empty_cache()
    rows = write_rows(folder / "rows.jsonl", 400)

    def run(name: str) -> dict[str, Any]:
        order = {"name": name, "model": str(model), "rows": str(rows), "folder": str(folder), "steps": STEPS}
        return engine_run(order | RUNS[name]["order"]) | {"gradients": folder / f"{name}.safetensors"}

    # A large card holds several at once, which a tester in a hurry may say.
    pool = ThreadPoolExecutor(int(os.environ.get("TUNEYARD_TEST_AT_ONCE", "1")))
    running = {name: pool.submit(run, name) for name in RUNS}
    yield lambda name: running[name].result()
    pool.shutdown(cancel_futures=True)


def engine_run(order: dict[str, Any]) -> dict[str, Any]:
    """What an engine says that runs in a process of its own."""
    command = [sys.executable, "-m", "tests.gpu.engine_run", json.dumps(order)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=400)
    assert said.returncode == 0, said.stderr[-3000:]
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", COMPARED)
def test_losses_agree_at_every_step(runs: Any, name: str) -> None:
    losses, expected = runs(name)["losses"], runs(RUNS[name]["with"])["losses"]
    assert len(losses) == len(expected) == STEPS
    off = [abs(one - other) / other for one, other in zip(losses, expected, strict=True)]
    print(f"{name}: losses off by at most {max(off):.4%}, on average {sum(off) / len(off):.4%}")
    assert max(off) < RUNS[name]["loss"]
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", [name for name in COMPARED if "along" in RUNS[name]])
def test_gradients_agree_with_the_reference_in_float32(runs: Any, name: str) -> None:
    exact = load_file(runs("fp32")["gradients"])
    reference = distance(load_file(runs("reference")["gradients"]), exact)
    found = distance(load_file(runs(name)["gradients"]), exact)
    print(f"{name}: gradients off by {found}, the reference in bfloat16 by {reference}")
    assert reference.whole < REFERENCE_OFF
    allowed = RUNS[name].get("gradient", NO_FURTHER * reference.whole)
    assert found.whole < allowed
    assert abs(found.along - 1) < RUNS[name]["along"]
    # A matrix whose gradient is next to nothing is mostly rounding.
    assert found.worst < 3 * allowed


@dataclass(frozen=True)
class Distance:
    """How far all matrices together and the worst one are off, and the length along what is expected."""

    whole: float
    worst: float
    along: float


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Distance:
    assert found.keys() == expected.keys()
    assert len(found) > 100
    apart = {name: float((found[name] - expected[name]).norm()) for name in expected}
    norms = {name: float(expected[name].norm()) for name in expected}
    squared = math.fsum(norm**2 for norm in norms.values())
    products = math.fsum(float((found[name] * expected[name]).sum()) for name in expected)
    return Distance(
        whole=math.sqrt(math.fsum(off**2 for off in apart.values()) / squared),
        worst=max(apart[name] / norms[name] for name in expected),
        along=products / squared,
    )


@pytest.mark.parametrize("name", [name for name in RUNS if name != "fp32"])
def test_packed_documents_do_not_see_each_other(runs: Any, name: str) -> None:
    moved = runs(name)["moved"]
    print(f"{name}: a document's states move by {moved['packed']:.5f} packed, {moved['joined']:.4f} joined")
    # In bfloat16 sums of another order round differently, and no more than that.
    assert moved["packed"] < 0.02
    # The same measurement tells when documents do see each other.
    assert moved["joined"] > 5 * moved["packed"]


def test_each_engine_ran_as_itself(runs: Any) -> None:
    compiled, unsloth = runs("compiled")["used"], runs("unsloth-4bit")["used"]
    assert (compiled["attention"], compiled["graph_breaks"]) == ("packed_varlen", 0)
    assert compiled["recompiled"] == runs("fp8")["used"]["recompiled"] == 0
    assert compiled["packing"] is unsloth["packing"] is unsloth["variable_length"] is True
    assert unsloth["fused_layers"] == unsloth["layers"]
    assert unsloth["gradient_checkpointing"] == "all"
    assert runs("fp8")["used"]["matrices"] == "float8_e4m3fn"
