"""Rows of a data set of the Hugging Face hub, at a revision that is resolved first and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.data.reader import Row
from shared.errors import JobFailure
from shared.lifecycle import FailureCode
from shared.spec import HubDataset

BATCH_ROWS = 256


def hub_rows(dataset: HubDataset, revision: str) -> Iterator[Row]:
    """The rows at a commit, with 1-based numbers.

    Raises:
        JobFailure: `invalid_dataset` where the split or config isn't there or the files can't be read.
    """
    import datasets
    from httpx import HTTPError

    if Path(dataset.id).exists():
        # load_dataset would take the folder, whatever is in it.
        raise _failure(
            f"The worker's own folder holds something named {dataset.id}, which would be taken for it.",
            "Start the worker in another folder.",
        )
    try:
        loaded = datasets.load_dataset(
            dataset.id, name=dataset.config, revision=revision, split=dataset.split
        )
    except (datasets.exceptions.DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        # Splits and configs that are not there, scripts, damaged files: datasets names what it wanted.
        raise _failure(
            f"The data set {dataset.id} can't be loaded: {_first_line(error)}",
            "Check its split and config on the hub, or upload it as a file.",
        ) from error
    return _numbered(loaded)


def resolved_revision(dataset: HubDataset) -> str:
    """The commit that the data set's revision stands for now.

    Raises:
        JobFailure: `invalid_dataset` where there is no such data set or revision, no access or no network.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = HfApi().dataset_info(dataset.id, revision=dataset.revision, timeout=30)
    except GatedRepoError as error:
        raise _failure(
            f"The data set {dataset.id} is gated: this worker's hub account has no access to it.",
            "Ask for access on the hub and set HF_TOKEN on the worker.",
        ) from error
    except RevisionNotFoundError as error:
        raise _failure(
            f"The data set {dataset.id} has no revision {dataset.revision}.",
            "Name a branch, tag or commit that the hub shows.",
        ) from error
    except RepositoryNotFoundError as error:
        raise _failure(
            f"The hub has no data set {dataset.id}, or it is private.",
            "Check the id; for a private one set HF_TOKEN on the worker.",
        ) from error
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise _failure(
            f"The hub could not be reached for the data set {dataset.id}: {_first_line(error)}",
            "Check the worker's network, or upload the data as a file.",
        ) from error
    return str(found.sha)


def _numbered(loaded: Any) -> Iterator[Row]:
    number = 0
    for batch in loaded.iter(batch_size=BATCH_ROWS):
        names = list(batch)
        for cells in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(names, cells, strict=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _failure(message: str, advice: str) -> JobFailure:
    return JobFailure(FailureCode.INVALID_DATASET, message, advice)
