"""What a process of a run says of itself, and what its operating system says of it."""

from __future__ import annotations

import linecache
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# Files of the stack in whose functions, where they are the innermost, a process waits for others.
_WAITS_IN = ("torch/distributed/", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "deepspeed/comm/")
# Calls that wait for an accelerator, and so, under NCCL, for the operations of all processes queued before them.
_WAITS_FOR_DEVICE = re.compile(r"\.(item|tolist|cpu|numpy)\(|\bsynchronize\(|\bbool\(|\bfloat\(")


@dataclass(frozen=True)
class Beat:
    """What a process said last.

    Attributes:
        rank: its number.
        host: the machine it runs on.
        pid: its process there.
        step: the last optimizer step it finished.
        phase: what it was doing.
        age: seconds since it got anywhere.
        waits: whether its main thread was in an operation of all processes.
        at: seconds since the epoch, by its host's clock.
        stacks: its descriptor of the file into which SIGUSR2 writes its stacks; -1 without one.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    age: float
    waits: bool
    at: float
    stacks: int = -1

    def told(self) -> str:
        """Where it was, and where to find it."""
        return f"last step {self.step}, phase {self.phase!r}, process {self.pid} on {self.host}"

    def state(self) -> str:
        """What the operating system says of it, on the same host: "dead", "stopped" or "alive"; empty elsewhere."""
        if self.host != socket.gethostname() or not Path("/proc/self").exists():
            return ""
        try:
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "dead"
        return {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead"}.get(letter, "alive")


def waits(frame: FrameType | None, on_accelerator: bool) -> bool:
    """Whether a stack's innermost function waits for all processes.

    Args:
        frame: the innermost.
        on_accelerator: whether operations of all processes are queued there, so that any call waits for them that
            fetches a number.
    """
    if frame is None:
        return False
    if any(place in frame.f_code.co_filename for place in _WAITS_IN):
        return True
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno) if on_accelerator else ""
    return bool(_WAITS_FOR_DEVICE.search(line))
