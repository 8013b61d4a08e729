"""Preparing a job's data: rows -> conversations -> tokens with a loss mask -> packed rows, and a report."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shared.data.conversation import Dropped
from shared.data.keys import Keys
from shared.data.reader import Row, read_rows
from shared.data.tally import Tally
from shared.errors import DatasetError, JobFailure
from shared.events import Control, Entry, EventSink
from shared.lifecycle import FailureCode
from shared.spec import DataFormat, Dataset, HubDataset, JobSpec
from worker.training.collect import Collector, Document, Take
from worker.training.data_cache import DEFAULT_BYTES, cached, key_of
from worker.training.data_report import packing_report, steps, token_report
from worker.training.documents import Documents
from worker.training.hub_data import hub_rows, resolved_revision
from worker.training.packing import arranged, best_fit, in_batches, row_tokens
from worker.training.template_choice import template_for, warn_of_template
from worker.training.templates import Template
from worker.training.tokenize import Tokens

if TYPE_CHECKING:
    import datasets

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
    validation_file: Path | None = None,
) -> PreparedData:
    """Reads, renders, masks, tokenises and packs the job's data; tells the report to the sink.

    Args:
        dataset_file: the uploaded file; None for a data set of the hub.
        tokenizer: a fast tokenizer of transformers.
        model_max_length: the most tokens that the model takes, if it has a limit.
        cache: the folder where prepared data is kept for jobs that want the same again, up to `cache_bytes`;
            a temporary folder that goes with the data if None.
        validation_file: as `dataset_file`, for the spec's `validation_dataset`.

    Raises:
        JobFailure: `invalid_dataset` where nothing can be trained on.
        JobStopped: when asked to stop.
    """
    limit = min(spec.max_seq_length, model_max_length or spec.max_seq_length)
    if limit < spec.max_seq_length:
        sink.log(
            Entry(f"The model takes {limit} tokens at most: max_seq_length is lowered to that.", "warning")
        )
    template = template_for(spec, tokenizer)
    warn_of_template(template, spec, sink)
    source = _source(spec.dataset, dataset_file)
    held_out = _source(spec.validation_dataset, validation_file) if spec.validation_dataset else None

    collector = Collector(
        tokenizer=tokenizer,
        template=template,
        limit=limit,
        cuts=spec.overlong_rows == "cut",
        max_samples=spec.max_samples,
        drop_unparsable=spec.unparsable_calls == "drop",
        sink=sink,
        control=control,
    )

    def make(folder: Path) -> None:
        rows, others = _rows(spec.dataset, dataset_file, source), None
        if spec.validation_dataset and held_out:
            others = _rows(spec.validation_dataset, validation_file, held_out)
        _prepare(spec, rows, others, collector, folder)

    root = cache or Path(tempfile.mkdtemp(prefix="tuneyard-data-"))
    try:
        key = _key(spec, source, held_out, tokenizer, template, limit)
        with cached(root, key, make, control, cache_bytes) as (folder, was_there):
            train, validation, found = _loaded(folder)
    except BaseException as error:
        if cache is None:
            shutil.rmtree(root, ignore_errors=True)
        if isinstance(error, DatasetError):
            raise JobFailure(FailureCode.INVALID_DATASET, str(error), _ADVICE) from error
        raise
    if cache is None:
        weakref.finalize(train, shutil.rmtree, root, ignore_errors=True)
    found["report"]["validation"] |= held_out or {}
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


def _loaded(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, Any]]:
    """The rows to train on, those held out, and what is told of them."""
    import datasets

    train = datasets.Dataset.from_file(str(folder / "train.arrow"))
    evaluated = folder / "validation.arrow"
    validation = datasets.Dataset.from_file(str(evaluated)) if evaluated.exists() else None
    return train, validation, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _hub(dataset: Dataset) -> HubDataset:
    if not isinstance(dataset, HubDataset):
        raise JobFailure(FailureCode.INVALID_DATASET, "The uploaded file is gone.", "Upload it again.")
    return dataset


def _rows(dataset: Dataset, file: Path | None, source: dict[str, Any]) -> Iterator[Row]:
    return read_rows(file) if file else hub_rows(_hub(dataset), source["revision"])


def _source(dataset: Dataset, file: Path | None) -> dict[str, Any]:
    """Where the rows come from, exactly: a file by its hash, a data set of the hub by its commit."""
    if file is not None:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"source": "file", "file_id": getattr(dataset, "file_id", None), "file_sha256": digest}
    dataset = _hub(dataset)
    return {
        "source": "hub",
        "id": dataset.id,
        "revision": resolved_revision(dataset),
        "split": dataset.split,
        "config": dataset.config,
    }


def _key(
    spec: JobSpec,
    source: dict[str, Any],
    held_out: dict[str, Any] | None,
    tokenizer: Any,
    template: Template,
    limit: int,
) -> str:
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
            "validation": {name: value for name, value in (held_out or {}).items() if name != "file_id"},
            "validation_format": spec.validation_dataset.format if spec.validation_dataset else None,
            "tokenizer": hashlib.sha256(model.encode()).hexdigest(),
            "limit": limit,
            "first_rows": spec.training.effective_batch,
            # The report tells how much padding rows that are not packed get.
            "padded_together": None if spec.packing else spec.training.per_device_train_batch_size,
            "seed": spec.training.seed,
            **{name: getattr(spec, name) for name in fields},
        }
    )


def _prepare(
    spec: JobSpec,
    rows: Iterator[Row],
    others: Iterator[Row] | None,
    collector: Collector,
    folder: Path,
) -> None:
    """Fill the folder with `train.arrow`, `validation.arrow` if rows are held out, and `report.json`.

    Args:
        others: the rows of a validation data set; None if there is none.

    Raises:
        DatasetError: nothing can be trained on.
    """
    with Documents(folder, "train") as train, Documents(folder, "validation") as validation:
        tally, other_tally = Tally(), Tally()
        seen = Keys()

        cuts = spec.overlong_rows == "cut"
        kept = (Keys(), Keys())

        def hold_out(document: Document) -> Dropped | None:
            if cuts and not _is_new(document.tokens, kept[0]):
                return Dropped("duplicate", document.counts.line)
            for name in _names(document):
                seen.add(name)
            validation.add(document.tokens)
            return None

        def take(document: Document) -> Dropped | None:
            if len(seen) and any(name in seen for name in _names(document)):
                return Dropped("in_validation", document.counts.line)
            if cuts and not _is_new(document.tokens, kept[1]):
                return Dropped("duplicate", document.counts.line)
            # Rows that only what was cut off told apart belong on the same side.
            said = _hash(document.tokens.said) if cuts else document.said
            held_out = said < spec.validation_fraction * 2**64
            (validation if held_out else train).add(document.tokens)
            return None

        try:
            if others is not None and spec.validation_dataset:
                _collect_others(collector, spec.validation_dataset.format, others, other_tally, hold_out)
            data_format = collector.collect(spec.dataset.format, rows, tally, take)
            _check_split(spec, tally, train, validation)
        except DatasetError:
            collector.sink.data_report(tally.to_json())
            raise
        packed = _write(spec, train, folder / "train.arrow", collector.limit, collector.control)
        held_out = _write(spec, validation, folder / "validation.arrow", collector.limit, collector.control)
        report = {
            "format": data_format,
            **tally.to_json(),
            "sha256": train.sha256,
            "tokens": token_report(train.lengths, train.trained_tokens),
            "packing": packing_report(spec, packed, collector.limit),
            "validation": {
                **(other_tally.to_json() if others is not None else {}),
                "rows_used": len(validation.lengths),
                "tokens": int(held_out.sum()),
                "trained": validation.trained_tokens,
                "rows": len(held_out),
            },
        }
    found = {"report": report, "longest": int(packed.max())}
    (folder / "report.json").write_text(json.dumps(found), encoding="utf-8")


def _write(
    spec: JobSpec, documents: Documents, path: Path, limit: int, control: Control
) -> npt.NDArray[np.int64]:
    """Pack the documents into a file, if there are any; returns the tokens of each row."""
    lengths = documents.lengths
    if not len(lengths):
        return lengths
    size, seed = spec.training.effective_batch, spec.training.seed
    if spec.packing:
        rows = arranged(best_fit(lengths, limit), lengths, size, seed)
        documents.write(path, rows, control)
        return row_tokens(rows, lengths)
    order = in_batches(lengths, size, seed)
    documents.write(path, order[:, None], control)
    return lengths[order]


def _names(document: Document) -> tuple[int, int]:
    """By what it says and by its tokens: two rows that have either in common are the same text."""
    return document.said, _hash(document.tokens.said)


def _is_new(tokens: Tokens, kept: Keys) -> bool:
    """Whether no other document with these tokens and this mask is among the kept; adds it."""
    return kept.add(_hash(tokens.ids, tokens.trained))


def _hash(*arrays: npt.NDArray[Any]) -> int:
    """64 bits, the same in each process."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest(), "big")


def _collect_others(
    collector: Collector, data_format: DataFormat, rows: Iterator[Row], tally: Tally, take: Take
) -> None:
    """
    Raises:
        DatasetError: says that it is the validation data.
    """
    try:
        collector.collect(data_format, rows, tally, take)
    except DatasetError as error:
        raise DatasetError(f"Validation data: {error}", error.line) from error


def _check_split(spec: JobSpec, tally: Tally, train: Documents, validation: Documents) -> None:
    if not len(train.lengths):
        raise DatasetError(f"All of the {tally.used} usable rows are held out for validation.")
    if spec.validation_fraction and not len(validation.lengths):
        raise DatasetError(
            f"None of the {tally.used} usable rows is held out at a validation_fraction of "
            f"{spec.validation_fraction}: raise it, give more rows, or set it to 0."
        )


def _log_report(report: dict[str, Any], sink: EventSink) -> None:
    dropped = ", ".join(f"{counted['count']} {reason}" for reason, counted in report["dropped"].items())
    tokens, packing = report["tokens"], report["packing"]
    held_out = report["validation"]["rows_used"]
    sink.log(
        Entry(
            f"Data: {report['rows_used']:,} of {report['rows_read']:,} rows used"
            f"{f' (dropped: {dropped})' if dropped else ''}, {tokens['total']:,} tokens, "
            f"{tokens['trained_share']:.0%} trained, {packing['rows']:,} rows to train on, "
            f"{f'{held_out:,} held out, ' if held_out else ''}"
            f"{packing['efficiency']:.1%} of their slots filled, {report['total_steps']:,} steps.",
            "info" if not dropped else "warning",
        )
    )
