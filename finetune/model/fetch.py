"""A hub model becomes a local folder, so that one path checks, hashes, loads and merges every base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from finetune.errors import DiskError, EnvironmentFault, ModelError, RecipeError
from finetune.files import disk_errors
from finetune.model.folder import Base, check, find_config
from finetune.model.stored import stored

_CONFIG = ["config.json"]
_WEIGHTS = ["*.safetensors"]
_WANTED = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "README.md"]
# The same weights once more in another layout, which some repositories carry beside those that transformers loads.
_NOT_WANTED = ["*/*", "consolidated*.safetensors"]
# The one folder of a repository that transformers reads beside what lies at its top.
_TEMPLATES = ["additional_chat_templates/*.jinja"]


def fetch(
    base: Base,
    revision: str | None,
    trust_remote_code: bool = False,
    weights: bool = True,
    quantization: str | None = None,
    method: str = "lora",
) -> Base:
    """`base` with a local folder: its own, or the hub cache's after a download.

    Args:
        base: from `finetune.model.folder.find`.
        revision: branch, tag or commit.
        trust_remote_code: also fetch the repository's Python files.
        weights: also fetch the weights; a look at the data needs none.
        quantization: what is to be made of the weights, model.quantization; of a hub's base the config is compared with
            it before anything larger is fetched. None where they are only looked at, or none are wanted.
        method: adapter.method, compared alike; "none" trains the base itself.

    Raises:
        EnvironmentFault: the hub cannot be reached and the cache does not hold the model, or a download broke off.
        DiskError: the cache cannot be written.
        RecipeError: a revision of a local folder.
        ModelError: no such model or revision, no access, the download is not whole, or its weights are stored in a
            format that does not go with `quantization` or `method`.
    """
    if base.folder is not None:
        if revision is not None:
            raise RecipeError(
                f"model.revision: does nothing for a local folder ({base.name}); remove it, or name a model of the hub"
            )
        return base
    folder = _download(base.name, revision, _CONFIG)
    commit = folder.name  # so that all of it is of one commit, and the hub is asked once what that is and holds
    if quantization is not None and (folder / _CONFIG[0]).is_file():
        stored(base.name, find_config(str(folder)).config, quantization, method)
    wanted = [*_WANTED, *(_WEIGHTS if weights else ()), *(("*.py",) if trust_remote_code else ())]
    _download(base.name, commit, _TEMPLATES)
    return check(base.name, _download(base.name, commit, wanted, _NOT_WANTED), weights)


def _download(name: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """The folder of a revision in the hub's cache, with the files whose paths fit `wanted` and not `unwanted`."""
    try:
        with disk_errors(Path(constants.HF_HUB_CACHE)):
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted) or None
                )
            )
    except LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        raise EnvironmentFault(
            f"model.name_or_path: {name} is not in the cache and {offline}; download it where there is a "
            "network, or name a local folder (a path that starts with ./ is never looked up)"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.name_or_path: cannot download {name}: {reason}; check the id, model.revision and HF_TOKEN"
        ) from error
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DiskError) else error  # a network's errors have numbers, too
        if not isinstance(cause, Exception) or not _broke_off(cause):
            raise
        raise EnvironmentFault(
            f"model.name_or_path: the download of {name} broke off ({type(cause).__name__}: {cause}); run the "
            "same command again, which continues it"
        ) from cause


def _broke_off(error: Exception) -> bool:
    """Whether the network failed: an error of Python's own, or of the HTTP client that this hub release is built on."""
    client = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.split(".")[0].startswith("httpx")}
    return isinstance(error, ConnectionError | TimeoutError) or "TransportError" in client
