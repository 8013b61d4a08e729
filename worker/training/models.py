"""From a model id to a folder with its config, tokenizer and safetensors weights on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import JobFailure
from shared.events import Control
from shared.lifecycle import FailureCode
from shared.models import PICKLE_SUFFIXES
from shared.spec import BUNDLED_MODEL, LOCAL_PREFIX, JobSpec
from worker.training.bundled import BUNDLED_LICENSE, bundled_model
from worker.training.workdir import Workdir

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "README.md"]
WEIGHT_FILES = ["*.safetensors"]
# The same weights once more, in the layout of their first publisher. And what would make transformers load
# another model, whichever an adapter's config names, and this one on top of it.
LEFT_THERE = ["consolidated*", "original/*", "adapter_*"]
INDEX = "model.safetensors.index.json"
HUB_TIMEOUT_SECONDS = 15.0


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine.

    `path` holds config and tokenizer, and the weights once `complete`; a hub model's come with
    `fetch_weights`. `revision` is the hub commit (None for others), `license` what the model says of itself.
    """

    id: str
    path: Path
    revision: str | None = None
    license: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for, where its config says so."""
        length = self.config.get("max_position_embeddings")
        return length if isinstance(length, int) else None


def resolve_model(spec: JobSpec, workdir: Workdir, control: Control) -> ResolvedModel:
    """Find the model and bring its config and tokenizer here; the weights of a hub model come later.

    Raises:
        JobFailure: `model_unavailable`: unknown, not reachable, gated, without safetensors weights.
    """
    if spec.model == BUNDLED_MODEL:
        path = bundled_model(workdir.cache, control)
        return ResolvedModel(spec.model, path, license=BUNDLED_LICENSE, config=_config(spec.model, path))
    if spec.model.startswith(LOCAL_PREFIX):
        if workdir.model_dir is None:
            unavailable(
                f"There is no local model {spec.model} on this worker.", "GET /models lists those there are."
            )
        return _local_model(spec.model, workdir.model_dir)
    return _hub_model(spec)


def fetch_weights(model: ResolvedModel) -> None:
    """Bring a hub model's safetensors here; others have theirs already.

    Raises:
        JobFailure: `model_unavailable`.
    """
    if not model.complete and model.revision is not None:
        _download(model.id, model.revision, WEIGHT_FILES)


def load_tokenizer(model: ResolvedModel) -> Any:
    """The model's own tokenizer, a fast one.

    Raises:
        JobFailure: `model_unavailable`: it has none that can be read.
    """
    import transformers

    advice = "Choose a model that has a tokenizer.json."
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        unavailable(f"The tokenizer of {model.id} can't be read: {error}", advice, error)
    if not tokenizer.is_fast:
        unavailable(f"{model.id} has no fast tokenizer.", advice)
    return tokenizer


def settle_tokenizer(tokenizer: Any, chat_template: str, stop_token: str | None) -> None:
    """Make the tokenizer that is exported render, and end a turn, as it was trained.

    Args:
        stop_token: the token that ends an assistant's turn; None leaves the tokenizer's own.
    """
    tokenizer.chat_template = chat_template
    if stop_token is not None:
        tokenizer.eos_token = stop_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def unavailable(message: str, advice: str, cause: BaseException | None = None) -> NoReturn:
    """Fail the job because of its model."""
    raise JobFailure(FailureCode.MODEL_UNAVAILABLE, message, advice) from cause


def _local_model(model_id: str, path: Path) -> ResolvedModel:
    config = _config(model_id, path)
    if not any(path.glob("*.safetensors")):
        if any(f.suffix in PICKLE_SUFFIXES for f in path.iterdir()):
            unavailable(
                f"{model_id} has its weights as pickle files, which can run code when they are loaded.",
                "Convert the model to safetensors.",
            )
        unavailable(f"{model_id} holds no *.safetensors file.", "Put the model's safetensors files there.")
    return ResolvedModel(model_id, path, license=_stated_license(path), config=config)


def _hub_model(spec: JobSpec) -> ResolvedModel:
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = huggingface_hub.HfApi().model_info(
            spec.model, revision=spec.model_revision, timeout=HUB_TIMEOUT_SECONDS
        )
    except (OfflineModeIsEnabled, httpx.TransportError) as error:
        return _cached_model(spec, error)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        _explain_hub(spec.model, error)
    names = [file.rfilename for file in info.siblings or ()]
    if not any(name.endswith(".safetensors") for name in names):
        unavailable(f"{spec.model} has no safetensors weights on the hub.", "Choose a model that has them.")
    # By its name, so that the name is remembered for a time without network; the commit is the snapshot's.
    path = _download(spec.model, spec.model_revision, SMALL_FILES)
    _check_index(spec.model, path)
    stated = info.card_data.get("license") if info.card_data else None
    return ResolvedModel(
        spec.model,
        path,
        revision=path.name,
        license=str(stated) if stated else None,
        config=_config(spec.model, path),
        complete=False,
    )


def _cached_model(spec: JobSpec, error: Exception) -> ResolvedModel:
    """A hub model that was downloaded before, for a box that has no network now."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(
            huggingface_hub.snapshot_download(
                spec.model,
                revision=spec.model_revision,
                # What else the repository holds was left there.
                allow_patterns=[*SMALL_FILES, *WEIGHT_FILES],
                ignore_patterns=LEFT_THERE,
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        _explain_hub(spec.model, error)
    if not _has_weights(path):
        _explain_hub(spec.model, error)
    _check_index(spec.model, path)
    return ResolvedModel(
        spec.model, path, revision=path.name, license=_stated_license(path), config=_config(spec.model, path)
    )


def _has_weights(path: Path) -> bool:
    """Whether all safetensors are there: a download may have been broken off between two of them."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        return all((path / name).is_file() for name in index["weight_map"].values())
    except FileNotFoundError:
        return any(path.glob("*.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError):
        return False


def _check_index(model_id: str, path: Path) -> None:
    """A model's weights are files of its own: an index may name any path of this machine."""
    try:
        files = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        inside = all(Path(file).name == file for file in files)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, AttributeError, TypeError):
        inside = False
    if not inside:
        unavailable(f"{INDEX} of {model_id} names no files of the model.", "Choose a complete model.")


def _download(model_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Download these files of a revision; returns the snapshot's folder, which is named for its commit."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=LEFT_THERE,
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        _explain_hub(model_id, error)


def _explain_hub(model_id: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        unavailable(
            f"{model_id} is gated on the hub.",
            "Accept its terms on huggingface.co and give the worker that account's token as HF_TOKEN.",
            error,
        )
    if isinstance(error, RepositoryNotFoundError):
        unavailable(
            f"There is no model {model_id} on the hub, or it is private.",
            "Check the id; for a private one give the worker its owner's token as HF_TOKEN.",
            error,
        )
    if isinstance(error, RevisionNotFoundError):
        unavailable(f"{model_id} has no such revision on the hub.", "Check model_revision.", error)
    unavailable(
        f"The hub could not be reached for {model_id}: {type(error).__name__}.",
        "Give the worker access to huggingface.co, put the model under the server's models folder and name "
        f"it local/NAME, or use {BUNDLED_MODEL}, which needs no network.",
        error,
    )


def _config(model_id: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        unavailable(
            f"The config.json of {model_id} can't be read: {error}", "Choose a complete model.", error
        )
    if not isinstance(config, dict):
        unavailable(f"The config.json of {model_id} is no JSON object.", "Choose a complete model.")
    return config


def _stated_license(path: Path) -> str | None:
    """The `license:` line of a model card's front matter."""
    card = path / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("'\"") or None
    return None
