"""Preparing a job's data: rows -> conversations -> tokens with a loss mask -> packed rows, and a report."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data.conversation import Conversation, Dropped
from shared.data.formats import conversations
from shared.data.inspect import check_usable, unique
from shared.data.reader import Row, read_rows
from shared.data.tally import Tally
from shared.errors import DatasetError, JobFailure
from shared.events import Control, Entry, EventSink
from shared.lifecycle import FailureCode
from shared.spec import HubDataset, JobSpec
from worker.training.data_cache import DEFAULT_BYTES, cached, key_of
from worker.training.data_report import packing_report, steps, token_report
from worker.training.documents import Documents
from worker.training.hub_data import hub_rows, resolved_revision
from worker.training.packing import arranged, best_fit
from worker.training.templates import ModelTemplate, Template, chatml
from worker.training.tokenize import Encoder, Tokens

if TYPE_CHECKING:
    import datasets

BATCH = 512
SECONDS_BETWEEN_LOGS = 5.0
_ADVICE = "Look at the data set's report, mend the file and upload it again."


@dataclass(frozen=True)
class PreparedData:
    """What training needs.

    Attributes:
        train: packed rows, the longest first, the others shuffled: `input_ids`, `labels` (-100: not trained)
            and `seq_lengths` (tokens of each document in the row), all lists of int32.
        validation: rows held out, of the same form; None if there are none. No row is in both.
        report: the job's `data_report`.
        sha256: hex hash of the documents trained on, in order.
        train_tokens: real tokens in one epoch.
        longest: tokens of the longest row.
        chat_template: the Jinja template that renders the same at inference, to be exported.
        stop_token: the token that ends an assistant's turn; None if the model has none.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    report: dict[str, Any]
    sha256: str
    train_tokens: int
    longest: int
    chat_template: str
    stop_token: str | None


def prepare_data(
    spec: JobSpec,
    dataset_file: Path | None,
    tokenizer: Any,
    sink: EventSink,
    control: Control,
    model_max_length: int | None,
    cache: Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
) -> PreparedData:
    """Reads, renders, masks, tokenises and packs the job's data; tells the report to the sink.

    Args:
        dataset_file: the uploaded file; None for a data set of the hub.
        tokenizer: a fast tokenizer of transformers.
        model_max_length: the most tokens that the model takes, if it has a limit.
        cache: the folder where prepared data is kept for jobs that want the same again, up to `cache_bytes`;
            a temporary folder that goes with the data if None.

    Raises:
        JobFailure: `invalid_dataset` where nothing can be trained on.
        JobStopped: when asked to stop.
    """
    import datasets

    limit = min(spec.max_seq_length, model_max_length or spec.max_seq_length)
    if limit < spec.max_seq_length:
        sink.log(
            Entry(f"The model takes {limit} tokens at most: max_seq_length is lowered to that.", "warning")
        )
    template = _template(spec, tokenizer)
    _warn_of_delimiters(template, spec, sink)
    encoder = Encoder(tokenizer, template, limit if spec.overlong_rows == "cut" else None)
    source = _source(spec, dataset_file)

    def make(folder: Path) -> None:
        rows = read_rows(dataset_file) if dataset_file else hub_rows(_hub(spec), source["revision"])
        _prepare(spec, rows, encoder, limit, folder, sink, control)

    root = cache or Path(tempfile.mkdtemp(prefix="tuneyard-data-"))
    try:
        folder, was_there = cached(
            root, _key(spec, source, tokenizer, template, limit), make, control, cache_bytes
        )
        train = datasets.Dataset.from_file(str(folder / "train.arrow"))
        held_out = folder / "validation.arrow"
        validation = datasets.Dataset.from_file(str(held_out)) if held_out.exists() else None
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except BaseException as error:
        if cache is None:
            shutil.rmtree(root, ignore_errors=True)
        if isinstance(error, DatasetError):
            raise JobFailure(FailureCode.INVALID_DATASET, str(error), _ADVICE) from error
        raise
    if cache is None:
        weakref.finalize(train, shutil.rmtree, root, ignore_errors=True)
    report = {**source, **found["report"], **steps(spec, len(train)), "from_cache": was_there}
    sink.data_report(report)
    _log_report(report, sink)
    return PreparedData(
        train=train,
        validation=validation,
        report=report,
        sha256=report["sha256"],
        train_tokens=report["tokens"]["total"],
        longest=found["longest"],
        chat_template=template.source,
        stop_token=template.stop_token,
    )


def _hub(spec: JobSpec) -> HubDataset:
    if not isinstance(spec.dataset, HubDataset):
        raise JobFailure(FailureCode.INVALID_DATASET, "The uploaded file is gone.", "Upload it again.")
    return spec.dataset


def _source(spec: JobSpec, dataset_file: Path | None) -> dict[str, Any]:
    """Where the rows come from, exactly: a file by its hash, a data set of the hub by its commit."""
    if dataset_file is not None:
        with dataset_file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"source": "file", "file_id": getattr(spec.dataset, "file_id", None), "file_sha256": digest}
    dataset = _hub(spec)
    return {
        "source": "hub",
        "id": dataset.id,
        "revision": resolved_revision(dataset),
        "split": dataset.split,
        "config": dataset.config,
    }


def _key(spec: JobSpec, source: dict[str, Any], tokenizer: Any, template: Template, limit: int) -> str:
    """A name for the prepared rows, made of everything that they depend on."""
    model = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.special_tokens_map}{template.source}"
    fields = (
        "max_samples", "validation_fraction", "overlong_rows", "unparsable_calls", "packing", "train_on",
        "chat_template", "tool_call_style",
    )  # fmt: skip
    return key_of(
        {
            "source": {name: value for name, value in source.items() if name != "file_id"},
            "format": spec.dataset.format,
            "tokenizer": hashlib.sha256(model.encode()).hexdigest(),
            "limit": limit,
            "first_rows": spec.training.per_device_train_batch_size,
            "seed": spec.training.seed,
            **{name: getattr(spec, name) for name in fields},
        }
    )


def _template(spec: JobSpec, tokenizer: Any) -> Template:
    if spec.chat_template == "chatml":
        return chatml(tokenizer, spec.train_on)
    try:
        return ModelTemplate(tokenizer, spec.train_on, spec.tool_call_style == "template")
    except ValueError as error:
        raise JobFailure(
            FailureCode.MODEL_UNAVAILABLE,
            f"The chat template of {spec.model} can't be used: {error}.",
            "Set chat_template to chatml.",
        ) from error


def _warn_of_delimiters(template: Template, spec: JobSpec, sink: EventSink) -> None:
    if template.escape:
        follows = f", and {template.stop_token} follows each answer" if template.stop_token else ""
        sink.log(
            Entry(
                f"<|im_start|> and <|im_end|> are no single tokens of {spec.model}: each is several{follows}."
                ' If the model has a chat template of its own, "chat_template": "model" suits it better.',
                "warning",
            )
        )


def _prepare(
    spec: JobSpec,
    rows: Iterator[Row],
    encoder: Encoder,
    limit: int,
    folder: Path,
    sink: EventSink,
    control: Control,
) -> None:
    """Fill the folder with `train.arrow`, `validation.arrow` if rows are held out, and `report.json`.

    Raises:
        DatasetError: nothing can be trained on.
    """
    with Documents(folder, "train") as train, Documents(folder, "validation") as validation:
        tally = Tally()
        try:
            data_format = _collect(spec, rows, encoder, limit, tally, train, validation, sink, control)
        except DatasetError:
            sink.data_report(tally.to_json())
            raise
        packed = _write(spec, train, folder / "train.arrow", limit, control)
        held_out = _write(spec, validation, folder / "validation.arrow", limit, control)
        report = {
            "format": data_format,
            **tally.to_json(),
            "sha256": train.sha256,
            "tokens": token_report(train.lengths, train.trained_tokens),
            "packing": packing_report(spec, packed, limit),
            "validation": {
                "rows_used": len(validation.lengths),
                "tokens": sum(held_out),
                "trained": validation.trained_tokens,
                "rows": len(held_out),
            },
        }
    found = {"report": report, "longest": max(packed)}
    (folder / "report.json").write_text(json.dumps(found), encoding="utf-8")


def _write(spec: JobSpec, documents: Documents, path: Path, limit: int, control: Control) -> list[int]:
    """Pack the documents into a file, if there are any; returns the tokens of each row."""
    lengths = documents.lengths
    if not len(lengths):
        return []
    rows = best_fit(lengths, limit) if spec.packing else [[index] for index in range(len(lengths))]
    rows = arranged(rows, lengths, spec.training.per_device_train_batch_size, spec.training.seed)
    documents.write(path, rows, control)
    return [int(lengths[row].sum()) for row in rows]


def _collect(
    spec: JobSpec,
    rows: Iterator[Row],
    encoder: Encoder,
    limit: int,
    tally: Tally,
    train: Documents,
    validation: Documents,
    sink: EventSink,
    control: Control,
) -> str:
    """Take what can be used, in file order, up to max_samples; returns the format."""
    data_format, parsed = conversations(rows, spec.dataset.format, spec.unparsable_calls == "drop")
    told = time.monotonic()
    for row, tokens in _tokenised(parsed, encoder, control):
        if tally.used == spec.max_samples:
            break
        tally.read += 1
        found = _usable(row, tokens, limit)
        if isinstance(found, Dropped):
            tally.drop(found)
            continue
        conversation, document = found
        tally.keep(conversation)
        for note in document.notes:
            tally.note(note, conversation.line)
        fraction = spec.validation_fraction
        held_out = fraction > 0 and conversation.key() < fraction * 2**64
        (validation if held_out else train).add(document)
        if time.monotonic() - told > SECONDS_BETWEEN_LOGS:
            told = time.monotonic()
            sink.log(Entry(f"Preparing data: {tally.read:,} rows read, {tally.used:,} used."))
    check_usable(tally)
    if not len(train.lengths):
        raise DatasetError(f"All of the {tally.used} usable rows are held out for validation.")
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
            coming = [unique(row, seen) for row in islice(rows, BATCH)]
            tokens = iter(waiting.result())
            waiting = pool.submit(encoder.encode, [row for row in coming if isinstance(row, Conversation)])
            for row in batch:
                yield row, next(tokens) if isinstance(row, Conversation) else None
            batch = coming
            if not batch:
                return


def _log_report(report: dict[str, Any], sink: EventSink) -> None:
    dropped = ", ".join(f"{counted['count']} {reason}" for reason, counted in report["dropped"].items())
    tokens, packing = report["tokens"], report["packing"]
    sink.log(
        Entry(
            f"Data: {report['rows_used']:,} of {report['rows_read']:,} rows used"
            f"{f' (dropped: {dropped})' if dropped else ''}, {tokens['total']:,} tokens, "
            f"{tokens['trained_share']:.0%} trained, {packing['rows']:,} rows to train on, "
            f"{packing['efficiency']:.1%} of their slots filled, {report['total_steps']:,} steps.",
            "info" if not dropped else "warning",
        )
    )
