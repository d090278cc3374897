"""A run that is out of memory ends with 4, says what to change in its recipe, and can be continued."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny import Lab, lab_in
from warm import Warm

from finetune.advice import advice
from finetune.errors import ExitCode, FinetuneError
from finetune.plan.hardware import Hardware
from finetune.preflight import Checked, check
from finetune.ready import Process, process_of
from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.run.shortage import is_shortage

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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Iterator[Lab]:
    """A lab, in which this process stands."""
    with pytest.MonkeyPatch.context() as patch:
        lab = lab_in(tmp_path_factory.mktemp("advice"), bases, warm)
        patch.chdir(lab.folder)
        yield lab


@dataclass(frozen=True)
class Case:
    """A recipe on a machine with GPUs, as far as it comes before anything is loaded."""

    changes: Mapping[str, Any]
    processes: int = 1
    devices: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(self, lab: Lab, *overrides: str) -> tuple[LoadedRecipe, Checked, Process]:
        """What is checked before a run starts.

        Raises:
            FinetuneError: it is refused.
        """
        asked = {"launch.num_processes": self.processes if self.processes > 1 else None, "launch.device": None}
        loaded = load_recipe(lab / lab.recipe({**asked, **self.changes}), overrides)
        count = loaded.recipe.launch.num_processes or self.processes
        world = {
            "WORLD_SIZE": str(count),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**world, **self.variables}.items():
                patch.setenv(name, value)
            checked = check(loaded)
            hardware = Hardware("cuda", self.devices, "", 2**30, bf16=True, threads=1)
            return loaded, checked, process_of(loaded.recipe, checked.mode, hardware)

    def told(self, lab: Lab, longest: int = 90) -> list[str]:
        """What is told when it is out of memory."""
        started = self.start(lab)
        supplies: Any = SimpleNamespace(
            base=started[1].base, data=SimpleNamespace(longest=longest, validation=object())
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.variables.items():
                patch.setenv(name, value)
            return advice(*started, supplies)


def keys(lines: list[str]) -> list[str]:
    return [" ".join(line.split()[:2]) for line in lines]


def overrides(line: str) -> list[str]:
    """What a line tells a reader to write, as words of the command line."""
    found = re.findall(r"\b([a-z_]+\.[a-z_]+): (less than \d+|[\w-]+)", line)
    assert found, line
    return [f"{key}={int(value.split()[-1]) - 1 if 'less' in value else value}" for key, value in found]


def test_the_gentlest_remedy_comes_first_and_the_recipe_s_values_stand_in_it(place: Lab) -> None:
    lines = Case({"training.global_batch_size": 8}).told(place)
    assert keys(lines) == [
        "training.per_device_train_batch_size: 4",
        "training.per_device_eval_batch_size: 4",
        "data.max_length: less",
        "model.quantization: nf4",
    ]
    assert lines[2] == (
        "data.max_length: less than 90 with data.on_long_row: drop (it is error), or truncate or split, the tokens of "
        "the longest row"
    )


@pytest.mark.parametrize(
    ("changes", "processes", "devices", "expected"),
    [
        ({}, 4, 4, "launch.config: zero3"),
        ({"adapter": {"method": "none"}}, 4, 4, "launch.config: zero2"),
        ({"launch.config": "zero2"}, 4, 4, "launch.config: zero3"),
        ({"launch.config": "zero3"}, 4, 4, "launch.config: zero3-offload"),
        ({"launch.config": "zero3-offload"}, 4, 4, None),
        ({"launch.config": "multi-node-ddp"}, 4, 2, "launch.config: multi-node-zero3"),
        ({"launch.num_processes": 1}, 1, 4, "launch.config: zero3"),
        ({"launch.num_processes": 1}, 1, 3, "launch.config: zero3"),  # which two of them can share
        ({"launch.num_processes": 1, "training.global_batch_size": 1}, 1, 4, None),
        ({"adapter.init_lora_weights": "pissa"}, 4, 4, None),  # which cannot be spread
        ({"model.dtype": "float16"}, 4, 4, None),  # which DeepSpeed scales otherwise
    ],
)
def test_weights_are_spread_as_far_as_the_recipe_allows(
    place: Lab, changes: dict[str, Any], processes: int, devices: int, expected: str | None
) -> None:
    lines = [line for line in Case(changes, processes, devices).told(place) if line.startswith("launch.config")]
    assert keys(lines)[:1] == ([expected] if expected else [])
    assert ("with launch.num_processes: " in "".join(lines)) is (processes == 1 and expected is not None)


def test_a_launcher_that_was_given_a_configuration_must_be_given_the_new_one(place: Lab) -> None:
    given = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    (line,) = [line for line in Case({}, 4, 4, given).told(place) if line.startswith("launch.config")]
    assert line.endswith("for the weights in parts, too, with the same for the launcher's --config_file")


def test_what_the_other_keys_refuse_is_not_told(place: Lab) -> None:
    everything: dict[str, Any] = {"adapter": {"method": "none"}}
    assert "adapter.method: lora" in keys(Case(everything).told(place))
    assert "adapter.method: lora" not in keys(Case({**everything, "model.freeze": ["embed_tokens"]}).told(place))
    for changes in (everything, {"model.quantization": "nf4"}, {"adapter.init_lora_weights": "pissa"}):
        assert "model.quantization: nf4" not in keys(Case(changes).told(place))


_MULTI = st.sampled_from((None, "zero1", "zero2", "zero3", "zero3-offload", "fsdp2", "fsdp2-qlora", "multi-node-ddp"))
_ADAPTERS = st.sampled_from((
    {}, {"method": "none"}, {"method": "dora"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"},
    {"loraplus_lr_ratio": 4.0}, {"use_rslora": True},
))  # fmt: skip


@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.filter_too_much])
@hypothesis.given(
    adapter=_ADAPTERS,
    config=_MULTI,
    processes=st.sampled_from((1, 2, 4)),
    devices=st.sampled_from((1, 3, 4)),
    batch=st.sampled_from((1, 4, 12)),
    micro=st.sampled_from((None, 1, 2, 3)),
    rest=st.fixed_dictionaries(
        {},
        optional={
            "model.dtype": st.sampled_from(("float16", "bfloat16", "float32", "auto")),
            "model.quantization": st.sampled_from(("nf4", "int8")),
            "model.freeze": st.just(["embed_tokens"]),
            "training.optim": st.sampled_from(("adamw_torch_fused", "adafactor")),
            "training.activation_checkpointing": st.booleans(),
            "data.packing": st.booleans(),
            "data.on_long_row": st.sampled_from(("error", "truncate", "split")),
        },
    ),
)
def test_whatever_is_told_is_accepted_by_the_checks_before_a_launch(
    place: Lab, adapter: Any, config: Any, processes: int, devices: int, batch: int, micro: Any, rest: Any
) -> None:
    training = {"training.global_batch_size": batch, "training.per_device_train_batch_size": micro}
    case = Case({**rest, **training, "adapter": adapter, "launch.config": config}, processes, devices)
    try:
        lines = case.told(place)
    except FinetuneError:
        hypothesis.reject()  # such a recipe is not trained at all
    assert lines
    for line in lines:
        case.start(place, *overrides(line))


def test_only_a_lack_of_memory_is_called_one() -> None:
    assert is_shortage(MemoryError())
    assert is_shortage(RuntimeError("CUDA error: out of memory"))
    assert is_shortage(OSError(12, "Cannot allocate memory"))
    assert not is_shortage(RuntimeError("shape mismatch"))
    assert not is_shortage(ValueError("out of memory"))
