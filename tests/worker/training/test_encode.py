"""Encoding rows on every core: the same as on one, in bounded batches, and it can be stopped."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from shared.data.conversation import Dropped
from shared.errors import JobFailure, JobStopped
from shared.events import GoOn, MemorySink
from shared.lifecycle import FailureCode
from shared.spec import JobSpec
from tests.worker.training.data_samples import chat_row, tokenizer, write_jsonl
from worker.training import collect, encode
from worker.training.data import prepare_data
from worker.training.encode import Encoded, RowEncoder, RowSpec, encode_rows
from worker.training.templates import chatml

ROWS = [chat_row(f"q{number}", f"a{number % 50} it's é") for number in range(120)]


def numbered(rows: list[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(rows, 1))


def spec(limit: int = 100) -> RowSpec:
    model = tokenizer()
    return RowSpec(model, chatml(model, "assistant"), limit, False, "messages", False)


def plain(found: Encoded | Dropped) -> Any:
    if isinstance(found, Dropped) or isinstance(found.tokens, str):
        return found
    tokens = found.tokens
    return found[:3], tokens.ids.tolist(), tokens.trained.tolist(), tokens.said.tolist(), tokens.notes


@pytest.fixture
def processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes from the second batch of a few rows on."""
    monkeypatch.setattr(encode, "BATCHES_ALONE", 1)
    monkeypatch.setattr(encode, "BATCH_ROWS", 7)


@pytest.mark.usefixtures("processes_at_once")
def test_all_cores_give_what_one_gives_in_order() -> None:
    rows = numbered([*ROWS[:60], {"messages": 7}, chat_row("long", "word " * 400), *ROWS[60:]])
    alone = RowEncoder(spec()).encode(list(map(encode.pickle.dumps, rows)))
    assert {type(row) for row in alone} == {Encoded, Dropped}
    assert list(map(plain, encode_rows(rows, spec(), GoOn()))) == list(map(plain, alone))


@pytest.mark.usefixtures("processes_at_once")
def test_a_job_is_prepared_on_all_cores_and_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "SECONDS_BETWEEN_LOGS", 0.0)
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, *ROWS[:5]])
    sink = MemorySink()
    prepared = prepare_data(JobSpec(max_seq_length=64), path, tokenizer(), sink, GoOn(), None)
    assert prepared.report["rows_used"] == len(ROWS)
    told = [entry.message for entry in sink.entries if entry.message.startswith("Preparing data: ")]
    assert told[0] == "Preparing data: 1 rows read, 0 used."
    # Rows that are dropped are read too.
    assert told[-1] == "Preparing data: 125 rows read, 120 used."
    assert len(told) == 125
    monkeypatch.setattr(encode, "BATCHES_ALONE", 1000)
    alone = prepare_data(JobSpec(max_seq_length=64), path, tokenizer(), MemorySink(), GoOn(), None)
    assert alone.sha256 == prepared.sha256
    assert alone.report == prepared.report


@pytest.mark.usefixtures("processes_at_once")
def test_stopping_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    stopped = threading.Event()

    class Stop:
        def check(self) -> None:
            if started:
                stopped.set()
                raise JobStopped

    start = encode._Processes._start

    def spy(self: Any) -> Any:
        process = start(self)
        started.append(process)
        return process

    monkeypatch.setattr(encode._Processes, "_start", spy)
    with pytest.raises(JobStopped):
        list(encode_rows(numbered(ROWS), spec(), Stop()))
    assert stopped.is_set()
    assert all(process.returncode is not None for process in started)


@pytest.mark.usefixtures("processes_at_once")
def test_a_process_that_the_system_kills_tells_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    start = encode._Processes._start

    def killed(self: Any) -> Any:
        process = start(self)
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(encode._Processes, "_start", killed)
    with pytest.raises(JobFailure, match="memory runs out") as failure:
        list(encode_rows(numbered(ROWS), spec(), GoOn()))
    assert failure.value.code is FailureCode.OUT_OF_MEMORY


def test_wide_rows_make_short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BATCH_BYTES", 150)
    sizes: list[int] = []
    one = RowEncoder.encode

    def spy(encoder: RowEncoder, batch: list[bytes]) -> Any:
        sizes.append(len(batch))
        return one(encoder, batch)

    monkeypatch.setattr(RowEncoder, "encode", spy)
    rows = numbered([chat_row(f"q{number}", "word " * 10) for number in range(7)])
    assert len(list(encode_rows(rows, spec(), GoOn()))) == 7
    assert sizes == [2, 2, 2, 1]


def test_a_row_far_over_the_limit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.tokenize.ALWAYS_TOKENISED", 1000)
    short, long = encode_rows(
        numbered([chat_row("q", "a"), chat_row("q", "word " * 100_000)]), spec(), GoOn()
    )
    assert isinstance(short, Encoded)
    assert isinstance(long, Encoded)
    assert not isinstance(short.tokens, str)
    assert long.tokens == "too_long"
