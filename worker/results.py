"""The file of results that a job leaves: its metrics as CSV, in OpenAI's columns."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.ids import new_dataset_id
from shared.storage import Store
from shared.tables import RESULTS, DatasetRow

FILENAME = "step_metrics.csv"
# OpenAI's columns, and where their values are in a row of metrics.
COLUMNS = {
    "step": "step",
    "train_loss": "loss",
    "train_accuracy": "mean_token_accuracy",
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_mean_token_accuracy",
}


def results_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line a step; empty where there was no evaluation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.get(name) for name in COLUMNS.values()] for row in rows)
    return text.getvalue()


def publish_results(
    rows: Sequence[dict[str, Any]], job_id: str, token: str, owner: str, folder: Path, store: Store
) -> DatasetRow:
    """Put the file into the store. The row that names it is to be added with the job's end.

    Each attempt has a file of its own, named by its token: one that was overtaken replaces no other's.

    Raises:
        OSError: the disk or the store refused.
    """
    content = results_csv(rows).encode()
    path = folder / FILENAME
    path.write_bytes(content)
    key = f"results/{job_id}/{token}/{FILENAME}"
    store.publish(path, key)
    return DatasetRow(
        id=new_dataset_id(),
        owner=owner,
        filename=FILENAME,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        status="processed",
        format="auto",
        key=key,
        purpose=RESULTS,
        job_id=job_id,
    )
