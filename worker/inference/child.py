"""The process of one model: takes requests by lines on standard input, answers by lines on standard output.

    python -m worker.inference.child MODEL.gguf CONTEXT_BYTES GPU_LAYERS

It is started and watched by the inference process. Torch-free. When its input ends, so does it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import BinaryIO

from shared.inference import CANCEL, Done, Event, Failed, Generation, to_line
from worker.inference.model import Model

MAX_THREADS = 8
# Behind trainings, where they share the cores.
NICENESS = 10


class Child:
    """Reads requests on a thread of its own, so that one can be given up in the middle."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._asked: queue.Queue[Generation] = queue.Queue()
        # Within it, what was said last and what the model is told are the same.
        self._saying = threading.Lock()
        self._cancelled = False
        self._model: Model | None = None

    def run(self, path: str, context_bytes: int, gpu_layers: int) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        threads = min(len(os.sched_getaffinity(0)), MAX_THREADS)
        try:
            self._model = Model(path, context_bytes, threads, gpu_layers)
        except (ValueError, RuntimeError, MemoryError) as error:
            self._tell(Failed("unusable", f"llama.cpp can't load the model: {error}"))
            return
        while True:
            self._answer(self._model, self._asked.get())

    def _answer(self, model: Model, asked: Generation) -> None:
        with self._saying:
            model.cancel(self._cancelled)
        try:
            model.answer(asked, self._tell)
        except InterruptedError:
            self._tell(Done("stop", 0))
        except RuntimeError as error:
            self._tell(Failed("away", f"llama.cpp can't compute the answer: {error}"))

    def _listen(self) -> None:
        for line in sys.stdin.buffer:
            with self._saying:
                self._cancelled = line == CANCEL
                if self._model is not None:
                    self._model.cancel(self._cancelled)
            if line != CANCEL:
                self._asked.put(Generation.from_line(line))
        os._exit(0)

    def _tell(self, event: Event) -> None:
        self._output.write(to_line(event))
        self._output.flush()


def main() -> None:
    os.nice(NICENESS)
    path, *numbers = sys.argv[1:]
    # What a library prints must not get between the answers.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    context_bytes, gpu_layers = map(int, numbers)
    Child(output).run(path, context_bytes, gpu_layers)


if __name__ == "__main__":
    main()
