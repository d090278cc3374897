"""Checkpoints of states that are spread over processes: each writes its part, one manifest commits the set.

Any number of processes in any mode can go on from one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import Lab
from warm import Child, Outcome

from finetune.errors import RefusedError
from finetune.files import manifest_faults
from finetune.run.checkpoint_kept import Kept
from finetune.run.checkpoint_state import WEIGHT

CHANGES: dict[str, Any] = {
    "adapter.lora_dropout": 0.1,
    "training.max_steps": 24,
    "training.num_train_epochs": 100,
    "training.save_steps": 4,
    "training.global_batch_size": 4,
    "training.learning_rate": 1e-3,
}


def start(
    lab: Lab, mode: str, changes: Mapping[str, Any], *flags: str, fault: str = "", on_rank: int = 0, count: int = 2
) -> list[Child]:
    """The processes of a mode, two of them as a rule; FSDP2 in the disguise of fsdp_on_cpu.py; a fault of faults.py."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    how: dict[str, Any] = {}
    if mode.startswith("fsdp"):
        how = {"entry": "fsdp_on_cpu:main", "env": {"PYTHONPATH": path}}
    if fault:
        how = {"entry": "faults:train", "env": {"PYTHONPATH": path, "FAULT": fault, "FAULT_RANK": str(on_rank)}}
    settings = {**CHANGES, **changes} | ({} if mode in ("ddp", "one") else {"launch.config": mode})
    recipe = lab.recipe(settings)
    if mode == "one":
        return [lab.warm.start("train", recipe, *flags, cwd=lab.folder)]
    return lab.warm.start_ranks(count, recipe, *flags, cwd=lab.folder, **how)


def ended(children: list[Child]) -> list[Outcome]:
    """The outcomes of all processes."""
    return [child.wait(150) for child in children]


def product(lab: Lab, run: str) -> bytes:
    """The bytes of what a run trained."""
    return next((lab / run).glob("[am]*/*model*.safetensors")).read_bytes()


def kill_after_second_save(lab: Lab, children: list[Child]) -> None:
    """Kill all processes once checkpoint-8 is there."""
    deadline = time.monotonic() + 120
    while not (lab / "run/checkpoints/checkpoint-8").is_dir():
        assert time.monotonic() < deadline, children[0].output
        time.sleep(0.005)
    for child in children:
        child.send_signal(signal.SIGKILL)
    assert {outcome.returncode for outcome in ended(children)} == {-signal.SIGKILL}


def newest(lab: Lab) -> Path:
    """The last checkpoint of a run."""
    return max((lab / "run/checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


# -- runs of numbers -------------------------------------------------------------------------------------------------

SHAPES = {"a.weight": (7, 5), "b": (3,), "c": (2, 2, 4)}


def in_parts(folder: Path, cuts: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    """Write what a checkpoint says of weights that are cut at given places, each piece on another rank."""
    ranks = 1 + max(len(places) for places in cuts.values())
    whole = {name: torch.randn(math.prod(shape)) for name, shape in SHAPES.items()}
    for rank in range(ranks):
        held, pieces = {}, {}
        for name, places in cuts.items():
            edges = [0, *sorted(places), math.prod(SHAPES[name])]
            if rank + 1 < len(edges) and edges[rank] < edges[rank + 1]:
                pieces[name] = [edges[rank], edges[rank + 1] - edges[rank]]
                held |= {f"{kind}/{name}": whole[name][edges[rank] : edges[rank + 1]] * sign
                         for kind, sign in ((WEIGHT, 1), ("exp_avg", -1))}  # fmt: skip
        save_file(held, folder / f"part-{rank}.safetensors")
        (folder / f"part-{rank}.json").write_text(json.dumps({"pieces": pieces, "counts": {}}))
    stated = {"parts": ranks, "trained": SHAPES, "names": [list(SHAPES)], "state": {"groups": [{"lr": 0.1}]}}
    (folder / "state.json").write_text(json.dumps(stated))
    return whole


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_run_of_numbers_is_read_whoever_wrote_its_pieces(data: st.DataObject) -> None:
    cuts = {name: data.draw(st.lists(st.integers(0, math.prod(shape)), max_size=4)) for name, shape in SHAPES.items()}
    with tempfile.TemporaryDirectory() as folder:
        whole = in_parts(Path(folder), cuts)
        with Kept(Path(folder)) as kept:
            assert kept.shapes == SHAPES
            for name, shape in SHAPES.items():
                start = data.draw(st.integers(0, math.prod(shape)))
                into = torch.zeros(data.draw(st.integers(0, math.prod(shape) - start)))
                kept.fill(into, name, WEIGHT, start)
                assert torch.equal(into, whole[name][start : start + len(into)])
                kept.fill(into, name, "exp_avg", start)
                assert torch.equal(into, -whole[name][start : start + len(into)])
            assert kept.kinds(("b",)) == ["exp_avg"]
            with pytest.raises(RefusedError, match="1 numbers of its weight are in no part"):
                kept.fill(torch.zeros(4), "b", WEIGHT, 0)


# -- whole runs ------------------------------------------------------------------------------------------------------

FULL = {"adapter": {"method": "none"}, "training.learning_rate": 1e-4}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("zero2", {}),
        pytest.param("zero1", {}, marks=SLOW),
        pytest.param("zero3", {}, marks=SLOW),
        pytest.param("fsdp2", {}, marks=SLOW),
        pytest.param("zero2", FULL, marks=SLOW),
        pytest.param("zero3", FULL, marks=SLOW),
        pytest.param("fsdp2", FULL, marks=SLOW),
    ],
)
def test_a_killed_run_of_parts_goes_on_to_the_same_bits(lab: Lab, mode: str, changes: dict[str, Any]) -> None:
    if changes:
        changes = {**changes, "adapter.lora_dropout": None}
    for outcome in ended(start(lab, mode, {**changes, "output_dir": "whole"})):
        outcome.ok()
    kill_after_second_save(lab, start(lab, mode, changes))
    left = sorted((lab / "run/checkpoints").glob("checkpoint-*"))
    assert [manifest_faults(path, sealed=True) for path in left] == [[]] * len(left)
    assert not list((lab / "run/checkpoints").rglob("training_args*"))
    again = ended(start(lab, mode, changes))
    assert "resume   from run/checkpoints/checkpoint-" in again[0].ok().stderr
    again[1].ok()
    assert product(lab, "run") == product(lab, "whole")
    assert lab.losses() == lab.losses("whole")


@pytest.mark.parametrize(
    ("mode", "count", "then", "processes", "changes"),
    [
        ("zero2", 2, "one", 1, {}),
        pytest.param("zero3", 2, "fsdp2", 2, {}, marks=SLOW),
        pytest.param("one", 1, "zero2", 2, {}, marks=SLOW),
        pytest.param("ddp", 2, "zero3", 2, {}, marks=SLOW),
        pytest.param("fsdp2", 2, "ddp", 2, {}, marks=SLOW),
        pytest.param("fsdp2", 2, "zero1", 2, FULL, marks=SLOW),
        pytest.param("zero3", 2, "zero3", 3, {}, marks=SLOW),
        pytest.param("zero3", 3, "zero2", 2, FULL, marks=SLOW),
        pytest.param("zero2", 3, "one", 1, FULL, marks=SLOW),
        pytest.param("fsdp2", 3, "fsdp2", 2, {}, marks=SLOW),
        pytest.param("ddp", 2, "fsdp2", 3, FULL, marks=SLOW),
    ],
)
def test_another_mode_on_other_processes_goes_on_with_the_same_losses(
    lab: Lab, mode: str, count: int, then: str, processes: int, changes: dict[str, Any]
) -> None:
    changes = {**changes, "adapter.lora_dropout": None, "training.global_batch_size": 6}
    changes |= {"training.per_device_train_batch_size": 1}
    for outcome in ended(start(lab, "one", {**changes, "output_dir": "whole"})):
        outcome.ok()
    kill_after_second_save(lab, start(lab, mode, changes, count=count))
    step = int(newest(lab).name.split("-")[1])
    refused = ended(start(lab, then, changes, count=processes))[0]
    assert refused.returncode == 5
    for what in {*(["parallelism"] if mode != then else []), *(["world_size"] if count != processes else [])} - (
        {"parallelism"} if {mode, then} == {"one", "ddp"} else set()
    ):
        assert f"  {what}: " in refused.stderr
        assert "cannot be accepted" not in refused.stderr
    again = ended(start(lab, then, changes, "--allow-drift", "parallelism,world_size", count=processes))
    for outcome in again:
        outcome.ok()
    assert f"resume   from run/checkpoints/checkpoint-{step}" in again[0].stderr
    assert lab.losses() == pytest.approx(lab.losses("whole"), rel=1e-6)
    rates = [[line["learning_rate"] for line in lab.metrics(run) if "loss" in line] for run in ("run", "whole")]
    assert rates[0] == rates[1]


def test_a_part_that_was_damaged_is_found_and_nothing_of_a_checkpoint_is_unpickled(lab: Lab) -> None:
    kill_after_second_save(lab, start(lab, "zero2", {}))
    last = newest(lab)
    assert sorted(path.name for path in last.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "part-0.json", "part-0.safetensors",
        "part-1.json", "part-1.safetensors", "state.json", "trainer_state.json",
    ]  # fmt: skip
    part = last / "part-1.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    recipe = lab.recipe({**CHANGES, "launch.config": "zero2"})
    again = lab.warm.ranks(2, recipe, cwd=lab.folder, entry="faults:no_pickle_here", env={"PYTHONPATH": path})
    assert f"passed over {last.name}: part-1.safetensors differs from its hash" in again[0].ok().stderr
    again[1].ok()


@pytest.mark.parametrize("mode", ["zero3", pytest.param("fsdp2", marks=SLOW)])
def test_the_adapter_of_a_checkpoint_in_parts_is_whole_and_plain_peft_loads_it(lab: Lab, mode: str) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    changes = {"training.max_steps": 4}
    for outcome in ended(start(lab, mode, changes)):
        outcome.ok()
    kept, saved = (load_file(folder / "adapter_model.safetensors") for folder in (newest(lab), lab / "run/adapter"))
    assert kept.keys() == saved.keys()
    assert all(bool((kept[name] == saved[name]).all()) for name in kept)
    assert any(bool(kept[name].any()) for name in kept if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(lab / "chatml")
    assert PeftModel.from_pretrained(base, str(newest(lab))).peft_config["default"].inference_mode


@SLOW
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_state_that_goes_by_another_key_is_kept_for_the_same_processes_only(lab: Lab, mode: str) -> None:
    changes = {"training.optim": "adafactor"}
    for outcome in ended(start(lab, mode, {**changes, "output_dir": "whole"})):
        outcome.ok()
    kill_after_second_save(lab, start(lab, mode, changes))
    alone = ended(start(lab, "one", changes, "--allow-drift", "world_size,parallelism"))[0]
    assert alone.returncode == 5
    assert "world_size: 2 → 1 (cannot be accepted: the optimizer's state is tied to it)" in alone.stderr
    for outcome in ended(start(lab, mode, changes)):
        outcome.ok()
    assert product(lab, "run") == product(lab, "whole")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp2"])
def test_an_accepted_learning_rate_is_the_one_that_trains_parts(lab: Lab, mode: str) -> None:
    short = {"training.max_steps": 12}
    faster = {**short, "training.learning_rate": 2e-3}
    for outcome in ended(start(lab, mode, {**faster, "output_dir": "other"})):
        outcome.ok()
    kill_after_second_save(lab, start(lab, mode, short))
    shutil.rmtree(lab / "run/checkpoints/checkpoint-12", ignore_errors=True)
    again = ended(start(lab, mode, faster, "--allow-drift", "learning_rate"))
    assert "accepted: training.learning_rate: 0.001 → 0.002" in again[0].ok().stderr
    rates = {run: [line["learning_rate"] for line in lab.metrics(run) if "loss" in line] for run in ("run", "other")}
    assert rates["run"][8:] == rates["other"][8:]
    assert rates["run"][:8] == [rate / 2 for rate in rates["other"][:8]]


@pytest.mark.parametrize(
    ("rank", "at", "kind"),
    [
        pytest.param(0, 1, "ENOSPC", marks=SLOW),  # the folder
        pytest.param(0, 9, "EIO", marks=SLOW),  # a part, or what is the same for all
        (1, 3, "ENOSPC"),
    ],
)
def test_a_disk_that_fails_on_any_rank_ends_all_and_the_last_checkpoint_stays(
    lab: Lab, rank: int, at: int, kind: str
) -> None:
    outcomes = ended(start(lab, "zero2", {"launch.timeout": 20}, fault=f"{kind}:{at}:.checkpoint-8.tmp", on_rank=rank))
    assert [outcome.returncode for outcome in outcomes] == [74, 74], outcomes[0].stderr + outcomes[1].stderr
    assert "checkpoint-8: " in outcomes[rank].stderr
    assert "(checkpoint-4 is whole)" in outcomes[0].stderr
    assert [path.name for path in (lab / "run/checkpoints").iterdir()] == ["checkpoint-4"]
    assert manifest_faults(newest(lab), sealed=True) == []


def test_a_part_that_cannot_be_written_may_be_let_pass_and_is_told(lab: Lab) -> None:
    changes = {"training.on_save_error": "continue", "training.max_steps": 12}
    outcomes = ended(start(lab, "zero2", changes, fault="ENOSPC:3:.checkpoint-8.tmp", on_rank=1))
    for outcome in outcomes:
        outcome.ok()
    assert "Training goes on; checkpoint-4 is whole" in outcomes[0].stderr
    assert sorted(path.name for path in (lab / "run/checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-4"]


def test_a_run_in_parts_that_cannot_be_saved_ends_after_its_first_steps(lab: Lab) -> None:
    outcomes = ended(start(lab, "zero2", {"launch.timeout": 20}, fault="ENOSPC:5:.checkpoint-1.tmp"))
    assert [outcome.returncode for outcome in outcomes] == [74, 74], outcomes[0].stderr + outcomes[1].stderr
    assert "(there is no checkpoint yet)" in outcomes[0].stderr
    assert list((lab / "run/checkpoints").iterdir()) == []
