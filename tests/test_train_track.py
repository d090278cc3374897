"""Trackers in real runs: they mirror every line, and when they raise or hang the run does not care."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest
from tiny import Lab

BOX = r"""
import json, time
from pathlib import Path


class Keeps:
    def start(self, run_folder, project, run_name, mode):
        self.path = Path(run_folder) / "kept.jsonl"
        with open(self.path, "a") as stream:
            stream.write(json.dumps([project, run_name, mode]) + "\n")

    def log(self, metrics, step):
        with open(self.path, "a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")

    def finish(self):
        pass


class Raises(Keeps):
    def log(self, metrics, step):
        raise ValueError("refused")


class Hangs(Keeps):
    def log(self, metrics, step):
        time.sleep(600)
"""


def tracked(*trackers: str) -> dict[str, object]:
    return {"tracking": {"trackers": list(trackers), "project": "tests", "run_name": "tiny"}}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_mirrors_a_run_offline(lab: Lab, refused: Callable[[], list[str]]) -> None:
    outcome = lab.train({**tracked("wandb"), "data.validation": "held.jsonl"}).ok()
    lines = len(lab.metrics())
    assert lines >= 6
    assert f"tracker wandb: all {lines} lines mirrored" in outcome.stderr
    (offline,) = (lab / "run/tracking/wandb").glob("offline-run-*/*.wandb")
    assert b"eval_loss" in offline.read_bytes()
    assert refused() == []


def test_a_tracker_of_ones_own_gets_every_line(lab: Lab) -> None:
    (lab / "box.py").write_text(BOX)
    outcome = lab.train(tracked("box:Keeps"), env=lab.importable()).ok()
    first, *kept = [json.loads(line) for line in (lab / "run/kept.jsonl").read_text().splitlines()]
    assert first == ["tests", "tiny", "offline"]
    assert kept == lab.metrics()
    assert f"tracker box:Keeps: all {len(kept)} lines mirrored" in outcome.stderr


def test_a_tracker_that_raises_is_told_and_changes_nothing(lab: Lab) -> None:
    (lab / "box.py").write_text(BOX)
    lab.train({"output_dir": "alone"}).ok()
    outcome = lab.train(tracked("box:Raises", "box:Keeps"), env=lab.importable()).ok()
    lines = len(lab.metrics())
    assert f"tracker box:Raises: 0 of {lines} lines mirrored" in outcome.stderr
    assert "ValueError: refused" in outcome.stderr
    assert f"tracker box:Keeps: all {lines} lines mirrored" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "Traceback" in (lab / "run/tracking/box-Raises.log").read_text()
    assert lab.adapter() == lab.adapter("alone")
    assert lab.ended()["exit_code"] == 0


@pytest.mark.slow
def test_a_tracker_that_hangs_is_cut_off_and_told(lab: Lab) -> None:
    """Slow because a run waits half a minute for its trackers."""
    (lab / "box.py").write_text(BOX)
    outcome = lab.train(tracked("box:Hangs"), env=lab.importable()).ok()
    assert f"tracker box:Hangs: 0 of {len(lab.metrics())} lines mirrored; killed after 30 s, hanging in log" in (
        outcome.stderr
    )
    assert lab.ended()["exit_code"] == 0
    assert (lab / "run/adapter/adapter_model.safetensors").is_file()


def test_a_run_that_fails_tells_its_trackers_too(lab: Lab) -> None:
    (lab / "box.py").write_text(BOX)
    outcome = lab.train({**tracked("box:Keeps"), "model.name_or_path": "infinite"}, env=lab.importable())
    assert outcome.returncode == 76
    assert "tracker box:Keeps: all " in outcome.stderr
