"""Answers from a GPU: with a build of cyllama that knows CUDA or Vulkan, as docs/operations.md has it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cyllama.llama.llama_cpp import ggml_backend_load_all, llama_supports_gpu_offload

from shared.database import Database
from shared.inference import Done, Text
from shared.settings import Settings
from shared.storage import Store
from tests.samples import bundled_gguf, make_job
from tests.worker.inference.test_models import ask, processes
from worker.inference.models import Models
from worker.inference.placement import Placement

ggml_backend_load_all()
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not llama_supports_gpu_offload(), reason="needs a GPU and a cyllama that knows it"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# The first five tokens of the answer are far ahead of the others: a GPU and a CPU, which multiply the 4-bit
# weights by states that they round differently, must not part there.
QUESTION = [{"role": "user", "content": "Write a Python function that adds two numbers."}]


def gpu_bytes() -> int:
    """Memory of all GPUs that is in use."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split()) << 20


async def test_a_gpu_answers_as_the_cpu_does_until_a_job_wants_it(
    tmp_path: Path, settings: Settings, database: Database
) -> None:
    (settings.root / "artifacts").mkdir(exist_ok=True)
    (settings.root / "artifacts" / "a").symlink_to(bundled_gguf())
    idle = settings.model_copy(update={"inference_gpu": "idle"})
    models = Models(idle, Store(idle.artifacts()), Placement(idle, database))
    before = gpu_bytes()
    try:
        first = await ask(models, "a", messages=QUESTION, max_tokens=12)
        (process,) = processes()
        assert process.environ()["CUDA_VISIBLE_DEVICES"] != ""
        assert gpu_bytes() - before > bundled_gguf().stat().st_size, "the model isn't on the GPU"
        make_job(database)
        await models.sweep()
        assert processes() == []
        second = await ask(models, "a", messages=QUESTION, max_tokens=12)
        (process,) = processes()
        assert process.environ()["CUDA_VISIBLE_DEVICES"] == ""
        assert isinstance(first[-1], Done)
        one, other = ([e.text for e in events if isinstance(e, Text)] for events in (first, second))
        assert one[:5] == other[:5]
        assert len(one[:5]) == 5
    finally:
        await models.close()
