"""What leaves this machine: nothing by itself. Telemetry off, and secrets masked in what is handed on.

Every process of finetune calls `no_telemetry` before it imports a library that might report its use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

MASK = "***"

_OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_ERROR_REPORTING": "false",
}

# `max_new_tokens` and `pad_token` are no secrets; `hub_token` and `api_key` are. So a name counts by its last words.
_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:secret|secrets|password|passwd|credential|credentials|(?:api|access|private|secret)[_-]?key)$"
    r"|^(?:token|(?:hub|hf|auth|access|api|write|read|bearer|push_to_hub|refresh|session)[_-]token)$"
    r"|_TOKEN$"
)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}")
_SHORTEST_SECRET = 8  # characters; masking shorter values would mask ordinary words


def no_telemetry(environment: MutableMapping[str, str] | None = None) -> None:
    """Switch off the telemetry of the libraries below us, for this process and those it starts."""
    (os.environ if environment is None else environment).update(_OFF)


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    if name.isupper():
        return bool(_SECRET_NAME.search(name) or _SECRET_NAME.search(name.lower()))
    return bool(_SECRET_NAME.search(name.lower()))


def environment_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """The values of secret environment variables, longest first."""
    variables = os.environ if environment is None else environment
    found = {value for name, value in variables.items() if is_secret_name(name) and len(value) >= _SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)


def mask_text(text: str, secrets: list[str] | None = None) -> str:
    """`text` without the given secrets (by default those of the environment) and without well-known token forms."""
    for secret in environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, MASK)
    return _SECRET_VALUE.sub(MASK, text)


def mask(value: Any, secrets: list[str] | None = None) -> Any:
    """A copy of plain data (dicts, lists, strings, numbers) with every secret masked, by key and by value."""
    known = environment_secrets() if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            key: MASK if isinstance(key, str) and is_secret_name(key) and item is not None else mask(item, known)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask(item, known) for item in value]
    return mask_text(value, known) if isinstance(value, str) else value
