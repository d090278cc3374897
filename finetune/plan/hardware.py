"""What this machine computes with, and the precision that suits it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from finetune.errors import HardwareError


@dataclass(frozen=True)
class Hardware:
    """The devices one process can use.

    Attributes:
        device: torch device type: "cpu", "cuda", "xpu", "mps".
        count: how many such devices are visible (1 on a CPU).
        name: the device's own name.
        memory_bytes: memory of one device; of the machine on a CPU.
        bf16: whether bfloat16 products run in hardware, so that they are faster than float32 ones.
        threads: CPU threads torch computes with.
    """

    device: str
    count: int
    name: str
    memory_bytes: int
    bf16: bool
    threads: int

    def facts(self) -> dict[str, Any]:
        """As plain data, for the run's record."""
        return asdict(self)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("flags"):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu() -> Hardware:
    """The CPU as a training device; AMX is what makes bfloat16 worth while there."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", 1, _cpu_name(), memory, "amx_bf16" in _cpu_flags(), torch.get_num_threads())


def accelerator() -> Hardware | None:
    """The accelerator torch sees, or None."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Hardware(
            "cuda",
            torch.cuda.device_count(),
            properties.name,
            properties.total_memory,
            torch.cuda.is_bf16_supported(including_emulation=False),
            torch.get_num_threads(),
        )
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        properties = torch.xpu.get_device_properties(0)
        count = torch.xpu.device_count()
        return Hardware("xpu", count, properties.name, properties.total_memory, True, torch.get_num_threads())
    if torch.backends.mps.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware("mps", 1, platform.processor(), memory, False, torch.get_num_threads())
    return None


def detect(device: str = "auto") -> Hardware:
    """The hardware for `launch.device`.

    Args:
        device: "auto", "cpu" or "accelerator".

    Raises:
        HardwareError: an accelerator was insisted on and none is visible.
    """
    if device == "cpu":
        return cpu()
    found = accelerator()
    if found is None and device == "accelerator":
        raise HardwareError(
            "launch.device: accelerator was asked for, and torch sees none; check the driver and CUDA_VISIBLE_DEVICES, "
            "or set launch.device=cpu"
        )
    return found or cpu()


def memory_left() -> int | None:
    """Bytes of the host's memory that processes can still take, swap included; None where the system does not tell.

    The smallest of what Linux takes to be available and what the limits of this process's control groups (version 2)
    leave. What the system can drop, as pages of files, counts as left.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        free, swap = 1024 * kib["MemAvailable"], 1024 * kib["SwapFree"]
        path = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, KeyError, ValueError, IndexError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup", path.lstrip("/"))
    return min([free + swap, *_left_in_groups([group, *group.parents], swap)])


def _left_in_groups(folders: Sequence[Path], swap: int) -> Iterator[int]:
    """What each group with a limit leaves.

    Args:
        folders: of control groups; one that has no such files is passed over.
        swap: bytes of swap that the system has left.
    """
    for folder in folders:
        try:
            limit = int((folder / "memory.max").read_text())  # "max" where there is none
            used = int((folder / "memory.current").read_text())
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            most = (folder / "memory.swap.max").read_text().strip()
        except (OSError, ValueError):
            continue
        droppable = int(facts.get("active_file", 0)) + int(facts.get("inactive_file", 0))
        yield limit - used + droppable + (min(swap, int(most)) if most.isdigit() else swap)


def compute_dtype(dtype: str, hardware: Hardware) -> str:
    """The precision of matrix products: `dtype` if named, else the fastest the hardware has.

    `auto` is bfloat16 where the hardware multiplies it, float16 on older CUDA devices, else float32.
    """
    if dtype != "auto":
        return dtype
    if hardware.bf16:
        return "bfloat16"
    return "float16" if hardware.device == "cuda" else "float32"
