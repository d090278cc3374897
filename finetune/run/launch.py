"""How a recipe is started: in this process, or by accelerate's launcher over several."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from finetune.errors import RecipeError
from finetune.recipe.sections import LaunchOptions


@dataclass(frozen=True)
class Launch:
    """A command that starts the processes of a run.

    Attributes:
        command: the words, ready for subprocess.
        environment: variables to add.
    """

    command: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        """The command as one would type it."""
        return shlex.join(["python", *self.command[1:]])


def free_port() -> int:
    """A TCP port nobody listens on, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def plan_launch(options: LaunchOptions, count: int, device: str, configs: Path, arguments: list[str]) -> Launch:
    """The command for `count` processes on this machine.

    Args:
        options: the launch section.
        count: processes to start.
        device: torch device type.
        configs: the folder of shipped configurations.
        arguments: what `python -m finetune.train` is given.

    Raises:
        RecipeError: the config file does not exist.
    """
    config = Path(options.config) if options.config else configs / "accelerate" / _config_name(device)
    if not config.is_file():
        raise RecipeError(f"launch.config: {config} does not exist")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(count), "--main_process_port", str(free_port())]
    command += ["-m", "finetune.train", *arguments]
    threads = max(1, (os.cpu_count() or 1) // count)
    # Left to itself the launcher gives every process one thread; ACCELERATE_USE_CPU would switch off DeepSpeed.
    return Launch(tuple(command), {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))})


def follow(launch: Launch) -> int:
    """Run the launcher, pass SIGINT, SIGTERM and SIGUSR1 on to all its processes, and return its exit code."""
    process = subprocess.Popen(
        launch.command, env={**os.environ, **launch.environment}, start_new_session=True, preexec_fn=_die_with_parent
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in _descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """Linux: the launcher gets SIGTERM when this process dies, however it dies, so that no worker outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _descendants(pid: int) -> list[int]:
    """The workers below the launcher. The launcher itself is left alone: it would kill them before they could save."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


def _config_name(device: str) -> str:
    return "cpu.yaml" if device == "cpu" else "ddp.yaml"
