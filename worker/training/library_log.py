"""Puts what the training libraries warn of into the job's log, and keeps them off the console."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from shared.events import Entry, EventSink

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "peft",
    "torch",
    "transformers",
    "trl",
    "unsloth",
    "unsloth_zoo",
)
# News for programmers of the libraries, not for who runs a job.
DEVELOPER_NEWS = (
    DeprecationWarning,
    PendingDeprecationWarning,
    FutureWarning,
    ImportWarning,
    ResourceWarning,
)
UNFOUNDED = (
    # They do differ, on purpose: the end of a turn is ChatML's.
    "The tokenizer has new PAD/BOS/EOS tokens",
    # A checkpoint that another split of the same effective batch goes on from: meant to be.
    "The following arguments do not match the ones in the `trainer_state.json`",
    # A faster 4-bit product for CPUs: nothing here multiplies in 4 bits on a CPU.
    "Failed to load CPU gemm_4bit_forward",
)


class _SinkHandler(logging.Handler):
    """Sends each distinct message of level warning or above to the job's log once."""

    def __init__(self, sink: EventSink) -> None:
        super().__init__(level=logging.WARNING)
        self._sink = sink
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.getMessage(), record.name.partition(".")[0], error=record.levelno >= logging.ERROR)

    def tell(self, message: str, library: str, *, error: bool = False) -> None:
        message = message.strip()
        if not message or message in self._seen or any(words in message for words in UNFOUNDED):
            return
        self._seen.add(message)
        self._sink.log(
            Entry(message=message, level="error" if error else "warning", data={"library": library})
        )


@contextmanager
def library_messages(sink: EventSink) -> Iterator[None]:
    """Within it, warnings and log records of the training libraries are entries of the job's log.

    Progress bars are off from here on. The libraries' own handlers are put back at the end.
    """
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    handler = _SinkHandler(sink)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for category in DEVELOPER_NEWS:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = _ShowWarning(handler)
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


class _ShowWarning:
    """Stands in for `warnings.showwarning`."""

    def __init__(self, handler: _SinkHandler) -> None:
        self._handler = handler

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],  # noqa: ARG002
        filename: str,
        lineno: int,  # noqa: ARG002
        file: TextIO | None = None,  # noqa: ARG002
        line: str | None = None,  # noqa: ARG002
    ) -> None:
        parts = filename.split("site-packages/")
        library = parts[-1].partition("/")[0] if len(parts) > 1 else "python"
        self._handler.tell(str(message), library)
