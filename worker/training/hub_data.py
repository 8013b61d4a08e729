"""Rows of a data set of the Hugging Face hub, at a revision that is resolved first and recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shared.data.packed import without_filled
from shared.data.reader import Row
from shared.errors import JobFailure
from shared.lifecycle import FailureCode
from shared.spec import HubDataset

BATCH_ROWS = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_rows(dataset: HubDataset, revision: str) -> Iterator[Row]:
    """The rows at a commit, with 1-based numbers; without network those loaded last, if of that commit.

    Raises:
        JobFailure: `invalid_dataset` where the split or config isn't there or the files can't be read.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from httpx import HTTPError, TransportError

    try:
        # With the prefix no folder that happens to have that name is taken for it.
        builder = datasets.load_dataset_builder(
            f"hf://datasets/{dataset.id}", name=dataset.config, revision=revision
        )
        # Where the hub can't be asked, datasets takes whichever revision and config it has kept.
        kept = isinstance(builder, Cache)
        if builder.hash != revision or (kept and builder.config.name != (dataset.config or "default")):
            raise ConnectionError("only another revision or config is on this machine")
        builder.download_and_prepare()
        loaded = builder.as_dataset(split=dataset.split)
    except (ConnectionError, TransportError) as error:
        raise _unreachable(dataset, error) from error
    except (datasets.exceptions.DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        # Splits and configs that are not there, scripts, damaged files: datasets names what it wanted.
        raise _failure(
            f"The data set {dataset.id} can't be loaded: {_first_line(error)}",
            "Check its split and config on the hub, or upload it as a file.",
        ) from error
    return _numbered(loaded)


def resolved_revision(dataset: HubDataset) -> str:
    """The commit that the data set's revision stands for now; a commit stands for itself without network too.

    Raises:
        JobFailure: `invalid_dataset` where there is no such data set or revision, no access or no network.
    """
    from httpx import HTTPError, TransportError
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
        if found.gated:
            # What a gated data set is may be read by everybody, its rows may not.
            HfApi().auth_check(dataset.id, repo_type="dataset")
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
    except (OfflineModeIsEnabled, TransportError) as error:
        if dataset.revision and _COMMIT.fullmatch(dataset.revision):
            return dataset.revision
        raise _unreachable(dataset, error) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise _unreachable(dataset, error) from error
    return str(found.sha)


def _numbered(loaded: Any) -> Iterator[Row]:
    number = 0
    for batch in loaded.iter(batch_size=BATCH_ROWS):
        names = list(batch)
        for cells in zip(*batch.values(), strict=True):
            number += 1
            yield number, {name: without_filled(cell) for name, cell in zip(names, cells, strict=True)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _unreachable(dataset: HubDataset, error: BaseException) -> JobFailure:
    return _failure(
        f"The hub could not be reached for the data set {dataset.id}: {_first_line(error)}",
        "Check the worker's network, or upload the data as a file.",
    )


def _failure(message: str, advice: str) -> JobFailure:
    return JobFailure(FailureCode.INVALID_DATASET, message, advice)
