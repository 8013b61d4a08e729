"""Which models are loaded, when they go, and who has to wait: with real processes of a real model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.inference import Done, Event, Generation, Started, Text
from shared.settings import Settings
from shared.storage import Store
from tests.api.conftest import eventually
from tests.samples import bundled_gguf
from worker.inference.models import Models, Refusal
from worker.inference.placement import Placement

pytestmark = pytest.mark.anyio
MIB = 1 << 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Gpu(Placement):
    """A machine with this GPU, or none, and jobs when the test says so."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.wanted = False

    def find_gpu(self, need: int) -> int | None:
        return None if self.wanted else self.index

    def is_wanted(self) -> bool:
        return self.wanted


@asynccontextmanager
async def loading(
    tmp_path: Path, *names: str, gpu: Gpu | None = None, **settings: Any
) -> AsyncIterator[Models]:
    """Models over a store that has the bundled model under these names."""
    (tmp_path / "data" / "artifacts").mkdir(parents=True)
    for name in names:
        (tmp_path / "data" / "artifacts" / name).symlink_to(bundled_gguf())
    given = Settings(data_dir=tmp_path / "data", inference_context_bytes=64 * MIB, **settings)
    models = Models(given, Store(given.artifacts()), gpu or Gpu(None))
    try:
        yield models
    finally:
        await models.close()


def asking(name: str, **more: Any) -> Generation:
    messages = [{"role": "user", "content": "Write a long story about a dog and a cat."}]
    size = bundled_gguf().stat().st_size
    asked = Generation(name, size, "ann", messages=messages, temperature=0, max_tokens=2)
    return replace(asked, **more)


async def ask(models: Models, name: str, **more: Any) -> list[Event]:
    events: list[Event] = []

    async def tell(event: Event) -> None:
        events.append(event)

    await models.answer(asking(name, **more), tell)
    return events


async def begin(models: Models, name: str, **more: Any) -> asyncio.Task[list[Event]]:
    """A long answer that is under way: 2,775 tokens, always the same ones."""
    started = asyncio.Event()

    async def tell(event: Event) -> None:
        if isinstance(event, Text):
            started.set()

    asked = asking(name, max_tokens=None, **more)
    task: asyncio.Task[Any] = asyncio.create_task(models.answer(asked, tell))
    async with asyncio.timeout(30):
        await started.wait()
    return task


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "worker.inference.child" in child.cmdline()]


async def test_the_model_unused_for_longest_makes_room(tmp_path: Path) -> None:
    async with loading(tmp_path, "a", "b", "c", inference_models=2) as models:
        for name, again in (("a", False), ("b", False), ("a", True)):
            started, *_, done = await ask(models, name)
            assert isinstance(started, Started)
            assert done == Done("length", 2, cached=again * (started.prompt_tokens - 1))
        assert models.loaded() == ["b", "a"]
        await ask(models, "c")
        assert models.loaded() == ["a", "c"]
        assert len(processes()) == 2
    assert processes() == []


async def test_memory_bounds_models_too(tmp_path: Path) -> None:
    one = bundled_gguf().stat().st_size + (64 + 256) * MIB
    async with loading(tmp_path, "a", "b", inference_memory_bytes=one + MIB) as models:
        await ask(models, "a")
        await ask(models, "b")
        assert models.loaded() == ["b"]
        with pytest.raises(Refusal, match="export a smaller GGUF"):
            await ask(models, "a", size=one + 2 * MIB)


async def test_a_model_that_answers_is_not_unloaded_and_waiting_ends(tmp_path: Path) -> None:
    async with loading(tmp_path, "a", "b", inference_models=1, inference_idle_seconds=0.01) as models:
        under_way = await begin(models, "a")
        await models.sweep()
        with pytest.raises(Refusal, match="Other requests had the model"):
            await ask(models, "b", seconds=0.2)
        assert models.loaded() == ["a"]
        waiting = asyncio.create_task(ask(models, "b"))
        under_way.cancel()
        assert (await waiting)[-1] == Done("length", 2)
        assert models.loaded() == ["b"]


async def test_an_idle_model_goes_and_comes_back_when_asked(tmp_path: Path) -> None:
    async with loading(tmp_path, "a", inference_idle_seconds=0.05) as models:
        first = await ask(models, "a")

        async def is_empty() -> bool:
            await models.sweep()
            return not models.loaded()

        await eventually(is_empty)
        assert processes() == []
        assert await ask(models, "a") == first


async def test_requests_are_bounded_by_owner_and_in_all(tmp_path: Path) -> None:
    async with loading(tmp_path, "a", inference_requests=2, inference_owner_requests=1) as models:
        under_way = await begin(models, "a")
        with pytest.raises(Refusal, match="You have 1 requests") as caught:
            await ask(models, "a")
        assert caught.value.failed.kind == "busy"
        waiting = asyncio.create_task(ask(models, "a", owner="bob"))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="as many requests as it may"):
            await ask(models, "a", owner="cy")
        under_way.cancel()
        started, *_, done = await waiting
        assert isinstance(started, Started)
        assert done == Done("length", 2, cached=started.prompt_tokens - 1)
        await ask(models, "a")


async def test_an_answer_is_cut_off_at_its_time(tmp_path: Path) -> None:
    async with loading(tmp_path, "a") as models:
        await ask(models, "a")
        done = (await ask(models, "a", seconds=0.5, max_tokens=None, temperature=2))[-1]
        assert isinstance(done, Done)
        assert done.reason == "length"


async def test_a_process_that_dies_is_replaced(tmp_path: Path) -> None:
    async with loading(tmp_path, "a") as models:
        under_way = await begin(models, "a")
        processes()[0].kill()
        with pytest.raises(Refusal, match="process died"):
            await under_way
        assert (await ask(models, "a"))[-1] == Done("length", 2)


async def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.inference.models.CANCEL_SECONDS", 0.1)
    async with loading(tmp_path, "a") as models:
        under_way = await begin(models, "a")
        (hung,) = processes()
        hung.suspend()
        under_way.cancel()
        with pytest.raises(asyncio.CancelledError):
            await under_way
        assert not hung.is_running()
        assert (await ask(models, "a"))[-1] == Done("length", 2)


async def test_an_answer_that_is_given_up_twice_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """A client that goes fails what is told to it, and is seen to be gone."""
    async with loading(tmp_path, "a") as models:
        under_way = await begin(models, "a")
        (process,) = processes()
        process.suspend()
        for _ in range(2):
            under_way.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
        assert not under_way.done()
        process.resume()
        with pytest.raises(asyncio.CancelledError):
            await under_way
        started, *_, done = await ask(models, "a")
        assert isinstance(started, Started)
        assert isinstance(done, Done)
        assert (done.reason, done.tokens) == ("length", 2)
        assert processes() == [process]


@pytest.mark.parametrize("content", [b"", b"GGUF" + b"\xff" * 100, None])
async def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    async with loading(tmp_path) as models:
        if content is not None:
            (tmp_path / "data" / "artifacts" / "x").write_bytes(content)
        with pytest.raises(Refusal) as caught:
            await ask(models, "x")
        assert caught.value.failed.kind == "unusable"


async def test_a_model_on_a_gpu_makes_way_for_a_job(tmp_path: Path) -> None:
    gpu = Gpu(3)
    async with loading(tmp_path, "a", gpu=gpu) as models:
        under_way = await begin(models, "a")
        (process,) = processes()
        assert process.environ()["CUDA_VISIBLE_DEVICES"] == "3"
        assert process.environ()["GGML_VK_VISIBLE_DEVICES"] == "3"
        assert int(process.cmdline()[-1]) > 1000
        await models.sweep()
        assert process.is_running()
        gpu.wanted = True
        await models.sweep()
        with pytest.raises(Refusal, match="process died"):
            await under_way
        assert (await ask(models, "a"))[-1] == Done("length", 2)
        (process,) = processes()
        assert process.environ()["CUDA_VISIBLE_DEVICES"] == ""
        assert process.environ()["GGML_VK_VISIBLE_DEVICES"] == ""
        assert process.cmdline()[-1] == "0"
