"""Jobs of a run that are trained for real: a random model of two layers, on rows that are uploaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# In a process of its own: the run itself is not to hold torch.
_MAKE = (
    "import sys, pathlib, tests.worker.training.conftest as c; c.make_tiny_model(pathlib.Path(sys.argv[1]))"
)
ROWS = 24


def make_models(root: Path) -> Path:
    """A folder of local models with `local/tiny` in it."""
    root.mkdir()
    subprocess.run([sys.executable, "-c", _MAKE, str(root / "tiny")], check=True)
    return root


def rows() -> bytes:
    """A small data set in the messages format."""
    turns = [
        [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]
        for n in range(ROWS)
    ]
    return "".join(json.dumps({"messages": turn}) + "\n" for turn in turns).encode()


def spec(file_id: str) -> dict[str, Any]:
    """All alike, so that all that succeed have the same losses, however often they were interrupted."""
    training = {
        "max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 4,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    dataset = {"source": "file", "file_id": file_id}
    return {"name": "real", "model": "local/tiny", "dataset": dataset, "training": training}
