"""Training under FSDP2 on a CPU, for tests of its logic: accelerate can select it on accelerators only.

accelerate 1.15 turns several CPU processes into MULTI_CPU, under which it ignores FSDP. Here such a process is called
MULTI_XPU, under which it does not; the device stays the CPU and the backend gloo.
"""

from __future__ import annotations

import os
from typing import Any


def main(argv: list[str]) -> int:
    """`python -m finetune.train` under that disguise."""
    from accelerate.state import DistributedType, PartialState

    from finetune.run import fsdp
    from finetune.train import main as train

    original = PartialState.__init__

    def disguised(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = disguised
    fsdp.WITHOUT_FSDP = ()
    return train(argv)
