"""The processes of a run come together: one group, in which all know the same and are about to train the same."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.errors import ExitCode, FinetuneError, HardwareError
from finetune.preflight import Checked
from finetune.ready import Process
from finetune.recipe.loaded import LoadedRecipe

if TYPE_CHECKING:
    from finetune.run.modes import Mode
    from finetune.run.watch import Watch
    from finetune.supply import Supplies


def join(loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies) -> None:
    """Compare what the processes hold, and have compiled what one process compiles for its host.

    Raises:
        RefusedError: they would not train the same run.
        HardwareError: a host has too little memory.
    """
    from finetune.run.modes import compiles

    _agree(loaded, checked, process, supplies)
    _see_room(loaded, checked, process, supplies)
    if compiles(checked.mode):
        _compile_optimizer(process)


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """Tell the other processes of a start the fault that the block finds, since it may stand on this host alone."""
    try:
        yield
    except FinetuneError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from finetune.run.ranks import world
            from finetune.run.rendezvous import tell_refusal

            with contextlib.suppress(HardwareError):  # of a place that the launcher does not name nobody can be told
                world()
                tell_refusal(error)
        raise


def form(process: Process, watch: Watch, mode: Mode) -> None:
    """The group of the processes, watched from then on; operations wait longer in it than the watchdog does.

    Raises:
        HangError: not all processes came in time.
        EnvironmentFault: rank 0 cannot listen at the launcher's address.
        FinetuneError: another process will not train.
    """
    from finetune.run import ranks
    from finetune.run.watch import FIRST_STEP, GRACE

    ranks.start(process.launched, process.hardware.device, max(watch.timeout, FIRST_STEP) + GRACE, mode)
    watch.begin()


def as_rank_0_found(checked: Checked, process: Process) -> Checked:
    """What a launcher's restart found in the run folder, on all ranks alike."""
    from finetune.run import ranks

    overwrite, finished = ranks.from_main(process.launched, lambda: (checked.overwrite, checked.finished))
    return replace(checked, overwrite=overwrite, finished=finished)


def end_finished(checked: Checked, process: Process, facts: dict[str, Any]) -> dict[str, Any]:
    """End, on all ranks alike, where a launcher has started a run again that has its product."""
    from finetune.run.folder import read_json

    folder = checked.folder
    process.say("finished", f"the run in {folder.root}; its product is {facts['product']}, as its manifest says")
    if not process.launched.is_main:
        return {}
    if read_json(folder.exit).get("exit_code") != ExitCode.OK:  # the process was killed that should have said so
        folder.write_exit(ExitCode.OK, "finished", facts["steps"], facts)
    return facts


def remove_stale_locks(process: Process) -> None:
    """Let DeepSpeed not wait for compilations that were killed."""
    from finetune.run import builds

    if process.launched.local_rank != 0:
        return
    for lock in builds.remove_stale_locks(builds.extensions_folder(os.environ)):
        process.say("removed", f"{lock}, left by a compilation that was killed; DeepSpeed would wait for it for ever")


def _compile_optimizer(process: Process) -> None:
    """Have DeepSpeed's optimizer for CPUs compiled on every host, before all processes wait for it at once."""
    from finetune.run.builds import compile_optimizer, extensions_folder
    from finetune.run.wait import on_each_host_in_time

    def long() -> None:
        process.say("compiles", "DeepSpeed's optimizer for the CPU, once on each host, which takes minutes")

    on_each_host_in_time(process.launched, lambda: compile_optimizer(extensions_folder(os.environ)), long)


def _agree(loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies) -> None:
    """All processes must be about to train the same.

    Raises:
        RefusedError: with what differs, rank by rank.
    """
    from finetune.model.earlier import WEIGHTS
    from finetune.run import ranks
    from finetune.run.record import versions

    held = {
        "recipe": loaded.hash(),
        "data": supplies.data.train.fingerprint,
        "tokenizer": supplies.settings.vocabulary.hash,
        "base": supplies.base.fingerprint(),
        "seed": str(loaded.recipe.training.seed),
        "mode": str(checked.mode),
        **{f"version of {name}": version for name, version in versions().items()},
    }
    if checked.earlier is not None:
        held["adapter that is continued"] = checked.earlier.hashes[WEIGHTS]
    ranks.agree(process.launched, held)


def _see_room(loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies) -> None:
    """Refuse to start on a host whose memory cannot take the base of each of its processes, before any loads it."""
    from finetune.room import refuse_little_memory
    from finetune.run.wait import on_each_host_in_time

    on_each_host_in_time(process.launched, lambda: refuse_little_memory(loaded, checked, process, supplies))
