"""The quickstart's real base and task in each way to adapt it: as good as plain LoRA, and merged to the same answers.

The table is printed (pytest -s shows it); with FINETUNE_ADAPTERS=write it is what docs/adapters.md tells.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BASE = "data/smollm2-135m-instruct"
MEASURED = Path(__file__).resolve().parent.parent / "docs" / "adapters.json"
WITHIN = 0.05  # exact match of any two ways, and of an adapter and its merge
# rsLoRA scales by lora_alpha / sqrt(r): at r = 32 by 2.8, near the 2 of the others.
VARIANTS: dict[str, tuple[str, ...]] = {
    "LoRA": (),
    "rsLoRA": ("adapter.use_rslora=true", "adapter.r=32", "adapter.lora_alpha=16"),
    "DoRA": ("adapter.method=dora",),
    "QLoRA NF4": ("model.quantization=nf4",),
    "int8": ("model.quantization=int8",),
}


def finetune(folder: Path, *words: str) -> tuple[Any, float]:
    """What a command says with --json, and the most memory that it had in use, MB."""
    # Two threads beside other work wait for each other more than they compute; one has its core to itself.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        command = [sys.executable, "-m", "finetune", *words, "--json"]
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        assert child.returncode == 0, f"{' '.join(words)}\n{out.read()}\n{err.read()}"
        return json.load(out), usage.ru_maxrss / 1024


def measured(root: Path, folder: Path, name: str, less: Sequence[str] = ()) -> dict[str, float]:
    """Train, score, merge and score again.

    Args:
        root: the repository.
        folder: to work in.
        name: one of VARIANTS.
        less: overrides that make less of it, for a rehearsal of this test.
    """
    (folder / "data").symlink_to(root / "data")
    recipe = str(root / "recipes/quickstart.yaml")
    trained, peak = finetune(folder, "train", recipe, *VARIANTS[name], *less, "output_dir=run")
    scored, _ = finetune(folder, "evaluate", "run")
    merged, _ = finetune(folder, "merge", "run")
    after, _ = finetune(folder, "evaluate", "run/merged")
    assert merged["proved"] is True
    return {
        "base": scored["scores"]["base"]["exact_match"],
        "adapter": scored["scores"]["adapter"]["exact_match"],
        "merged": after["scores"]["merged"]["exact_match"],
        "loss": merged["proof"]["loss"],
        "tokens_per_second": trained["tokens_per_second"],
        "seconds": trained["seconds"],
        "peak_mb": peak,
        "rows": scored["rows"],
        "steps": trained["steps"],
    }


def conditions(rows: dict[str, dict[str, float]], load: float) -> str:
    """What the figures were measured on, as a sentence or two."""
    one = rows["LoRA"]
    others = "otherwise idle" if load < 1 else f"shared with other work (load {load:.1f} at the start)"
    return (
        f"{one['steps']:.0f} steps of 8 rows, {one['rows']:.0f} held-out rows, base {one['base']:.2f}; "
        f"one thread on {os.cpu_count()} cores, {platform.machine()}, {others}; peak memory is that of the training "
        f"process. Written by `tests/test_adapters_slow.py` on {time.strftime('%Y-%m-%d')}."
    )


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<10} adapter  merged  loss of the merge  tokens/s  peak MB"]
    lines += [
        f"{name:<10} {one['adapter']:7.2f} {one['merged']:7.2f} {one['loss']:18.1e} {one['tokens_per_second']:9.0f} "
        f"{one['peak_mb']:8.0f}"
        for name, one in rows.items()
    ]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_way_to_adapt_learns_the_task_as_well_and_merges(root: Path, tmp_path: Path) -> None:
    assert (root / BASE / "config.json").is_file(), f"{BASE} is not there; `finetune base smollm2` makes it"
    load = os.getloadavg()[0]
    rows = {}
    for name in VARIANTS:
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        rows[name] = measured(root, folder, name)
    print(f"\n{table(rows)}")
    if os.environ.get("FINETUNE_ADAPTERS") == "write":
        MEASURED.write_text(
            json.dumps({"conditions": conditions(rows, load), "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
    scores = [one["adapter"] for one in rows.values()]
    assert min(scores) >= 0.85, rows
    assert max(scores) - min(scores) <= WITHIN, rows
    for name, one in rows.items():
        assert one["base"] <= WITHIN, name
        assert abs(one["merged"] - one["adapter"]) <= WITHIN, name
        assert one["loss"] <= WITHIN, name
