"""Processes that train together: who is who, and that all hold the same before and after the first step."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.errors import EnvironmentFault, HardwareError, RecipeError, RefusedError
from finetune.recipe.sections import LaunchOptions
from finetune.run import ranks
from finetune.run.modes import Mode
from finetune.run.ranks import SameWeights, World, agree, check_asked, device_of, digest, from_main, prove_world, world

ALONE = World(0, 0, 1)
PLACE = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


# -- one process ---------------------------------------------------------------------------------------------------


def test_without_a_launcher_there_is_one_process() -> None:
    assert world() == ALONE
    assert world().is_main


def test_the_launcher_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert world() == World(rank=5, local_rank=1, size=8)
    assert not world().is_main


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("WORLD_SIZE", "x", r"WORLD_SIZE: expected a whole number from 1 up, not 'x'"),
        ("RANK", "8", r"RANK: expected a whole number from 0 to 7, not '8'"),
        ("RANK", "", r"WORLD_SIZE is 8, and RANK not set"),
        ("MASTER_ADDR", "", r"WORLD_SIZE is 8, and MASTER_ADDR not set"),
        ("MASTER_PORT", "-1", r"MASTER_PORT: expected a whole number from 1 to 65535, not '-1'"),
    ],
)
def test_a_place_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str) -> None:
    for one, given_ in {**PLACE, name: value}.items():
        monkeypatch.setenv(one, given_)
    with pytest.raises(HardwareError, match=told):
        world()


@pytest.mark.parametrize(("asked", "size"), [(None, 1), (None, 3), (1, 1), (3, 3)])
def test_the_number_asked_for_is_right(asked: int | None, size: int) -> None:
    check_asked(LaunchOptions(num_processes=asked), World(0, 0, size))


@pytest.mark.parametrize(("asked", "size"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_is_refused(asked: int, size: int) -> None:
    with pytest.raises(HardwareError, match=rf"asks for {asked} processes and the launcher started {size}"):
        check_asked(LaunchOptions(num_processes=asked), World(0, 0, size))


def test_a_launchers_config_for_one_process_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"launch\.config: x\.yaml does nothing for one process"):
        check_asked(LaunchOptions(config="x.yaml"), ALONE)
    check_asked(LaunchOptions(config="x.yaml"), World(0, 0, 2))


def test_each_process_has_its_own_device() -> None:
    assert device_of(World(3, 1, 4), "cpu") is None
    assert device_of(World(3, 1, 4), "cuda") == torch.device("cuda", 1)


def test_the_trainer_must_see_as_many(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    prove_world(ALONE, arguments)
    with pytest.raises(EnvironmentFault, match="2 processes were launched and the trainer sees 1"):
        prove_world(World(0, 0, 2), arguments)


def test_one_process_needs_no_group_and_agrees_with_itself() -> None:
    ranks.start(ALONE, "cpu", 1.0, Mode())
    assert not dist.is_initialized()
    agree(ALONE, {"recipe": "x"})
    assert from_main(ALONE, lambda: 7) == 7
    ranks.meet(ALONE)
    ranks.stop()


# -- digest --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1, max_size=6), st.integers(0, 5))
def test_a_digest_sees_every_bit(values: list[float], place: int) -> None:
    tensor = torch.tensor(values)
    assert digest([tensor]) == digest([tensor.clone()])
    other = tensor.clone()
    other.view(torch.uint8)[place % (4 * len(values))] ^= 1
    assert digest([other]) != digest([tensor])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_every_dtype_and_shape_has_a_digest(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 3)]
    tensors = [torch.ones(shape).to(dtype) for shape in shapes]
    assert len(digest(tensors)) == 64
    assert digest([tensors[3].T]) == digest([tensors[3].T.contiguous()])


def test_order_counts() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert digest([a, b]) != digest([b, a])


# -- two processes -------------------------------------------------------------------------------------------------


def two(tmp_path: Path, work: Callable[[World], Any]) -> list[str]:
    """What `work` gives or raises on each of two processes, as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = processes.start_processes(
        _rank, args=(port, str(tmp_path), work), nprocs=2, join=False, start_method="fork"
    )
    assert started is not None
    while not started.join(timeout=60):
        pass
    return [(tmp_path / str(rank)).read_text() for rank in range(2)]


def _rank(rank: int, port: int, place: str, work: Callable[[World], Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    torch.set_num_threads(1)
    launched = world()
    ranks.start(launched, "cpu", timeout=30.0, mode=Mode())
    assert dist.get_backend() == "gloo"
    try:
        said = repr(work(launched))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (Path(place) / str(rank)).write_text(said)
    ranks.meet(launched)
    ranks.stop()


def _agreed(launched: World) -> str:
    agree(launched, {"recipe": "one", "data": "same"})
    return str(from_main(launched, lambda: f"rank {launched.rank} decided"))


def test_ranks_that_hold_the_same_go_on_with_what_rank_0_decides(tmp_path: Path) -> None:
    assert two(tmp_path, _agreed) == ["'rank 0 decided'"] * 2


def _differing(launched: World) -> None:
    agree(launched, {"recipe": "one", "data": f"rows{launched.rank}"})


def test_ranks_that_differ_all_refuse_and_name_what_differs(tmp_path: Path) -> None:
    said = "RefusedError: the ranks would not train the same run:\n  data: rank 0: rows0, rank 1: rows1"
    assert two(tmp_path, _differing) == [said] * 2


def _lacking(launched: World) -> None:
    agree(launched, {"recipe": "one"} if launched.is_main else {"recipe": "one", "extra": "x"})


def test_a_fact_that_one_rank_lacks_is_refused_by_all(tmp_path: Path) -> None:
    found = two(tmp_path, _lacking)
    assert found[0] == found[1]
    assert "extra: rank 0: nothing, rank 1: x" in found[0]


def _stepped(launched: World) -> list[str]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(float(launched.rank))
    said = []
    for trained in (False, True):
        model.bias.requires_grad_(trained)
        watcher = SameWeights(launched, lambda: model, Mode())
        arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
        try:
            for step in (1, 2):  # the second is not looked at
                watcher.on_step_end(arguments, TrainerState(global_step=step), TrainerControl(), model=model)
            said.append("same")
        except RefusedError as error:
            said.append(str(error).splitlines()[1].split(":")[0])
    return said


def test_trained_weights_that_differ_after_a_step_are_found(tmp_path: Path) -> None:
    assert two(tmp_path, _stepped) == ["['same', '  trained weights after step 1']"] * 2


def test_a_model_that_is_not_wrapped_would_not_share_gradients(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    watcher = SameWeights(World(0, 0, 2), lambda: nn.Linear(1, 1), Mode())
    with pytest.raises(EnvironmentFault, match="wrapped in Linear, not in DistributedDataParallel"):
        watcher.on_train_begin(arguments, TrainerState(), TrainerControl())
    for mode, wrapper in ((Mode("deepspeed"), "DeepSpeedEngine"), (Mode("fsdp"), "FSDPModule")):
        watcher = SameWeights(World(0, 0, 2), lambda: nn.Linear(1, 1), mode)
        with pytest.raises(EnvironmentFault, match=f"not in {wrapper}: .* was asked for and would be left out"):
            watcher.on_train_begin(arguments, TrainerState(), TrainerControl())
    SameWeights(ALONE, lambda: nn.Linear(1, 1), Mode()).on_train_begin(arguments, TrainerState(), TrainerControl())


def test_another_stage_of_deepspeed_than_asked_for_is_refused(tmp_path: Path) -> None:
    class DeepSpeedEngine(nn.Linear):
        """What DeepSpeed answers when it was given another configuration."""

        dp_world_size = 2

        def zero_optimization_stage(self) -> int:
            """Of ZeRO."""
            return 2

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    engine = DeepSpeedEngine(1, 1)
    asked = Mode("deepspeed", settings={"zero_optimization": {"stage": 3}})
    with pytest.raises(EnvironmentFault, match="ZeRO-3 over 2 processes was asked for, and DeepSpeed runs stage 2"):
        SameWeights(World(0, 0, 2), lambda: engine, asked).on_train_begin(arguments, TrainerState(), TrainerControl())
    fitting = Mode("deepspeed", settings={"zero_optimization": {"stage": 2}})
    SameWeights(World(0, 0, 2), lambda: engine, fitting).on_train_begin(arguments, TrainerState(), TrainerControl())
