"""Warnings of the libraries belong into the job's log."""

from __future__ import annotations

import logging
import warnings

from shared.events import MemorySink
from worker.training.library_log import library_messages


def test_records_and_warnings_become_entries_once() -> None:
    sink = MemorySink()
    with library_messages(sink):
        for _ in range(2):
            logging.getLogger("transformers.trainer").warning("the %s is odd", "tokenizer")
            warnings.warn("slow path", UserWarning, stacklevel=1)
        logging.getLogger("trl.trainer.sft_trainer").error("broken")
        # Where Unsloth says that it goes another way than asked.
        logging.getLogger("unsloth_zoo.log").warning("falling back to unscaled RoPE")
        logging.getLogger("peft").info("not worth a line")
    assert [(e.level, e.message) for e in sink.entries] == [
        ("warning", "the tokenizer is odd"),
        ("warning", "slow path"),
        ("error", "broken"),
        ("warning", "falling back to unscaled RoPE"),
    ]
    assert sink.entries[0].data == {"library": "transformers"}


def test_news_for_the_libraries_programmers_stays_out() -> None:
    sink = MemorySink()
    with library_messages(sink):
        warnings.warn("will be removed", DeprecationWarning, stacklevel=1)
        warnings.warn("will change", FutureWarning, stacklevel=1)
        logging.getLogger("trl").warning(
            "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config"
        )
    assert sink.entries == []


def test_handlers_are_put_back() -> None:
    logger = logging.getLogger("transformers")
    before = (logger.handlers[:], logger.propagate, warnings.showwarning)
    with library_messages(MemorySink()):
        assert not logger.propagate
    assert (logger.handlers, logger.propagate, warnings.showwarning) == before
