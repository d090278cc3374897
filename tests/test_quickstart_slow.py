"""The quickstart with its real base: trained, scored before and after, merged, scored again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BASE = "data/smollm2-135m-instruct"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_learns_its_task_and_merges(root: Path, tmp_path: Path) -> None:
    assert (root / BASE / "config.json").is_file(), f"{BASE} is not there; `finetune base smollm2` makes it"
    (tmp_path / "data").symlink_to(root / "data")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}

    def finetune(*words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "finetune", *words, "--json"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    finetune("train", str(root / "recipes/quickstart.yaml"))
    evaluated = finetune("evaluate", "runs/quickstart")
    assert evaluated["rows"] >= 100
    assert evaluated["scores"]["base"]["exact_match"] <= 0.05
    assert evaluated["scores"]["adapter"]["exact_match"] >= 0.90
    merged = finetune("merge", "runs/quickstart")
    assert merged["proved"] is True
    scores = finetune("evaluate", "runs/quickstart/merged")["scores"]
    assert scores["merged"]["exact_match"] >= 0.90
