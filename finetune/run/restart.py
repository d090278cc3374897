"""What torch's agents (torchrun, accelerate's launcher) find when they start a run again: begun by them, or finished.

A process that is killed between the saved product and its own end makes the agent start all of them again. Nothing is
left to train then, and a refusal would make a run that succeeded look failed. Nor must `--overwrite` throw away what an
earlier start of the same launcher has trained.

No torch: this is asked before anything heavy is imported.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import RefusedError
from finetune.files import MANIFEST, manifest_faults
from finetune.run.folder import RunFolder, read_json


def is_restart(environment: Mapping[str, str]) -> bool:
    """Whether an agent started this process in the place of one that has ended."""
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "")
    return count.isdigit() and int(count) > 0


def launcher_of(environment: Mapping[str, str]) -> str:
    """The agent that started this process, by host, process and when that began; empty where none did, or the system
    does not tell.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ""
    try:
        agent = os.getppid()
        since = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]  # ticks since the host began
    except (OSError, IndexError):
        return ""
    return f"{socket.gethostname()} {agent} {since}"


def begun_by(launcher: str, folder: RunFolder) -> bool:
    """Whether the run that stands in a folder was begun by this launcher, as `launcher_of` calls it."""
    return bool(launcher) and read_json(folder.record).get("launcher") == launcher


def finished(folder: RunFolder, recipe_hash: str) -> dict[str, Any] | None:
    """What a finished run of this recipe reports, once its product was verified; None where none is finished.

    Raises:
        RefusedError: the product is not what was saved.
    """
    product = folder.product
    if product is None or read_json(folder.record).get("recipe_hash") != recipe_hash:
        return None
    if faults := manifest_faults(product, sealed=True):
        raise RefusedError(
            f"output_dir: the run in {folder.root} is finished, and its {product.name}/ is not what was saved: "
            f"{'; '.join(faults[:3])}; choose another output_dir, or pass --overwrite to train again"
        )
    manifest = read_json(product / MANIFEST)
    adapter = read_json(folder.record).get("adapter")
    return report(folder, product, str(adapter), manifest["figures"], manifest["proof"])


def report(
    folder: RunFolder, product: Path, adapter: str, figures: Mapping[str, Any], proof: Mapping[str, Any]
) -> dict[str, Any]:
    """What a finished run reports.

    Args:
        folder: the run's.
        product: its adapter or model.
        adapter: adapter.method.
        figures: what it reached.
        proof: what was proved of the product.
    """
    return {"run": str(folder.root), "product": str(product), "adapter": adapter, **figures, "proof": dict(proof)}
