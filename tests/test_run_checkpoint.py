"""A checkpoint is written whole or not at all, says what it should, and no damage to it goes unseen."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faults import faulty
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.errors import DiskError, ExportError, NonFiniteError
from finetune.files import MANIFEST, disk_errors, manifest_faults
from finetune.run import checkpoint as module
from finetune.run import checkpoint_wait
from finetune.run.checkpoint import begin, commit_parts, lay, staging_of, write
from finetune.run.checkpoint_parts import refuse_unfit
from finetune.run.checkpoint_saver import Saver
from finetune.run.checkpoint_state import ADAPTER, STATE, STATE_TENSORS, Snapshot
from finetune.run.checkpoint_tree import DTYPES, Copies, Unfit, flatten, rebuild, write_tensors
from finetune.run.checkpoint_wait import until_written
from finetune.run.checkpoint_writer import Writer
from finetune.run.folder import RunFolder


def go_on() -> None:
    """Nobody gives up."""


def taken(step: int, scale: float = 1.0) -> Snapshot:
    """A small snapshot."""
    torch.manual_seed(step)
    weights = {f"layer.{number}.lora_A.weight": torch.randn(4, 8) * scale for number in range(3)}
    moments = {f"optimizer.state.{number}.exp_avg": torch.randn(4, 8) for number in range(3)}
    plain = {STATE: b'{"state": {}}', "trainer_state.json": json.dumps({"global_step": step}).encode()}
    return Snapshot(step, {ADAPTER: weights, STATE_TENSORS: moments}, plain, {"validation_loss": None})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoint-20."""
    folder = RunFolder(tmp_path / "run")
    folder.begin("model: x\n", {"recipe_hash": "abc"}, [[1, 2]], None)
    write(taken(20), folder.checkpoints / "checkpoint-20", go_on)
    return folder


def save(folder: RunFolder, step: int = 40) -> None:
    """What the writer's thread does."""
    target = folder.checkpoints / f"checkpoint-{step}"
    write(taken(step), target, go_on)
    folder.rotate(1, {target})


def save_parts(folder: RunFolder, step: int = 40) -> None:
    """What two processes do that each hold a part, one after the other."""
    target = folder.checkpoints / f"checkpoint-{step}"
    known: dict[str, Any] = {}
    with disk_errors(target):
        try:
            begin(target)
            for rank in range(2):
                part = {f"weight/{name}": one for name, one in taken(step + rank).tensors[ADAPTER].items()}
                plain = {f"part-{rank}.json": b"{}"} | (taken(step).plain if rank == 0 else {})
                snapshot = Snapshot(step, {f"part-{rank}.safetensors": part}, plain)
                known |= lay(snapshot, staging_of(target), go_on)
            commit_parts(target, step, {}, known)
        finally:
            shutil.rmtree(staging_of(target), ignore_errors=True)
        folder.rotate(1, {target})


Save = Callable[..., None]
SAVES: list[Save] = [save, save_parts]

# -- nested state --------------------------------------------------------------------------------------------------

_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.binary(max_size=9), st.floats(allow_nan=False)
)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.dictionaries(st.integers(0, 9), inner, max_size=3),
    ),
    max_leaves=12,
)


def through_json(value: Any) -> Any:
    plain, tensors = flatten(value, Copies())
    return rebuild(json.loads(json.dumps(plain, allow_nan=False)), tensors)


@settings(max_examples=60, deadline=None)
@given(_TREES)
def test_nested_state_comes_back_as_it_was(value: Any) -> None:
    found = through_json(value)
    assert found == value
    assert repr(found) == repr(value)  # types, and the sign of zero


def test_tensors_arrays_and_what_no_json_has_come_back_as_they_were() -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).t()}, 7: {"q": torch.ones(2).bfloat16()}},
        "numpy": np.arange(5, dtype=np.uint32),
        "empty": torch.zeros(0, 4),
        "odd": {"$tensor": "no tensor", "$x": 1},
        "infinite": [float("inf"), float("-inf")],
        "set": {1, 2},
        "ordered": OrderedDict(a=1),
    }
    found = through_json(state)
    assert found["odd"] == state["odd"]
    assert found["infinite"] == [float("inf"), float("-inf")]
    assert found["set"] == {1, 2}
    assert found["ordered"] == {"a": 1}
    np.testing.assert_array_equal(found["numpy"], state["numpy"])
    for key, name in ((0, "step"), (0, "exp_avg"), (7, "q")):
        assert torch.equal(found["state"][key][name], state["state"][key][name])
        assert found["state"][key][name].dtype == state["state"][key][name].dtype
    assert np.isnan(through_json(float("nan")))


@pytest.mark.parametrize("value", [object(), {1.5: 2}, torch.complex(torch.ones(1), torch.ones(1)), torch.Size([2])])
def test_what_does_not_fit_is_named_with_its_place(value: Any) -> None:
    with pytest.raises(Unfit, match=r"^state\.0\.odd: "):
        flatten({"state": [{"odd": value}]}, Copies())


def test_a_written_file_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.ones(number, 3).to(dtype) for number, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "Ünicode": torch.arange(5)}
    facts = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(found[name].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))
    assert facts["bytes"] == (tmp_path / "x.safetensors").stat().st_size


def test_copies_use_the_memory_of_the_round_before_and_follow_what_changes() -> None:
    copies = Copies()
    weights = [torch.randn(3, 4).t(), torch.ones(2, dtype=torch.bfloat16), torch.tensor(1.0)]
    first = [copies(weight) for weight in weights]
    places = [copy.data_ptr() for copy in first]
    for weight in weights:
        weight.mul_(2)
    copies.begin()
    second = [copies(weight) for weight in weights]
    assert [copy.data_ptr() for copy in second] == places
    assert all(torch.equal(copy, weight) and copy.is_contiguous() for copy, weight in zip(second, weights, strict=True))
    copies.begin()
    other = copies(torch.zeros(5))
    assert other.shape == (5,)
    assert other.dtype == torch.float32


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_taken_and_the_umask_decides_who_reads_it(run: RunFolder) -> None:
    before = os.umask(0o027)
    try:
        save(run)
    finally:
        os.umask(before)
    (path,) = run.newest_first()
    assert path.name == "checkpoint-40"
    assert manifest_faults(path, sealed=True) == []
    with safe_open(path / ADAPTER, framework="pt") as opened:
        assert torch.equal(
            opened.get_tensor("layer.1.lora_A.weight"), taken(40).tensors[ADAPTER]["layer.1.lora_A.weight"]
        )
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
    assert path.stat().st_mode & 0o777 == 0o750


def test_what_stands_in_the_way_is_replaced(run: RunFolder) -> None:
    save(run)
    (run.checkpoints / "checkpoint-40" / STATE).write_text("{}")
    save(run)
    assert [manifest_faults(path) for path in run.newest_first()] == [[]]


def test_a_weight_that_is_not_finite_is_never_kept(run: RunFolder) -> None:
    with pytest.raises(NonFiniteError, match=r"step 40: layer\.0\.lora_A\.weight is not finite"):
        write(taken(40, float("inf")), run.checkpoints / "checkpoint-40", go_on)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-20"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: {**held, "more": torch.ones(2)}, "more was not meant"),
        (lambda held: dict(list(held.items())[1:]), "is missing"),
        (lambda held: {name: tensor * 2 for name, tensor in held.items()}, "has other values"),
        (lambda held: {name: tensor[:2].clone() for name, tensor in held.items()}, "has other values"),
    ],
)
def test_a_file_that_reads_otherwise_than_it_was_written_does_not_count(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    monkeypatch.setattr(module, "write_tensors", lambda path, held, stop: write_tensors(path, change(held), stop))
    with pytest.raises(ExportError, match=said):
        write(taken(40), run.checkpoints / "checkpoint-40", go_on)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-20"]


def test_a_probe_leaves_nothing(run: RunFolder) -> None:
    size = write(taken(21), run.checkpoints / "checkpoint-21", go_on, keep=False)
    assert size > 1000
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-20"]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"a": torch.ones(2), "b": torch.zeros(0, 4)}, r"1 of 2 trained weights .*, as b: \(0, 4\) instead of \(1,\)"),
        ({"a": torch.ones(2)}, "1 of 2 trained weights .*, as b: missing"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, ""),
    ],
)
def test_weights_that_were_gathered_in_part_are_refused(held: Any, said: str) -> None:
    shapes = {"a": (2,), "b": (1,)}
    if said:
        with pytest.raises(ExportError, match=said):
            refuse_unfit(held, shapes)
    else:
        refuse_unfit(held, shapes)


@pytest.mark.parametrize(
    ("newest", "said"),
    [
        (8, "checkpoint-8 holds the state before it"),
        (4, "the state before it could not be saved; checkpoint-4 is the newest"),
        (None, "the state before it could not be saved; there is no checkpoint"),
    ],
)
def test_only_the_checkpoint_of_the_step_before_is_said_to_hold_it(run: RunFolder, newest: Any, said: str) -> None:
    saver = Saver(SimpleNamespace(), run)  # type: ignore[arg-type]
    saver.newest = newest
    assert saver.stands(8) == said


def test_a_file_that_rank_0_does_not_see_leaves_no_checkpoint(run: RunFolder) -> None:
    target = run.checkpoints / "checkpoint-40"
    begin(target)
    known = lay(taken(40), staging_of(target), go_on)
    with pytest.raises(ExportError, match=r"part-1\.json, which another process has written, is not to be seen"):
        commit_parts(target, 40, {}, {**known, "part-1.json": {"bytes": 2, "sha256": ""}})
    assert not target.exists()


# -- faults --------------------------------------------------------------------------------------------------------


def operations(run: RunFolder, save: Save) -> int:
    """How many file operations a save makes, rotation included."""
    copy = RunFolder(run.root.with_name("counted"))
    shutil.copytree(run.root, copy.root)
    with faulty("ENOSPC", 10**9, ".checkpoint-40.tmp") as fault:
        save(copy)
    return fault.count


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "ESTALE"])
def test_a_disk_that_fails_at_any_operation_leaves_the_last_checkpoint(run: RunFolder, kind: str, save: Save) -> None:
    total = operations(run, save)
    assert total > 40
    hit = []
    for at in range(1, total + 1):
        here = RunFolder(run.root.with_name(f"run-{at}"))
        shutil.copytree(run.root, here.root)
        failure: DiskError | None = None
        with faulty(kind, at, ".checkpoint-40.tmp") as fault:
            try:
                save(here)
            except DiskError as error:
                failure = error
        assert fault.struck, at
        hit.append(fault.struck.split()[0])
        newest, passed_over = here.newest_checkpoint()
        assert newest is not None, fault.struck
        assert passed_over == [], fault.struck
        assert failure is not None or newest.name == "checkpoint-40", fault.struck
        save(here)  # the disk works again
        here.clean_checkpoints()
        assert [path.name for path in here.checkpoints.iterdir()] == ["checkpoint-40"], fault.struck
        shutil.rmtree(here.root)
    assert {"open", "write", "fsync", "mkdir", "rename"} <= set(hit)


@pytest.mark.parametrize("save", SAVES)
def test_a_process_killed_at_any_operation_leaves_a_whole_checkpoint(run: RunFolder, save: Save) -> None:
    seen = set()
    for at in range(1, operations(run, save) + 1):
        here = RunFolder(run.root.with_name(f"run-{at}"))
        shutil.copytree(run.root, here.root)
        child = os.fork()
        if child == 0:
            try:
                with faulty("kill", at, ".checkpoint-40.tmp"):
                    save(here)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, at
        newest, passed_over = here.newest_checkpoint()
        assert newest is not None, at
        assert passed_over == [], at
        seen.add(newest.name)
        here.clean_checkpoints()
        save(here)
        assert [path.name for path in here.checkpoints.iterdir()] == ["checkpoint-40"]
        shutil.rmtree(here.root)
    assert seen == {"checkpoint-20", "checkpoint-40"}


def _flip(draw: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(draw: random.Random, path: Path) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


@pytest.mark.parametrize(
    ("count", "damage"), [(1000, _flip), (100, _truncate), (100, lambda draw, path: path.unlink())]
)
def test_every_damage_is_found_before_use_and_the_older_checkpoint_taken(
    run: RunFolder, count: int, damage: Any
) -> None:
    newest = run.checkpoints / "checkpoint-40"
    write(taken(40), newest, go_on)
    whole = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    assert MANIFEST in {path.name for path in whole}
    draw = random.Random(5)
    for _ in range(count):
        victim = draw.choice(sorted(whole))
        damage(draw, victim)
        found, passed_over = run.newest_checkpoint()
        assert found == run.checkpoints / "checkpoint-20", victim
        assert len(passed_over) == 1
        assert victim.name in passed_over[0]
        victim.write_bytes(whole[victim])
    assert run.newest_checkpoint() == (newest, [])


# -- the thread ----------------------------------------------------------------------------------------------------


def test_a_failure_of_the_thread_is_told_once_and_not_lost() -> None:
    writer = Writer()

    def fail(go_on: Any) -> None:
        raise DiskError("full")

    writer.start(fail)
    writer.wait()
    with pytest.raises(DiskError, match="full"):
        writer.raise_failure()
    writer.raise_failure()
    writer.start(fail)
    with pytest.raises(DiskError, match="full"):
        writer.start(fail)


def test_who_waits_for_a_slow_write_notes_that_it_has_not_hung_and_tells_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    monkeypatch.setattr(checkpoint_wait, "_LONG", 0.0)
    writer, over = Writer(), threading.Event()
    alone: Any = SimpleNamespace(world_size=1)
    noted: list[bool] = []
    told: list[float] = []

    def note() -> None:
        noted.append(writer.busy)
        if len(noted) == 5:
            over.set()

    def write(go_on: Any) -> None:
        over.wait(20)

    writer.start(write)
    until_written(alone, writer, note, told.append)
    assert noted[:5] == [True] * 5
    assert told
    assert not writer.busy


def test_a_write_that_is_given_up_leaves_nothing_and_is_no_failure(run: RunFolder) -> None:
    import threading

    writer, begun = Writer(), threading.Event()
    target = run.checkpoints / "checkpoint-40"

    def slow(stop: Any) -> None:
        def wait() -> None:
            begun.set()
            while True:
                stop()

        write(taken(40), target, wait)

    writer.start(slow)
    assert begun.wait(20)
    assert writer.busy
    assert staging_of(target).is_dir()
    writer.wait(0.01)
    assert not writer.busy
    writer.raise_failure()
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-20"]
