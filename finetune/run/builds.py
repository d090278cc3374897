"""What DeepSpeed compiles while it runs: leftovers that would hang it, and tools that it needs.

torch compiles extensions below TORCH_EXTENSIONS_DIR under a file called `lock`. A process that is killed meanwhile
leaves it behind, and every later one waits for it for ever, without a word.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from finetune.errors import EnvironmentFault

# Seconds. The process that has just made a lock may not have started its compiler yet, and one of another host that
# shares the folder cannot be seen; no extension takes that long to compile.
YOUNG = 600.0
SWEEP = 1.0  # seconds between two looks for stale locks
_INSTEAD = "write \"zero_force_ds_cpu_optimizer\": false in DeepSpeed's configuration, for which torch's is taken"


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
    busy = _working_folders() | _open_files() if locks else set()
    removed = []
    for path in locks:
        try:
            if not busy & {path.resolve(), path.parent.resolve()} and time.time() - path.stat().st_mtime > YOUNG:
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
    from torch.utils.cpp_extension import JIT_EXTENSION_VERSIONER

    refuse_missing_tools()
    done = threading.Event()
    # The lock that torch waits for may be another job's, and that job may be killed at any time.
    threading.Thread(target=_sweep, args=(folder, done), daemon=True).start()
    builder = CPUAdamBuilder()
    try:
        _wait_for_others(folder)
        try:
            builder.load()
        except ImportError:  # whoever compiled while this process waited left nothing behind
            JIT_EXTENSION_VERSIONER.entries.pop(builder.name, None)  # else torch takes it for compiled
            _wait_for_others(folder)
            builder.load()
    except (RuntimeError, OSError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EnvironmentFault(
            f"DeepSpeed's optimizer for the CPU cannot be compiled ({reason}); {_INSTEAD}"
        ) from error
    finally:
        done.set()


def _wait_for_others(folder: Path) -> None:
    """Wait until nobody compiles the optimizer."""
    while any(lock for place in ("", "*/") for lock in folder.glob(f"{place}cpu_adam/lock")):
        time.sleep(SWEEP)


def _sweep(folder: Path, done: threading.Event) -> None:
    """Remove stale locks until the event is set."""
    remove_stale_locks(folder)
    while not done.wait(SWEEP):
        remove_stale_locks(folder)


def refuse_missing_tools() -> None:
    """Refuse to start where DeepSpeed's optimizer for CPUs cannot be compiled.

    Raises:
        EnvironmentFault: with what is missing.
    """
    if missing := missing_tools():
        raise EnvironmentFault(
            f"DeepSpeed compiles its optimizer for the CPU, and {' and '.join(missing)} cannot be found; install that, "
            f"or {_INSTEAD}"
        )


def _working_folders() -> set[Path]:
    """The working folders of all processes of this user that can be read."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found.add(Path(os.readlink(place / "cwd")).resolve())
        except OSError:
            continue
    return found


def _open_files() -> set[Path]:
    """The files that this process has open: torch keeps its own lock so, and misses it when it is gone."""
    found = set()
    for place in Path("/proc/self/fd").glob("*"):
        try:
            found.add(Path(os.readlink(place)))
        except OSError:
            continue
    return found


def missing_tools() -> list[str]:
    """What is not there of what compiling needs, in words."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = [] if shutil.which("ninja") else ["ninja"]
    return found if any(one and shutil.which(one) for one in compilers) else [*found, "a C++ compiler"]
