"""Reading rows into tokenised documents, in file order, each counted as kept or dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from shared.data.conversation import Conversation, Dropped
from shared.data.formats import conversations
from shared.data.inspect import check_usable, unique
from shared.data.reader import Row
from shared.data.tally import Tally
from shared.events import Control, Entry, EventSink
from shared.spec import DataFormat
from worker.training.tokenize import Encoder, Tokens

# A batch ends at whichever comes first: rows may be of any width.
BATCH = 512
BATCH_CHARACTERS = 2**20
SECONDS_BETWEEN_LOGS = 5.0

# Keeps a usable row somewhere (None), or drops it for a reason of the job's.
Take = Callable[[Conversation, Tokens], Dropped | None]


@dataclass(frozen=True)
class Collector:
    """How the rows of a job are read: up to `max_samples` usable ones of at most `limit` tokens."""

    encoder: Encoder
    limit: int
    max_samples: int | None
    drop_unparsable: bool
    sink: EventSink
    control: Control

    def collect(self, asked: DataFormat, rows: Iterator[Row], tally: Tally, take: Take) -> str:
        """Give what can be used to `take`; returns the format.

        Raises:
            DatasetError: nothing was kept.
        """
        data_format, parsed = conversations(rows, asked, self.drop_unparsable)
        told = time.monotonic()
        for row, tokens in _tokenised(parsed, self.encoder, self.control):
            if tally.used == self.max_samples:
                break
            tally.read += 1
            found = _usable(row, tokens, self.limit)
            if isinstance(found, Dropped):
                tally.drop(found)
                continue
            conversation, document = found
            refused = take(conversation, document)
            if refused is not None:
                tally.drop(refused)
                continue
            tally.keep(conversation)
            for note in document.notes:
                tally.note(note, conversation.line)
            if time.monotonic() - told > SECONDS_BETWEEN_LOGS:
                told = time.monotonic()
                self.sink.log(Entry(f"Preparing data: {tally.read:,} rows read, {tally.used:,} used."))
        check_usable(tally)
        return data_format


def _usable(
    row: Conversation | Dropped, tokens: Tokens | None, limit: int
) -> tuple[Conversation, Tokens] | Dropped:
    if isinstance(row, Dropped) or tokens is None:
        return row if isinstance(row, Dropped) else Dropped("not_rendered", row.line)
    if not tokens.trained.any():
        return Dropped("nothing_to_train_on", row.line)
    if len(tokens.ids) > limit:
        return Dropped("too_long", row.line)
    return row, tokens


def _tokenised(
    parsed: Iterable[Conversation | Dropped], encoder: Encoder, control: Control
) -> Iterator[tuple[Conversation | Dropped, Tokens | None]]:
    """Rows in order, the usable and distinct ones with their tokens.

    One batch is tokenised on a thread, which holds up no other while it does, as the next one is parsed.
    """
    seen: set[int] = set()
    rows = iter(parsed)
    batch: list[Conversation | Dropped] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(encoder.encode, [])
        while True:
            control.check()
            coming = _batch(rows, seen)
            tokens = iter(waiting.result())
            waiting = pool.submit(encoder.encode, [row for row in coming if isinstance(row, Conversation)])
            for row in batch:
                yield row, next(tokens) if isinstance(row, Conversation) else None
            batch = coming
            if not batch:
                return


def _batch(rows: Iterator[Conversation | Dropped], seen: set[int]) -> list[Conversation | Dropped]:
    batch: list[Conversation | Dropped] = []
    characters = 0
    for row in islice(rows, BATCH):
        found = unique(row, seen)
        batch.append(found)
        if isinstance(found, Conversation):
            characters += sum(len(turn.content) for turn in found.turns)
        if characters >= BATCH_CHARACTERS:
            break
    return batch
