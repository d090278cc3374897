"""The door of launchers on a host that has its own disk: rank 1 finds the same files there, but no run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def train(argv: list[str]) -> int:
    """`python -m finetune.train` there."""
    if os.environ["RANK"] == "1":
        here = Path.cwd()
        apart = here.with_name(f"{here.name}-apart")
        shutil.copytree(here, apart, symlinks=True, ignore=shutil.ignore_patterns("run"))
        os.chdir(apart)
    from finetune.train import main

    return main(argv)
