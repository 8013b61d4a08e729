"""A process in waiting on a GPU: it has imported everything and holds nothing of the GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# A context alone takes some hundreds of MiB.
NOTHING_MIB = 64
CODE = """
import sys
from worker.training.stack import import_stack
import_stack(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("engine", ["reference", "compiled", "unsloth"])
def test_a_process_in_waiting_holds_no_memory_of_the_gpu(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "unsloth" and not importlib.util.find_spec("unsloth"):
        pytest.skip("needs Unsloth")
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    before = used_mib()
    with subprocess.Popen(
        [sys.executable, "-c", CODE, engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("ready") for line in process.stdout)
        assert used_mib() - before < NOTHING_MIB
        process.communicate("go on\n")
    assert process.returncode == 0
