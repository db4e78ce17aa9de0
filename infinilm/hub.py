"""Hub ids: a model called `org/name` becomes a folder of huggingface_hub's cache, downloaded where it is not there.

The environment of `huggingface_hub` counts as it stands: `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`,
`HF_TOKEN`. Without a Hub id the package is not even imported. What is fetched is data: weights, configs, tokenizers and
chat templates, never code. A repository in another format than these is for a plugin that opens a URL of its own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infinilm_hookspecs import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_TEXT = ("*.json", "*.txt", "*.model", "*.tiktoken")
_SAFETENSORS = ("*.safetensors",)
_PICKLES = ("pytorch_model*.bin",)
# Patterns cross folders: "*.json" means "onnx/config.json" too.
_UNWANTED = (*(f"*/{name}" for name in (*_TEXT, *_SAFETENSORS, *_PICKLES)), "consolidated*.safetensors")


def resolve(model: str, revision: str | None = None, *, with_weights: bool = True) -> str:
    """Return the folder of `model`, a path or a Hub id; a URL is returned as it is, for a plugin to open.

    A path that exists is itself. Of a Hub id, `revision` is a branch, a tag or a commit. Raises `CheckpointError`
    saying what to do when there is no such folder or model, it may not be read, or it cannot be reached.
    """
    is_here = "://" in model or os.path.exists(model)
    if is_here and revision is not None:
        raise CheckpointError(f"revision {revision!r} is for a model of the Hub, and {model!r} is none")
    if is_here:
        return model
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} does not exist, and a Hub id would read 'org/name'")
    if not with_weights:
        return _download(model, revision, _TEXT)
    folder = _download(model, revision, (*_TEXT, *_SAFETENSORS))
    if any(Path(folder).glob("*.safetensors")):
        return folder
    commit = Path(folder).name  # the branch may move between the two
    return _download(model, commit, (*_TEXT, *_PICKLES))


def _download(hub_id: str, revision: str | None, patterns: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class NoBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
        """What progress is drawn with where nobody looks."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    try:
        return snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=[*patterns, "*.jinja"],
            ignore_patterns=list(_UNWANTED),
            tqdm_class=None if sys.stderr.isatty() else NoBar,
        )
    except Exception as err:  # those of whatever HTTP library huggingface_hub is built on, too
        raise CheckpointError(_explain(err, hub_id, revision)) from err


def _explain(err: Exception, hub_id: str, revision: str | None) -> str:
    """Return in one line what kept a model from being downloaded, and what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    what = f"{hub_id!r} (revision {revision or constants.DEFAULT_REVISION!r})"
    with_token = "with a token that may: run 'hf auth login', or set HF_TOKEN"
    if isinstance(err, errors.HFValidationError):
        return f"{hub_id!r} does not exist, and is no Hub id: {_first_line(err)}"
    if constants.HF_HUB_OFFLINE:
        missing = " whole" if hasattr(err, "snapshot_path") else ""
        return (
            f"{what} is no folder here and not{missing} in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
            "forbids a download; unset it, or give a folder"
        )
    if isinstance(err, errors.GatedRepoError):
        return f"{what} is gated: ask for access at {hub}/{hub_id}, then come {with_token}"
    if isinstance(err, errors.RepositoryNotFoundError):
        return f"{what} is no folder here and no model of {hub}, or a private one: check the name, or come {with_token}"
    if isinstance(err, errors.RevisionNotFoundError):
        return f"{hub_id!r} has no revision {revision!r}: a branch, a tag or a commit of {hub}/{hub_id} is wanted"
    cause = err.__cause__ if isinstance(err, errors.LocalEntryNotFoundError) and err.__cause__ else err
    return (
        f"{what} is no folder here and cannot be downloaded from {hub}: {type(cause).__name__}: {_first_line(cause)}; "
        "check the network and HF_ENDPOINT, or give a folder"
    )


def _first_line(err: BaseException) -> str:
    return next((line.strip() for line in str(err).splitlines() if line.strip()), "no reason given")
