"""run.json: what a run was made of, so that it can be understood and repeated."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import DataError, ModelError
from finetune.files import sha256
from finetune.privacy import mask_text
from finetune.run.folder import now
from finetune.run.pulse import machine

STACK = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes",
    "deepspeed",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, of the stack and of finetune; packages that are not installed are left out."""
    from finetune import __version__

    found = {"python": platform.python_version(), "finetune": __version__}
    for name in STACK:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def base_hashes(
    weights: tuple[Path, ...],
    folder: Path | None,
    known: Callable[[Sequence[Path]], list[str]] | None = None,
    code: bool = False,
) -> dict[str, str]:
    """SHA-256 of the base's weight, config and tokenizer files, by name; empty for a model of the hub.

    Args:
        weights: the base's weight files.
        folder: its local folder.
        known: hashes files, and may remember those that have not changed; None reads each of them once a process.
        code: also of its Python files, which model.trust_remote_code runs.

    Raises:
        ModelError: a file cannot be read, or changes while it is.
    """
    if folder is None:
        return {}
    small = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    scripts = sorted(folder.glob("*.py")) if code else []  # transformers takes none from the folders below
    there = [path for path in (*weights, *small, *scripts) if path.is_file()]
    if known is None:
        states = [(path, path.stat()) for path in there]
        return {path.name: _hash(path, state.st_size, state.st_mtime_ns, state.st_ino) for path, state in states}
    try:
        return dict(zip((path.name for path in there), known(there), strict=True))
    except DataError as error:
        raise ModelError(f"the base model: {error}") from error


@cache
def _hash(path: Path, *state: int) -> str:
    """Of one state of a file: a process reads a base once, however often it is asked for its hashes."""
    return sha256(path)


def git_state() -> dict[str, Any]:
    """Commit and cleanliness of the checkout the command runs in; empty outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "clean": not _git("status", "--porcelain", "--untracked-files=no")}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def command_line() -> str:
    """The command as it was typed, with the values of secret environment variables masked."""
    path = Path(sys.argv[0])
    words = ["python", "-m", f"finetune.{path.stem}"] if path.suffix == ".py" else [path.name]
    if path.name == "__main__.py":
        words = ["python", "-m", "finetune"]
    return mask_text(shlex.join([*words, *sys.argv[1:]]))


def this_process() -> dict[str, Any]:
    """When, where and by what command this process was started."""
    return {
        "created": now(),
        "command": command_line(),
        "working_folder": os.getcwd(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": machine(),
        "versions": versions(),
        "git": git_state(),
    }
