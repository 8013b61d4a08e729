"""The models that are loaded: a process each, bounded in number and memory, gone when nobody asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.inference import CANCEL, Done, Event, Failed, Generation, from_line
from shared.settings import Settings
from shared.storage import Store
from worker.inference.placement import Placement

# A child that does not give up its answer within this time is ended.
CANCEL_SECONDS = 5.0
# A child cuts its answer off by itself; one that does not is ended so much later.
SLACK_SECONDS = 5.0
# Compute buffers, the vocabulary and Python itself.
OVERHEAD_BYTES = 256 << 20
MAX_LINE = 1 << 20
ALL_LAYERS = 1 << 16
KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")

logger = logging.getLogger(__name__)

Tell = Callable[[Event], Awaitable[None]]


class Refusal(Exception):
    """A request that gets no answer; `failed` says why."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class Loaded:
    """A model's process. `users` have it or wait for it, one at a time has `turn`."""

    def __init__(self, key: str, need: int) -> None:
        self.key = key
        self.need = need
        self.users = 0
        self.turn = asyncio.Lock()
        self.idle_since = time.monotonic()
        self.process: asyncio.subprocess.Process | None = None
        self.copy: Path | None = None
        self.gpu: int | None = None

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.returncode is not None

    async def end(self) -> None:
        """End the process, and free what it had."""
        if self.process is not None:
            await _kill(self.process)
        if self.copy is not None:
            self.copy.unlink(missing_ok=True)


class Models:
    """Answers requests with the model that each names."""

    def __init__(self, settings: Settings, store: Store, placement: Placement) -> None:
        self._settings = settings
        self._placement = placement
        self._store = store
        # Copies of what a store has that is no folder of this machine.
        self._folder = settings.root / "cache" / "inference"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, mode=0o700)
        self._loaded: dict[str, Loaded] = {}
        self._changed = asyncio.Condition()
        self._asking: Counter[str] = Counter()

    async def answer(self, asked: Generation, tell: Tell) -> None:
        """Tell what the model says, event by event. Cancelling this gives the answer up.

        Raises:
            Refusal: nothing (more) comes.
        """
        deadline = time.monotonic() + asked.seconds
        with self._counted(asked.owner):
            async with self._held(asked, deadline) as model:
                await self._ask(model, asked, deadline, tell)

    async def sweep(self) -> None:
        """Unload models that nobody has asked for some time, and those on a GPU when a job wants it.

        For a job even one that answers is ended: who asked is told to ask again, and gets it from the CPU.
        """
        on_gpu = [model for model in self._loaded.values() if model.gpu is not None and not model.ended]
        wanted = await asyncio.to_thread(self._placement.is_wanted) if on_gpu else False
        for model in on_gpu if wanted else ():
            await model.end()
        now = time.monotonic()
        async with self._changed:
            for model in list(self._loaded.values()):
                idle = now - model.idle_since > self._settings.inference_idle_seconds
                if model.users == 0 and (model.ended or idle):
                    await self._unload(model)

    async def close(self) -> None:
        """End all processes."""
        for model in list(self._loaded.values()):
            await model.end()
        self._loaded.clear()

    def loaded(self) -> list[str]:
        """Store keys of the models that are loaded, the one unused for longest first."""
        return [m.key for m in sorted(self._loaded.values(), key=lambda m: m.idle_since)]

    @contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        """Within the bounds of requests at once, all together and of one owner.

        Raises:
            Refusal: `busy`.
        """
        mine, most = self._asking[owner], self._settings.inference_owner_requests
        if mine >= most:
            raise Refusal(Failed("busy", f"You have {mine} requests under way, the most there may be."))
        if self._asking.total() >= self._settings.inference_requests:
            raise Refusal(Failed("busy", "This server answers as many requests as it may: try again soon."))
        self._asking[owner] += 1
        try:
            yield
        finally:
            self._asking[owner] -= 1
            self._asking += Counter()  # without the owners that have none

    @asynccontextmanager
    async def _held(self, asked: Generation, deadline: float) -> AsyncIterator[Loaded]:
        """The model, ours alone."""
        model: Loaded | None = None
        taken = False
        try:
            try:
                async with asyncio.timeout_at(_loop_time(deadline)):
                    model = await self._reserve(asked)
                    taken = await model.turn.acquire()
                    if model.process is None or model.ended:
                        await self._start(model)
            except TimeoutError:
                raise Refusal(
                    Failed(
                        "busy", "Other requests had the model for all of this one's time: try again later."
                    )
                ) from None
            yield model
        finally:
            if model is not None:
                await _undisturbed(self._give_back(model, taken))

    async def _give_back(self, model: Loaded, taken: bool) -> None:
        if taken:
            model.turn.release()
        async with self._changed:
            model.users -= 1
            model.idle_since = time.monotonic()
            self._changed.notify_all()

    async def _reserve(self, asked: Generation) -> Loaded:
        """The model, loaded or about to be; others go to make room, the one unused for longest first.

        Raises:
            Refusal: it is larger than the memory that models may take.
        """
        need = asked.size + self._settings.inference_context_bytes + OVERHEAD_BYTES
        most = self._settings.inference_memory_bytes
        if need > most:
            raise Refusal(
                Failed(
                    "unusable",
                    f"This model takes {need >> 20} MiB, and models may take {most >> 20} MiB on this "
                    "server: export a smaller GGUF, such as gguf:q4_k_m, or ask its operator to raise "
                    "TUNEYARD_INFERENCE_MEMORY_BYTES.",
                )
            )
        async with self._changed:
            while True:
                model = self._loaded.get(asked.key)
                if model is not None and model.ended and model.users == 0:
                    await self._unload(model)
                elif model is not None and not model.ended:
                    model.users += 1
                    return model
                elif model is None and self._fits(need):
                    model = self._loaded[asked.key] = Loaded(asked.key, need)
                    model.users = 1
                    return model
                else:
                    idle = [m for m in self._loaded.values() if m.users == 0]
                    if idle and model is None:
                        await self._unload(min(idle, key=lambda m: m.idle_since))
                    else:
                        await self._changed.wait()

    def _fits(self, need: int) -> bool:
        taken = sum(model.need for model in self._loaded.values())
        return (
            len(self._loaded) < self._settings.inference_models
            and taken + need <= self._settings.inference_memory_bytes
        )

    async def _unload(self, model: Loaded) -> None:
        del self._loaded[model.key]
        await model.end()
        logger.info("Unloaded %s", model.key)

    async def _start(self, model: Loaded) -> None:
        if model.copy is not None:
            model.copy.unlink(missing_ok=True)
        copy = self._folder / f"{time.monotonic_ns()}.gguf"
        try:
            path = await asyncio.to_thread(self._store.fetch, model.key, copy)
        except FileNotFoundError:
            raise Refusal(Failed("unusable", "The model's GGUF is gone from the store.")) from None
        model.copy = copy if path == copy else None
        model.gpu = await asyncio.to_thread(self._placement.find_gpu, model.need)
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        seen = "" if model.gpu is None else str(model.gpu)
        # As nvidia-smi counts them, which is how Vulkan's driver does too.
        kept |= {"CUDA_VISIBLE_DEVICES": seen, "GGML_VK_VISIBLE_DEVICES": seen}
        kept |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        layers = 0 if model.gpu is None else ALL_LAYERS
        arguments = [str(path), str(self._settings.inference_context_bytes), str(layers)]
        model.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker.inference.child", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Threads that spin while they wait take the cores from trainings.
            env=kept | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUTF8": "1"},
            start_new_session=True,
            limit=MAX_LINE,
        )
        where = "the CPU" if model.gpu is None else f"GPU {model.gpu}"
        logger.info("Loading %s on %s", model.key, where)

    async def _ask(self, model: Loaded, asked: Generation, deadline: float, tell: Tell) -> None:
        """One request to the process, up to its last event. Leaves a process that is ready, or none."""
        process = model.process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the model is asked before it is started")
        left = replace(asked, seconds=max(deadline - time.monotonic(), 0.1))
        settled = False
        try:
            async with asyncio.timeout(left.seconds + SLACK_SECONDS):
                with contextlib.suppress(ConnectionError):  # it has died: its last words can still be read
                    process.stdin.write(left.to_line())
                    await process.stdin.drain()
                while not settled:
                    event = await _next(process, process.stdout)
                    settled = isinstance(event, Done | Failed)
                    if isinstance(event, Failed):
                        raise Refusal(event)
                    await tell(event)
        except TimeoutError:
            raise Refusal(Failed("away", "The model did not answer in its time.")) from None
        finally:
            if not settled:
                await _undisturbed(_settle(process))


def _loop_time(deadline: float) -> float:
    """The same moment on the event loop's clock."""
    return asyncio.get_running_loop().time() + deadline - time.monotonic()


async def _next(process: asyncio.subprocess.Process, output: asyncio.StreamReader) -> Event:
    line = await output.readline()
    if line.endswith(b"\n"):
        return from_line(line)
    # It has died or is about to: the next request must find it gone.
    await _kill(process)
    return Failed("away", "The model's process died.")


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Bring this to its end also where its caller is cancelled, as one whose client has gone is twice over.

    What is left of one answer would be the next one's.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


async def _settle(process: asyncio.subprocess.Process) -> None:
    """Let the process give its answer up, or end it."""
    if process.stdin is None or process.stdout is None:
        return
    try:
        async with asyncio.timeout(CANCEL_SECONDS):
            process.stdin.write(CANCEL)
            await process.stdin.drain()
            while not isinstance(await _next(process, process.stdout), Done | Failed):
                pass
    except (TimeoutError, ConnectionError):
        await _kill(process)
