"""A run that is out of memory ends with 4, says what to change in its recipe, and can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tiny import Lab

from finetune.errors import ExitCode
from finetune.recipe.combinations import recipe_facts
from finetune.recipe.sections import DataOptions, LaunchOptions, ModelOptions, TrainingOptions
from finetune.run.batch import BatchShape
from finetune.run.modes import Mode
from finetune.run.shortage import Situation, is_shortage, remedies

CHANGES = {
    "adapter.lora_dropout": 0.1,
    "data.validation": "held.jsonl",
    "training.max_steps": 6,
    "training.save_steps": 2,
    "training.per_device_train_batch_size": 4,
}


def assert_told(lab: Lab, said: str, reason: str) -> None:
    """The message names keys with their values, and only those that this recipe has not taken yet."""
    for text in (said, lab.ended()["reason"]):
        assert f"out of memory: {reason}" in text
        assert "  training.activation_checkpointing: true (it is off" in text
        assert "  model.quantization: nf4 (it is none)" in text
        assert "  data.max_length: less than " in text
        assert "The same command continues from the last checkpoint" in text
    assert "Traceback" not in said
    assert lab.ended()["exit_code"] == ExitCode.ENVIRONMENT
    assert lab.ended()["step"] == 3


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("device", "CUDA out of memory. Tried to allocate"), ("host", "[enforce fail at alloc_cpu.cpp")],
)
def test_a_run_out_of_memory_says_what_to_change_and_goes_on_to_the_same_bits(lab: Lab, kind: str, reason: str) -> None:
    outcome = lab.train(CHANGES, entry="short_of_memory:main", env={"SHORTAGE": f"{kind}:3:0"})
    assert outcome.returncode == ExitCode.ENVIRONMENT, outcome
    assert_told(lab, outcome.stderr, reason)
    assert "  training.per_device_train_batch_size: 2 (it is 4; global_batch_size stays 4)\n" in outcome.stderr
    assert "launch.config" not in outcome.stderr  # there is one device
    assert "  training.per_device_eval_batch_size: 2 (it is 4), if it was in a validation\n" in outcome.stderr
    assert not (lab / "run/adapter").exists()
    again = lab.train(CHANGES).ok()
    assert "from run/checkpoints/checkpoint-2" in again.stderr
    lab.train({**CHANGES, "output_dir": "whole"}).ok()
    assert lab.adapter() == lab.adapter("whole")


@pytest.mark.slow
def test_the_remedy_is_taken_by_name(lab: Lab) -> None:
    lab.train(CHANGES, entry="short_of_memory:main", env={"SHORTAGE": "device:3:0"})
    smaller = {**CHANGES, "training.per_device_train_batch_size": 2}
    refused = lab.train(smaller)
    assert refused.returncode == ExitCode.REFUSED
    assert "--allow-drift per_device_train_batch_size" in refused.stderr.replace("training.", "")
    lab.train(smaller, "--allow-drift", "per_device_train_batch_size").ok()
    assert len(lab.losses()) == 6


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_one_rank_is_out_of_memory_the_run_says_so_and_not_that_it_hangs(lab: Lab, rank: int) -> None:
    changes = {**CHANGES, "training.per_device_train_batch_size": 2, "launch.timeout": 500}
    ranks = lab.warm.ranks(
        2, lab.recipe(changes), cwd=lab.folder, entry="short_of_memory:train", env={"SHORTAGE": f"device:3:{rank}"}
    )
    assert ranks[rank].returncode == ExitCode.ENVIRONMENT, ranks
    assert_told(lab, ranks[rank].stderr, "CUDA out of memory")
    assert "launch.config: zero3 (it is DDP), for the weights in parts, too" in ranks[rank].stderr
    assert (f"rank {rank} (counted from 0): out of memory" in lab.ended()["reason"]) is (rank == 1)
    other = ranks[1 - rank]
    assert other.returncode in ((ExitCode.ENVIRONMENT,) if rank == 1 else (ExitCode.ENVIRONMENT, ExitCode.HANG))
    assert "Traceback" not in other.stderr
    for outcome in lab.warm.ranks(2, lab.recipe(changes), cwd=lab.folder):
        outcome.ok()


# -- what is told ------------------------------------------------------------------------------------------------------


def told(
    method: str = "lora",
    quantization: Any = "none",
    shape: BatchShape = BatchShape(8, 1, 1),
    mode: Mode = Mode(),
    devices: int = 1,
    launch: Mapping[str, Any] | None = None,
    **adapter: Any,
) -> list[str]:
    """The remedies for a recipe on GPUs with activations recomputed."""
    rows = DataOptions.model_validate({"train": "x.jsonl"})
    plain = {
        "model": {"quantization": quantization},
        "adapter": {"method": method, "init_lora_weights": True, "lora_dropout": 0.0, **adapter},
        "training": {"weight_decay": 0.0},
    }
    facts = recipe_facts(lambda section, name: plain[section].get(name))
    now = Situation(shape, mode, "cuda", devices, 900, True, False, {**facts, "parallelism": mode.facts})
    model = ModelOptions.model_validate({"name_or_path": "x", "quantization": quantization})
    options = TrainingOptions.model_validate({"learning_rate": 1e-4, "global_batch_size": shape.per_device})
    return list(remedies(model, rows, options, LaunchOptions.model_validate(launch or {}), now))


def keys(lines: list[str]) -> list[str]:
    return [" ".join(line.split()[:2]) for line in lines]


def zero(stage: int, **more: Any) -> Mode:
    return Mode("deepspeed", "", {"zero_optimization": {"stage": stage, **more}})


def test_the_gentlest_remedy_comes_first_and_the_recipe_s_values_stand_in_it() -> None:
    lines = told()
    assert keys(lines) == [
        "training.per_device_train_batch_size: 4",
        "data.max_length: less",
        "model.quantization: nf4",
    ]
    assert lines[1] == "data.max_length: less than 900, the tokens of the longest row"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, "launch.config: zero3"),
        ({"method": "none"}, "launch.config: zero2"),
        ({"mode": zero(2)}, "launch.config: zero3"),
        ({"mode": zero(3)}, "launch.config: zero3-offload"),
        ({"mode": zero(3, offload_param={"device": "cpu"})}, None),
        ({"launch": {"config": "multi-node-ddp"}}, "launch.config: multi-node-zero3"),
        ({"shape": BatchShape(1, 1, 1), "devices": 4}, "launch.config: zero3"),
        ({"init_lora_weights": "pissa"}, None),  # which cannot be spread
    ],
)
def test_weights_are_spread_as_far_as_the_recipe_allows(how: dict[str, Any], expected: str | None) -> None:
    lines = [line for line in keys(told(**{"shape": BatchShape(1, 1, 4), **how})) if line.startswith("launch.config")]
    assert lines[:1] == ([expected] if expected else [])


def test_what_the_other_keys_refuse_is_not_told() -> None:
    assert "adapter.method: lora" in keys(told(method="none"))
    for lines in (told(method="none"), told(quantization="nf4"), told(init_lora_weights="pissa")):
        assert "model.quantization: nf4" not in keys(lines)


def test_only_a_lack_of_memory_is_called_one() -> None:
    assert is_shortage(MemoryError())
    assert is_shortage(RuntimeError("CUDA error: out of memory"))
    assert is_shortage(OSError(12, "Cannot allocate memory"))
    assert not is_shortage(RuntimeError("shape mismatch"))
    assert not is_shortage(ValueError("out of memory"))
