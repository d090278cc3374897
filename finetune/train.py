"""`finetune train`: a recipe becomes an adapter.

    finetune train RECIPE [KEY=VALUE]...                         one process, or as many as the recipe asks for
    accelerate launch … -m finetune.train RECIPE [KEY=VALUE]...  what that starts when there are several

The story, in order: check what needs no model, form the group of processes, prepare the data, load the base and attach
the adapter, build the trainer, train, save and prove what was saved. Until the first step nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from finetune.advice import advice
from finetune.errors import (
    DataError,
    ExitCode,
    FinetuneError,
    HangError,
    HardwareError,
    NonFiniteError,
    RecipeError,
    StoppedError,
)
from finetune.finish import finish
from finetune.guards import watch_of, watched
from finetune.join import as_rank_0_found, end_finished, form, join, refusing_together, remove_stale_locks
from finetune.lean import hide, import_all, pause_collector
from finetune.preflight import Checked, check, fetched
from finetune.ready import Ready, begin, made_of, process_of
from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.shipped import configs_folder

if TYPE_CHECKING:
    from finetune.run.checkpoint_saver import Saver
    from finetune.run.early import EarlyStop
    from finetune.run.resume import ResumePoint
    from finetune.run.say import Say
    from finetune.supply import Supplies

# Keys that training has read before its first step. `evaluate` and `export` belong to other verbs; `tracking` is read
# when the trackers start, and the recipe is refused when it sets other keys of it without naming a tracker.
READ_HERE = ("model", "adapter", "data", "audit", "training", "launch", "output_dir")

# What every run imports sooner or later, and with it nearly all of torch, transformers, PEFT and TRL.
STACK = ("finetune.data.feed", "finetune.model.build", "finetune.run.arguments", "finetune.run.trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """The door that launchers use, `python -m finetune.train RECIPE [KEY=VALUE]...`; returns the exit code."""
    from finetune.cli.main import main as command_line

    return command_line(["train", *(sys.argv[1:] if argv is None else argv)])


def run(
    recipe_path: str,
    overrides: list[str],
    *,
    overwrite: bool = False,
    allow_drift: Sequence[str] = (),
    as_json: bool = False,
    own_process: bool = False,
) -> dict[str, Any]:
    """Train as a recipe says, in this process or in those it starts.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.
        overwrite: replace what an earlier run left in output_dir.
        allow_drift: names of what may have changed since a run that is continued was stopped (run/resume.py).
        as_json: the caller prints the returned facts, so no closing lines are drawn.
        own_process: this process does nothing else, so that it may be set up for a quick start (finetune/lean.py).

    Returns:
        `run`, `product`, `adapter`, `steps`, `final_loss`, `tokens_per_second`, `seconds`, `proof`, and with validation
        rows `validation_loss`; empty on ranks other than 0.

    Raises:
        FinetuneError: whatever the user can mend, with its exit code.
    """
    from finetune.run.early import EarlyStop
    from finetune.run.launch import is_launched, told_to_launcher
    from finetune.run.modes import enter
    from finetune.run.orphans import end_with_launcher

    end_with_launcher(os.environ)
    with EarlyStop().listening() as early, told_to_launcher():
        with refusing_together():
            loaded = load_recipe(recipe_path, overrides)
            checked = check(loaded, overwrite, allow_drift)
            if "WORLD_SIZE" in os.environ:
                enter(checked.mode, os.environ)
        if own_process:
            _start_lean(loaded, checked)
        facts = _launch(loaded, checked) if "WORLD_SIZE" not in os.environ else None
        if facts is None:
            facts = _train(loaded, checked, own_process, early)
        if facts and not as_json and not is_launched():
            _say_done(facts)
    return facts


def _start_lean(loaded: LoadedRecipe, checked: Checked) -> None:
    """Have the stack import no optional package that this run does not use, and the collector wait meanwhile."""
    from finetune.run.needs import needed

    pause_collector()
    model, data, training = loaded.recipe.model, loaded.recipe.data, loaded.recipe.training
    hide(unless=needed(model.model_dump(), data.model_dump(), training.model_dump(), checked.base.config))


def _launch(loaded: LoadedRecipe, checked: Checked) -> dict[str, Any] | None:
    """Start the launcher when there are several processes, and say how the run ended; None for one process."""
    from finetune.plan.hardware import detect
    from finetune.run.batch import batch_shape
    from finetune.run.builds import refuse_missing_tools
    from finetune.run.folder import RunFolder, read_json
    from finetune.run.launch import check_devices, count_to_start, follow, plan_launch
    from finetune.run.modes import compiles, refuse

    recipe = loaded.recipe
    hardware = detect(recipe.launch.device)
    count = count_to_start(recipe.launch, hardware.count)
    if count == 1:
        return None
    check_devices(count, hardware.device, hardware.count)
    refuse(checked.mode, recipe.model, recipe.training, batch_shape(recipe.training, count), hardware.device)
    if compiles(checked.mode):
        refuse_missing_tools()
    words = [str(loaded.path), *loaded.overrides, *(["--overwrite"] if checked.overwrite else [])]
    words += ["--allow-drift", ",".join(checked.allow_drift)] if checked.allow_drift else []
    plan = plan_launch(recipe.launch, count, hardware.device, configs_folder(), words)
    print(f"+ {plan}", file=sys.stderr, flush=True)
    code, told = follow(plan)
    if code == 0:
        return dict(read_json(RunFolder.at(recipe.output_dir).exit).get("facts") or {})
    if told:
        error = FinetuneError(str(told["reason"]))
        error.exit_code = int(told["exit_code"])
        raise error
    raise HardwareError(f"the launcher ended with {code}, and no process said why; its messages stand above")


def _train(loaded: LoadedRecipe, checked: Checked, own_process: bool, early: EarlyStop) -> dict[str, Any]:
    """One process of the run, from the data to the saved adapter."""
    from finetune.plan.hardware import detect
    from finetune.run.say import quieten

    hardware = detect(loaded.recipe.launch.device)
    quieten(hardware.device)  # before peft is imported, whose import asks bitsandbytes for kernels
    if own_process:
        import_all(STACK)

    from finetune.assemble import assemble
    from finetune.run import ranks
    from finetune.run.ending import as_fault
    from finetune.run.launch import told_to_launcher
    from finetune.run.restart import is_restart
    from finetune.supply import supply

    recipe, mode = loaded.recipe, checked.mode
    with refusing_together():
        process = process_of(recipe, mode, hardware)
    process.say("note", mode.note)
    if mode.kind == "deepspeed":
        remove_stale_locks(process)
    supplies: Supplies | None = None

    def explained(error: BaseException) -> BaseException:
        return as_fault(error, lambda: advice(loaded, checked, process, supplies) if supplies else ())

    watch = watch_of(recipe.launch.timeout, checked, process.launched)
    # Told before the group is left, over which the others break down.
    with ranks.left_afterwards(), told_to_launcher(), watched(watch, checked, explained):
        form(process, watch, mode)
        if is_restart(os.environ):
            checked = as_rank_0_found(checked, process)
            if checked.finished is not None:
                return end_finished(checked, process, checked.finished)
        supplies = supply(loaded, checked, process)
        checked = fetched(checked, recipe.model.family, supplies.base)
        watch.wait_for_all("supplied")
        join(loaded, checked, process, supplies)
        return _run(assemble(loaded, checked, process, supplies, watch), explained, early)


def _run(ready: Ready, explained: Callable[[BaseException], BaseException], early: EarlyStop) -> dict[str, Any]:
    """Train, save, prove; however it ends, exit.json says so.

    Args:
        ready: what training begins with.
        explained: the error a user is shown for what ended it.
        early: what has listened for signals so far.
    """
    from finetune.run import ranks
    from finetune.run.ending import code_and_reason, leave_word, with_blame
    from finetune.run.pulse import Pulse
    from finetune.run.shared_folder import refuse_unshared
    from finetune.run.track import Trackers

    loaded, trainer, launched, say = ready.loaded, ready.trainer, ready.launched, ready.say
    folder = ready.checked.folder
    made = made_of(ready)
    point = _going_on(ready, made)
    _arm(trainer.saver, loaded.recipe.training.on_save_error, made, point, say)
    _refuse_unread(loaded)
    trackers, pulse = Trackers(folder.root, []), Pulse(folder.root)
    ready.stopper.listen()
    early.over()
    if launched.is_main:
        begin(ready, made, point)
    started = time.monotonic()
    facts: dict[str, Any] = {}
    together = False  # whether all ranks end alike, so that they can wait for rank 0's last words
    try:
        refuse_unshared(launched, folder.record, loaded.recipe.launch.timeout)
        if launched.is_main:
            pulse.start()
            trackers = Trackers.start(loaded.recipe.tracking, folder.root)
        trainer.train(resume_from_checkpoint=point.checkpoint)
        step = trainer.state.global_step
        for number, line in enumerate(ready.data.closing()):
            say("" if number else "data", line)
        if ready.stopper.stopped:
            trainer.saver.insist(step)
            raise StoppedError(
                f"stopped on request after step {step} of {trainer.state.max_steps}; the same command continues from "
                f"checkpoint-{step} in {folder.root}"
            )
        facts = finish(ready, time.monotonic() - started)
    except BaseException as error:
        ready.watch.give_way()
        shown = with_blame(explained(error), ready.watch.blame)
        # Of rows that are streamed all ranks meet the same fault.
        together = isinstance(error, StoppedError | NonFiniteError) or (
            isinstance(error, DataError) and loaded.recipe.data.streaming
        )
        told = code_and_reason(shown)
        speaks = ready.watch.speaks() if isinstance(shown, HangError) else not together and ready.watch.confess(*told)
        if launched.is_main or (speaks and not folder.exit.exists()):  # rank 0 may be gone, or wait for this one
            leave_word(folder, *told, trainer.state.global_step)
        if shown is error:
            raise
        raise shown from error
    finally:
        ready.watch.stop()
        ready.stopper.restore()
        ready.metrics.settle()
        for outcome in trackers.finish():
            say("tracker", str(outcome))
        pulse.stop()
        if together:
            with contextlib.suppress(RuntimeError):  # a rank that is gone must not hide why this one ends
                ranks.meet(launched)
    if launched.is_main:
        folder.write_exit(ExitCode.OK, "finished", step, facts)
    return facts


def _going_on(ready: Ready, made: dict[str, Any]) -> ResumePoint:
    """Where the run goes on, agreed by all ranks and said.

    Raises:
        RefusedError: it may not, on all ranks alike.
    """
    from finetune.run.resume import refuse_overrun
    from finetune.run.wait import from_main_in_time

    going_on: ResumePoint = from_main_in_time(
        ready.launched,
        lambda: _resume_point(ready.checked, made),
        lambda: ready.say("resume", "reading the newest checkpoint to see whether it is whole"),
    )
    for line in going_on.passed_over:
        ready.say("resume", f"passed over {line}")
    ready.say("resume", f"from {going_on.checkpoint}" if going_on.checkpoint else "")
    for drift in going_on.accepted:
        ready.say("resume", f"accepted: {drift}")
    refuse_overrun(going_on, ready.trainer.steps_in_all(), ready.checked.folder)
    return going_on


def _refuse_unread(loaded: LoadedRecipe) -> None:
    """Refuse what nothing has read by now.

    Raises:
        RecipeError: the recipe sets keys without effect.
    """
    if unread := [key for key in loaded.unread(READ_HERE) if not loaded.is_default(key)]:
        raise RecipeError(
            f"{', '.join(unread)}: nothing reads this beside the other values of this recipe, so it would have no "
            "effect; remove it, or report it if it should have one"
        )


def _resume_point(checked: Checked, made_of: dict[str, Any]) -> ResumePoint:
    """Where the run goes on.

    Raises:
        RefusedError: it may not.
    """
    from finetune.run.resume import ResumePoint, find

    return find(checked.folder, made_of, checked.allow_drift) if checked.continuing else ResumePoint(None)


def _arm(
    saver: Saver, on_error: Literal["stop", "continue"], made_of: dict[str, Any], point: ResumePoint, say: Say
) -> None:
    """Tell the saver what it must know of the run."""
    saver.made_of, saver.on_error, saver.changed = made_of, on_error, bool(point.accepted)
    saver.tell = lambda line: say("warning", line)


def _say_done(facts: dict[str, Any]) -> None:
    """What was reached, and what to do next."""
    loss = f"loss {facts['final_loss']}"
    if "validation_loss" in facts:
        loss += f", validation loss {facts['validation_loss']}"
    print(f"\n{facts['steps']} steps in {facts['seconds']:.0f} s, {facts['tokens_per_second']:.0f} tokens/s, {loss}")
    run = shlex.quote(facts["run"])
    print(f"next: finetune evaluate {run}")
    if facts["adapter"] != "none":
        print(f"      finetune merge {run}")


if __name__ == "__main__":
    sys.exit(main())
