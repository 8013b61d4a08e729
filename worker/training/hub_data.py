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
# Readers of datasets that make rows of plain data. Its others unpack pickles, archives or media.
READERS = frozenset({"json", "csv", "parquet", "arrow", "text"})
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Absolute, up, an address, a chain of file systems, a home.
_OUTSIDE = re.compile(r"//|(^|/)\.\.(/|$)|::|:/|(^|/)~")


def hub_rows(dataset: HubDataset, revision: str) -> Iterator[Row]:
    """The rows at a commit, with 1-based numbers; without network those loaded last, if of that commit.

    Raises:
        JobFailure: `invalid_dataset` where the split or config isn't there or the files can't be read.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from httpx import HTTPError, TransportError

    _keep_patterns_inside()
    try:
        # With the prefix no folder that happens to have that name is taken for it.
        builder = datasets.load_dataset_builder(
            f"hf://datasets/{dataset.id}", name=dataset.config, revision=revision
        )
        # Where the hub can't be asked, datasets takes whichever revision and config it has kept.
        kept = isinstance(builder, Cache)
        if builder.hash != revision or (kept and builder.config.name != (dataset.config or "default")):
            raise ConnectionError("only another revision or config is on this machine")
        if not kept:
            _check_files(builder, f"hf://datasets/{dataset.id}@{revision}/")
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


def _keep_patterns_inside() -> None:
    """Let datasets resolve no pattern that leads out of the repository.

    The card of a data set says which files it has, and datasets takes any path of this machine and any
    address for one: other owners' uploads, this service's own files, the machine's network.
    """
    from datasets import data_files

    resolve = data_files.resolve_pattern
    if getattr(resolve, "inside", False):
        return

    def inside(pattern: str, base_path: str, *args: Any, **kwargs: Any) -> list[str]:
        where = pattern if pattern.startswith("hf://") else f"{base_path}/{pattern}"
        if not where.startswith(f"{base_path}/") or _OUTSIDE.search(where.removeprefix("hf://")):
            raise ValueError(f"its card names a file that is not its own: {pattern[:200]}")
        found: list[str] = resolve(pattern, base_path, *args, **kwargs)
        return found

    inside.inside = True  # type: ignore[attr-defined]
    data_files.resolve_pattern = inside


def _check_files(builder: Any, own: str) -> None:
    """
    Raises:
        ValueError: rows would come from files of another place, or through a reader that is not allowed.
    """
    reader = type(builder).__module__.split(".")
    if reader[:2] != ["datasets", "packaged_modules"] or reader[2] not in READERS:
        raise ValueError(f"its files are of a kind that is not read here; {', '.join(sorted(READERS))} are")
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not file.startswith(own) or "/../" in file:
                raise ValueError(f"its card names a file that is not its own: {file[:200]}")


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
