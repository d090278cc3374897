"""What DeepSpeed compiles while it runs: leftovers that would hang it, and tools that it needs.

torch compiles extensions below TORCH_EXTENSIONS_DIR under a file called `lock`. A process that is killed meanwhile
leaves it behind, and every later one waits for it for ever, without a word.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from finetune.errors import EnvironmentFault

# Seconds. The process that has just made a lock may not have started its compiler yet, and one of another host that
# shares the folder cannot be seen; no extension takes that long to compile.
YOUNG = 600.0


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch compiles extensions."""
    if given := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "torch_extensions"


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove locks below which nobody compiles; those removed.

    Args:
        folder: from `extensions_folder`. Compilers run in the folder that their lock lies in.
    """
    places = ("*", "*/*")  # under TORCH_EXTENSIONS_DIR there is no folder for each version of Python and CUDA
    locks = [path for name in ("lock", ".ninja_lock") for place in places for path in folder.glob(f"{place}/{name}")]
    busy = _working_folders() if locks else set()
    removed = []
    for path in locks:
        try:
            if path.parent.resolve() not in busy and time.time() - path.stat().st_mtime > YOUNG:
                path.unlink()
                removed.append(path)
        except OSError:  # its owner was quicker
            continue
    return removed


def compile_optimizer(folder: Path) -> None:
    """Have DeepSpeed's optimizer for CPUs compiled below `folder`, a matter of minutes, where it is not yet.

    DeepSpeed does so by itself, but while all processes wait in the first operation of all, which gives up, and behind
    a lock that it waits for without end, were it left by a process that was killed just before.

    Args:
        folder: from `extensions_folder`.

    Raises:
        EnvironmentFault: it cannot be compiled.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    while any(folder.glob(f"{place}cpu_adam/lock") for place in ("", "*/")):
        remove_stale_locks(folder)
        time.sleep(1.0)
    try:
        CPUAdamBuilder().load()
    except (RuntimeError, OSError, ImportError) as error:
        raise EnvironmentFault(
            f"DeepSpeed's optimizer for the CPU cannot be compiled ({str(error).splitlines()[0]}); write "
            "\"zero_force_ds_cpu_optimizer\": false in DeepSpeed's configuration, for which torch's is taken"
        ) from error


def _working_folders() -> set[Path]:
    """The working folders of all processes of this user that can be read."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found.add(Path(os.readlink(place / "cwd")).resolve())
        except OSError:
            continue
    return found


def missing_tools() -> list[str]:
    """What is not there of what compiling needs, in words."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = [] if shutil.which("ninja") else ["ninja"]
    return found if any(one and shutil.which(one) for one in compilers) else [*found, "a C++ compiler"]
