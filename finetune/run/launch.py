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
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.errors import DiskError, ExitCode, FinetuneError, HardwareError, RecipeError
from finetune.files import write_json
from finetune.recipe.sections import LaunchOptions
from finetune.run.folder import read_json
from finetune.run.modes import by_accelerate, config_file, machines_of
from finetune.run.orphans import ADOPTER, adopted, adopting, end_adopted, workers_below

_REPORT = "FINETUNE_LAUNCH_REPORT"  # names the file in which a process of the run says why it failed
_STOPPED = "stopped on request while no process of the run trained; the same command begins the run, or goes on with it"


@dataclass(frozen=True)
class Launch:
    """A command that starts the processes of a run.

    Attributes:
        command: the words, ready for subprocess.
        environment: variables to add.
        patience: seconds in which its processes must have saved and ended once the launcher is gone.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    patience: float = 600.0

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
        RecipeError: the config file does not exist, or is for several machines.
        HardwareError: this is a process that should have been started with others, by such a command.
    """
    config = config_file(options.config or _config_name(device), configs)
    if (machines := machines_of(config)) > 1:
        raise RecipeError(
            f"launch.config: {config} is for {machines} machines, and this command starts the processes of one; start "
            "accelerate on each of them as docs/scaling.md says, or print a job file with `finetune launch-script`"
        )
    if is_launched():
        raise HardwareError(
            f"launch.config: {config} started one process that knows of no others, where {count} were asked for; its "
            "distributed_type must be MULTI_GPU, also on a CPU: see configs/accelerate"
        )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(count), "--main_process_port", str(free_port())]
    command += ["-m", "finetune.train", *arguments]
    threads = max(1, (os.cpu_count() or 1) // count)
    # Left to itself the launcher gives every process one thread; ACCELERATE_USE_CPU would switch off DeepSpeed.
    return Launch(tuple(command), {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}, options.timeout)


def count_to_start(options: LaunchOptions, devices: int) -> int:
    """How many processes the run has on this machine, this one being the first to ask; 1 where it is the run itself.

    Args:
        options: the launch section.
        devices: accelerators of this machine.

    Raises:
        HardwareError: accelerate's launcher has started this process alone, and the recipe asks for several.
    """
    if is_launched() or not by_accelerate(os.environ):
        return options.num_processes or devices
    if options.num_processes not in (None, 1):
        raise HardwareError(
            f"launch.num_processes: the recipe asks for {options.num_processes} processes and accelerate's launcher "
            f"started this one alone; give it --num_processes {options.num_processes} and a configuration with "
            "distributed_type: MULTI_GPU, also on a CPU, or start with `finetune train`"
        )
    return 1


def check_devices(processes: int, device: str, there: int) -> None:
    """Each process of a host must have a device of its own; a CPU is shared.

    Args:
        processes: how many there are on this host.
        device: torch device type.
        there: devices that this host shows.

    Raises:
        HardwareError: it has fewer.
    """
    if device != "cpu" and processes > there:
        raise HardwareError(
            f"launch.num_processes: {processes} processes on this host need as many {device} devices, and it shows "
            f"{there}; ask for {there}, or see what hides the others (CUDA_VISIBLE_DEVICES, the scheduler's request)"
        )


def is_launched() -> bool:
    """Whether a `finetune train` started the launcher of this process; that one shows the result."""
    return _REPORT in os.environ


@contextlib.contextmanager
def told_to_launcher() -> Iterator[None]:
    """Pass on why the block failed to the `finetune train` that started the launcher, which loses exit codes.

    The first process to fail is believed, but an error explained to the user before one that is not: when a process
    ends, the others break down over its silence, which for that is believed least of what is explained. A process that
    is told to stop says nothing: the launcher tells all that are left when one has failed.
    """
    try:
        yield
    except Exception as error:
        told = {"exit_code": ExitCode.FAILURE, "reason": f"{type(error).__name__}: {error}"}
        if isinstance(error, FinetuneError):
            told = {"exit_code": error.exit_code, "reason": str(error)}
        if path := os.environ.get(_REPORT):
            before = read_json(Path(path)).get("exit_code")
            if before is None or _weight(told["exit_code"]) > _weight(before):
                with contextlib.suppress(DiskError, OSError):  # the reason itself is raised all the same
                    write_json(Path(path), told)
        raise


def _weight(code: Any) -> int:
    """How much is known when a process ends with this exit code."""
    return {ExitCode.FAILURE: 0, ExitCode.HANG: 1, ExitCode.STOPPED: 1}.get(code, 2)


def tell_hang(reason: str) -> None:
    """Pass a verdict of the watchdog on; it knows better than what the other processes broke down over, but not better
    than an error that made one of them end."""
    if (path := os.environ.get(_REPORT)) and _weight(read_json(Path(path)).get("exit_code", ExitCode.FAILURE)) < 2:
        write_json(Path(path), {"exit_code": ExitCode.HANG, "reason": reason})


def follow(launch: Launch) -> tuple[int, dict[str, Any]]:
    """Run the launcher, passing SIGINT, SIGTERM and SIGUSR1 on to all its processes.

    Returns:
        The launcher's exit code; and of a run that failed `exit_code` and `reason`, empty when no process told them.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-launch-") as place, adopting():
        report = Path(place) / "ended.json"
        own = {_REPORT: str(report), ADOPTER: str(os.getpid())}
        code, asked = _run(launch, {**os.environ, **launch.environment, **own})
        told = read_json(report)
    return code, ({"exit_code": ExitCode.STOPPED, "reason": _STOPPED} if asked and code and not told else told)


def _run(launch: Launch, environment: dict[str, str]) -> tuple[int, bool]:
    """Run the launcher to its end; its exit code, and whether a signal asked for that."""
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            _tell(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(launch.command, env=environment, start_new_session=True, preexec_fn=_die_with_parent)
        if received:  # while it was being started
            _tell(process.pid, received[0])
        code = process.wait()
        end_adopted(launch.patience)
        return code, bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _tell(launcher: int, number: int) -> None:
    """Send a signal to the workers, not to the launcher, which would kill them before they could save; one that has not
    started any is ended, since it would start them yet."""
    workers = [*workers_below(launcher), *adopted(launcher)]
    for pid, sent in [(pid, number) for pid in workers] or [(launcher, signal.SIGTERM)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sent)


def _die_with_parent() -> None:
    """Linux: the launcher gets SIGTERM when this process dies, however it dies, so that no worker outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _config_name(device: str) -> str:
    return "cpu" if device == "cpu" else "ddp"
