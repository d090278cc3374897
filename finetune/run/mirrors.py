"""The three trackers that come along, as run/sidecar.py wants them. Each is imported in its own sidecar only.

They get the numbers of each line and the resolved recipe with its secrets masked: no rows, no code, no console.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from finetune.files import write_text
from finetune.privacy import mask


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The entries of a line that are numbers, without its time."""
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "time"
    }


def recipe_of(run_folder: Path) -> dict[str, Any]:
    """The run's resolved recipe with every secret masked; empty when there is none to read."""
    try:
        recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return mask(recipe) if isinstance(recipe, dict) else {}


class Wandb:
    """Weights & Biases. Offline it needs no server and no key; `wandb sync` uploads tracking/wandb later."""

    def start(self, run_folder: Path, project: str, run_name: str, mode: str) -> None:
        os.environ["WANDB_MODE"] = mode
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        identity = run_folder / "tracking" / "wandb-id"  # a run that goes on stays one run over there
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=run_name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow" if mode == "online" else None,
            dir=str(run_folder / "tracking"),
            mode="online" if mode == "online" else "offline",
            config=recipe_of(run_folder),
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,  # the sidecar's own memory and CPU say nothing of the run's
                x_disable_meta=True,  # nor do its program, folder and host name
                x_disable_machine_info=True,
            ),
        )

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log(numbers(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard event files in tracking/tensorboard, written by the tensorboard package without torch."""

    def start(self, run_folder: Path, project: str, run_name: str, mode: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run_folder / "tracking" / "tensorboard"), flush_secs=5)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in numbers(metrics).items()]
        written = metrics.get("time")
        when = float(written) if isinstance(written, int | float) else time.time()
        self._writer.add_event(self._event(wall_time=when, step=step, summary=self._summary(value=values)))

    def finish(self) -> None:
        self._writer.close()


class Trackio:
    """trackio's local database (TRACKIO_DIR); `trackio show` draws it. Online it follows TRACKIO_SPACE_ID."""

    def start(self, run_folder: Path, project: str, run_name: str, mode: str) -> None:
        if mode == "offline":
            for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL"):
                os.environ.pop(variable, None)
        import trackio

        self._run = trackio.init(
            project=project,
            name=run_name,
            config=recipe_of(run_folder),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log(numbers(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()
