"""What training would make of a local data file: a job's report, and one row with what is trained of it.

`python -m worker.training.inspect` prints it as JSON, so that whoever asks needs none of the training stack.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.conversation import Conversation, Dropped
from shared.data.formats import conversations
from shared.data.inspect import row_at
from shared.data.reader import read_rows
from shared.errors import DatasetError, JobFailure
from shared.events import GoOn, MemorySink
from shared.spec import JobSpec
from worker.training.data import prepare_data
from worker.training.models import load_tokenizer, resolve_model
from worker.training.template_choice import template_for
from worker.training.tokenize import Encoder, Tokens
from worker.training.workdir import Workdir


def inspect(spec: JobSpec, file: Path, line: int | None, workdir: Workdir) -> dict[str, Any]:
    """The model, the report of a job with this spec, its warnings, and one conversation as it is trained.

    Args:
        line: where the row to be shown begins, as in reports; None for the first that is used.

    Returns:
        `model` (id, revision), `report` (the job's `data_report`), `warnings`, and `conversation`: `line`,
        `dropped` (the reason if the row isn't used), `spans` (`text`, `trained`), `tokens`, `trained`.

    Raises:
        JobFailure: what the job would fail with.
        DatasetError: no row begins at that line.
    """
    # Whoever waits for the answer ends the process.
    control, sink = GoOn(), MemorySink()
    model = resolve_model(spec, workdir, control)
    tokenizer = load_tokenizer(model)
    data = prepare_data(
        spec=spec,
        dataset_file=file,
        tokenizer=tokenizer,
        sink=sink,
        control=control,
        model_max_length=model.context_length,
    )
    limit = min(spec.max_seq_length, model.context_length or spec.max_seq_length)
    encoder = Encoder(tokenizer, template_for(spec, tokenizer))
    # The summary of the report, which is given as it is, is a warning where rows were dropped.
    warnings = [e.message for e in sink.entries if e.level == "warning" and not e.message.startswith("Data:")]
    return {
        "model": {"id": model.id, "revision": model.revision},
        "report": data.report,
        "warnings": warnings,
        "conversation": _conversation(file, data.report["format"], line, tokenizer, encoder, limit),
    }


def _conversation(
    file: Path, data_format: str, line: int | None, tokenizer: Any, encoder: Encoder, limit: int
) -> dict[str, Any]:
    if line is not None:
        return _as_json(row_at(file, data_format, line), tokenizer, encoder, limit)
    for row in conversations(read_rows(file), data_format)[1]:
        found = _as_json(row, tokenizer, encoder, limit)
        if found["dropped"] is None:
            return found
    raise DatasetError("The file holds no row that can be used.")


def _as_json(row: Conversation | Dropped, tokenizer: Any, encoder: Encoder, limit: int) -> dict[str, Any]:
    found = row.reason if isinstance(row, Dropped) else encoder.encode([row])[0]
    tokens = found if isinstance(found, Tokens) else None
    dropped = found if isinstance(found, str) else _reason(found, limit)
    return {
        "line": row.line,
        "dropped": dropped,
        "spans": spans(tokenizer, tokens) if tokens else [],
        "tokens": len(tokens.ids) if tokens else 0,
        "trained": int(tokens.trained.sum()) if tokens else 0,
    }


def _reason(tokens: Tokens, limit: int) -> str | None:
    if not tokens.trained.any():
        return "nothing_to_train_on"
    return "too_long" if len(tokens.ids) > limit else None


def spans(tokenizer: Any, tokens: Tokens) -> list[dict[str, Any]]:
    """The document's text, read back from its tokens, in pieces that are trained or not."""
    borders = np.flatnonzero(np.diff(tokens.trained)) + 1
    found: list[dict[str, Any]] = []
    before = ""
    for start, end in pairwise([0, *borders.tolist(), len(tokens.ids)]):
        # From the beginning each time: some decoders strip a space from whatever text begins with.
        text = tokenizer.decode(
            tokens.ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found.append({"text": text[len(before) :], "trained": bool(tokens.trained[start])})
        before = text
    return found


def main(arguments: list[str]) -> int:
    """Print what `inspect` returns, or `error`, as one line of JSON; 1 for an error."""
    parser = argparse.ArgumentParser(prog="python -m worker.training.inspect", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--spec", required=True, help="the job spec as JSON")
    parser.add_argument("--cache", type=Path, required=True, help="folder for converted models")
    parser.add_argument("--model-dir", type=Path, help="folder of a local model")
    parser.add_argument("--line", type=int, help="the row to be shown")
    given = parser.parse_args(arguments)
    workdir = Workdir(given.cache, given.cache, dataset_file=given.file, model_dir=given.model_dir)
    try:
        # Libraries that print shall not do so into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            answer = inspect(JobSpec.model_validate_json(given.spec), given.file, given.line, workdir)
    except JobFailure as failure:
        answer = {"error": f"{failure.message} {failure.advice}"}
    except DatasetError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
