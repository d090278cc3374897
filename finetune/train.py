"""`finetune train`: a recipe becomes an adapter.

    finetune train RECIPE [KEY=VALUE]...                         one process, or as many as the recipe asks for
    accelerate launch … -m finetune.train RECIPE [KEY=VALUE]...  what that starts when there are several

The story, in order: check what needs no model, prepare the data, form the group of processes, load the base and attach
the adapter, build the trainer, train, save and prove what was saved. Until the first step nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import (
    DataError,
    ExitCode,
    FinetuneError,
    HardwareError,
    NonFiniteError,
    RecipeError,
    RefusedError,
    StoppedError,
)
from finetune.lean import hide, import_all, pause_collector
from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.shipped import configs_folder
from finetune.recipe.show import recipe_yaml

if TYPE_CHECKING:
    from finetune.data.cache import Cache
    from finetune.data.engine import Settings
    from finetune.data.feed import Feed
    from finetune.families.family import Family
    from finetune.methods.method import Method
    from finetune.model.build import Built
    from finetune.model.folder import Base
    from finetune.model.load import Attention, Precision
    from finetune.plan.hardware import Hardware
    from finetune.recipe.sections import Recipe
    from finetune.run.callbacks import StopSignal
    from finetune.run.folder import RunFolder
    from finetune.run.ranks import World
    from finetune.run.say import Say
    from finetune.run.trainer import Trainer

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
    as_json: bool = False,
    own_process: bool = False,
) -> dict[str, Any]:
    """Train as a recipe says, in this process or in those it starts.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.
        overwrite: replace what an earlier run left in output_dir.
        as_json: the caller prints the returned facts, so no closing lines are drawn.
        own_process: this process does nothing else, so that it may be set up for a quick start (finetune/lean.py).

    Returns:
        `run`, `product`, `adapter`, `steps`, `final_loss`, `tokens_per_second`, `seconds`, `proof`, and with validation
        rows `validation_loss`; empty on ranks other than 0.

    Raises:
        FinetuneError: whatever the user can mend, with its exit code.
    """
    from finetune.run.launch import is_launched, told_to_launcher

    loaded = load_recipe(recipe_path, overrides)
    with told_to_launcher():
        checked = check(loaded, overwrite)
        if own_process:
            _start_lean(loaded, checked)
        facts = _launch(loaded, overwrite) if "WORLD_SIZE" not in os.environ else None
        if facts is None:
            facts = _train(loaded, checked, own_process)
        if facts and not as_json and not is_launched():
            _say_done(facts)
    return facts


@dataclass(frozen=True)
class Checked:
    """What was found before torch was imported."""

    base: Base
    family: Family | None
    method: Method
    folder: RunFolder
    continuing: bool
    overwrite: bool


def check(loaded: LoadedRecipe, overwrite: bool = False) -> Checked:
    """Find every fault that can be found without torch: in method, base, trackers, folder and data.

    Raises:
        FinetuneError: the first kind of fault found, with all of its kind.
    """
    from finetune.data.examples import SAMPLE, check_sources, refuse
    from finetune.families import match
    from finetune.methods import METHODS
    from finetune.model.folder import find
    from finetune.registry import resolve
    from finetune.run.folder import RunFolder, claim
    from finetune.run.track import check_trackers

    recipe = loaded.recipe
    method: Method = resolve("method", recipe.training.method, METHODS)
    base = find(recipe.model.name_or_path)
    family = match(recipe.model.family, base.model_type)
    if faults := check_trackers(recipe.tracking):
        raise RecipeError("\n".join(faults))
    folder, continuing = RunFolder.at(recipe.output_dir), False
    if os.environ.get("RANK", "0") == "0":  # other ranks take rank 0's word: it writes there while they still look
        needed = _needed(loaded)
        folder, continuing = claim(folder.root, loaded.hash(), overwrite, needed)
    refuse(check_sources(recipe.data, method.needs, SAMPLE))
    return Checked(base, family, method, folder, continuing, overwrite)


def _needed(loaded: LoadedRecipe) -> tuple[Path, ...]:
    """What replacing an earlier run must leave alone: the recipe's files, the base, the data, the working folder."""
    recipe = loaded.recipe
    sources = (*recipe.data.train, *recipe.data.validation, *recipe.evaluate.data)
    template = [recipe.data.chat_template] if recipe.data.chat_template else []
    named = [recipe.model.name_or_path, *template, *(source.path for source in sources)]
    found = [path for path in (Path(name).expanduser() for name in named) if path.exists()]
    return (*loaded.files, *found, Path.cwd())


def _start_lean(loaded: LoadedRecipe, checked: Checked) -> None:
    """Have the stack import no optional package that this run does not use, and the collector wait meanwhile."""
    from finetune.run.needs import needed

    pause_collector()
    model, data, training = loaded.recipe.model, loaded.recipe.data, loaded.recipe.training
    hide(unless=needed(model.model_dump(), data.model_dump(), training.model_dump(), checked.base.config))


def _launch(loaded: LoadedRecipe, overwrite: bool) -> dict[str, Any] | None:
    """Start the launcher when there are several processes, and say how the run ended; None for one process."""
    from finetune.plan.hardware import detect
    from finetune.run.folder import RunFolder, read_json
    from finetune.run.launch import follow, plan_launch

    recipe = loaded.recipe
    hardware = detect(recipe.launch.device)
    count = recipe.launch.num_processes or hardware.count
    if count == 1:
        return None
    words = [str(loaded.path), *loaded.overrides, *(["--overwrite"] if overwrite else [])]
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


def _train(loaded: LoadedRecipe, checked: Checked, own_process: bool) -> dict[str, Any]:
    """One process of the run, from the data to the saved adapter."""
    from finetune.plan.hardware import compute_dtype, detect
    from finetune.run.say import Say, quieten

    hardware = detect(loaded.recipe.launch.device)
    quieten(hardware.device)  # before peft is imported, whose import asks bitsandbytes for kernels
    if own_process:
        import_all(STACK)

    from transformers import set_seed

    from finetune.data.cache import Cache
    from finetune.data.engine import Settings
    from finetune.data.vocabulary import load
    from finetune.model.build import build
    from finetune.model.fetch import fetch
    from finetune.model.load import attention, load_tokenizer, precision, stop_ids
    from finetune.run import ranks
    from finetune.run.arguments import batch_shape, trainer_arguments

    recipe = loaded.recipe
    launched = ranks.world()
    say = Say(launched.is_main)
    ranks.check_asked(recipe.launch, launched)
    compute = compute_dtype(recipe.model.dtype, hardware)
    kept = precision(recipe.model, recipe.adapter.method, compute)
    shape = batch_shape(recipe.training, launched.size)

    base = fetch(checked.base, recipe.model.revision, recipe.model.trust_remote_code)
    tokenizer = load_tokenizer(recipe.model, base)
    cache = Cache(recipe.data.cache_dir)
    assert base.folder is not None, "a fetched base has a folder"
    settings = Settings(load(base.folder, cache, lambda: tokenizer), stop_ids(tokenizer, base), recipe.data)
    data = _with_stops(_data(recipe, settings, cache, checked.folder, say), recipe, settings, base, say)
    for number, line in enumerate(data.lines()):
        say("" if number else "data", line)
    removed, freed = cache.prune_daily() if launched.is_main else (0, 0)
    if removed:
        say("cache", f"{removed} prepared sources unused for 30 days removed from {cache.root}, {freed / 1e6:.0f} MB")

    ranks.start(launched, hardware.device, recipe.launch.timeout)
    try:
        ranks.agree(launched, {"recipe": loaded.hash(), "data": data.train.fingerprint, "base": base.fingerprint()})
        arguments = trainer_arguments(
            recipe.training, recipe.launch, shape, checked.folder.checkpoints, compute, hardware.device,
            data.validation is not None,
        )  # fmt: skip
        ranks.prove_world(launched, arguments)
        set_seed(recipe.training.seed)
        attn = attention(recipe.model, hardware.device, data.longest)
        device = ranks.device_of(launched, hardware.device)
        built = build(recipe.model, recipe.adapter, base, checked.family, kept, attn.own, device)
        for topic, line in (("base", built.base), ("trains", built.trains), ("note", built.note)):
            say(topic, line if line else "")
        trainer, stopper = _trainer(loaded, checked, built, data, tokenizer, arguments, attn, launched, say)
        derived = _derived(loaded, built, kept, attn.own, arguments, launched)
        units = "sequences" if recipe.data.packing else "rows"
        say("steps", f"{shape.told(units)}; run folder {checked.folder.root}")
        return _run(loaded, checked, base, data, built, trainer, stopper, derived, hardware, launched, say)
    finally:
        ranks.stop()


def _data(recipe: Recipe, settings: Settings, cache: Cache, folder: RunFolder, say: Say) -> Feed:
    """The rows, prepared, or made while they are trained."""
    from finetune.data.feed import feed
    from finetune.data.stream import Length, stream_feed

    training = recipe.training
    if not recipe.data.streaming:
        return feed(settings, recipe.audit, cache, training.seed, lambda line: say("data", line))
    assert training.max_steps is not None, "the recipe is refused without it"
    length = Length(training.max_steps, training.global_batch_size)
    return stream_feed(
        settings, recipe.audit, cache, training.seed, length, folder.quarantine, lambda line: say("data", line)
    )


def _with_stops(data: Feed, recipe: Recipe, settings: Settings, base: Base, say: Say) -> Feed:
    """The rows with what ends their trained answers, which a server must stop at.

    Raises:
        DataError: no trained answer ends with a stop token.
    """
    from finetune.data.stop import stop_contract
    from finetune.model.generation import generation_of

    assert base.folder is not None, "a fetched base has a folder"
    if recipe.data.loss_on == "all":
        return data
    blocks = (block for part in data.train.rows.parts for block in part.blocks())
    generation = generation_of(base.folder)
    contract = stop_contract(blocks, settings.vocabulary, settings.stop_ids, base.config, generation)
    contract.refuse()
    for fault in contract.faults(adapter=recipe.adapter.method != "none"):
        say("stops", str(fault))
    return replace(data, stops=contract)


def _trainer(
    loaded: LoadedRecipe,
    checked: Checked,
    built: Built,
    data: Feed,
    tokenizer: Any,
    arguments: Any,
    attn: Attention,
    launched: World,
    say: Say,
) -> tuple[Trainer, StopSignal]:
    """The method's trainer with everything that watches a run."""
    from finetune.data.feed import collator, packed
    from finetune.model.adapt import untrained_modules
    from finetune.model.attention import attention_width, isolate
    from finetune.run.callbacks import AdapterMoves, MetricsFile, Progress, StopSignal
    from finetune.run.ranks import SameWeights
    from finetune.run.trainer import RowCollator

    isolated = isolate(built.model, attn.inside, data.longest)
    collate, padded = collator(
        loaded.recipe.data, tokenizer.pad_token_id, built.model, data.train.rows, attn.own, isolated
    )
    say("note", padded)
    rows, validation = data.schedules(attention_width(built.model), alike=bool(padded))
    say("packing", packed(rows, loaded.recipe.data))
    stopper = StopSignal()
    watchers: list[Any] = [MetricsFile(checked.folder), Progress(), stopper]
    if built.targets:
        watchers.append(AdapterMoves(untrained_modules))
    trainer: Trainer = checked.method.trainer(
        model=built.model,
        tokenizer=tokenizer,
        arguments=arguments,
        train=rows,
        validation=validation,
        collate=RowCollator(collate),
        folder=checked.folder,
        callbacks=watchers,
    )
    trainer.add_callback(SameWeights(launched, lambda: trainer.model_wrapped, lambda: trainer.is_sharded))
    return trainer, stopper


def _derived(
    loaded: LoadedRecipe, built: Built, kept: Precision, attn: str, arguments: Any, launched: World
) -> dict[str, Any]:
    """What `auto` and unset keys became; the last ones are no recipe keys and stand as comments in recipe.yaml."""
    adapter = loaded.recipe.adapter
    named = adapter.target_modules != "auto" or not built.targets
    targets = {} if named else {"adapter.target_modules": list(built.targets)}
    return {
        "model.dtype": kept.compute,
        "model.attn_implementation": attn,
        "launch.num_processes": launched.size,
        "training.per_device_train_batch_size": arguments.per_device_train_batch_size,
        "training.activation_checkpointing": bool(arguments.activation_checkpointing),
        **targets,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        **kept.facts(),
    }


def _run(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: Feed,
    built: Built,
    trainer: Trainer,
    stopper: StopSignal,
    derived: dict[str, Any],
    hardware: Hardware,
    launched: World,
    say: Say,
) -> dict[str, Any]:
    """Train, save, prove; however it ends, exit.json says so."""
    from finetune.run import ranks
    from finetune.run.ending import as_fault, code_and_reason
    from finetune.run.track import Trackers

    folder = checked.folder
    resume, passed_over = ranks.from_main(launched, lambda: _resume_point(checked))
    for line in passed_over:
        say("resume", f"passed over {line}")
    say("resume", f"from {resume}" if resume else "")
    if unread := [key for key in loaded.unread(READ_HERE) if not loaded.is_default(key)]:
        raise RecipeError(
            f"{', '.join(unread)}: nothing reads this beside the other values of this recipe, so it would have no "
            "effect; remove it, or report it if it should have one"
        )
    trackers = Trackers(folder.root, [])
    if launched.is_main:
        _begin(loaded, checked, base, data, built, derived, hardware, launched, resume)
        trackers = Trackers.start(loaded.recipe.tracking, folder.root)
    started = time.monotonic()
    facts: dict[str, Any] = {}
    together = False  # whether all ranks end alike, so that they can wait for rank 0's last words
    try:
        stopper.listen()
        trainer.train(resume_from_checkpoint=resume)
        step = trainer.state.global_step
        for number, line in enumerate(data.closing()):
            say("" if number else "data", line)
        if stopper.stopped:
            raise StoppedError(
                f"stopped on request after step {step} of {trainer.state.max_steps}; the same command continues from "
                f"checkpoint-{step} in {folder.root}"
            )
        facts = _finish(loaded, checked, base, data, built, trainer, launched, time.monotonic() - started, say)
    except BaseException as error:
        shown = as_fault(error)
        # Of rows that are streamed all ranks meet the same fault.
        together = isinstance(error, StoppedError | NonFiniteError) or (
            isinstance(error, DataError) and loaded.recipe.data.streaming
        )
        if launched.is_main:
            folder.write_exit(*code_and_reason(shown), trainer.state.global_step)
        if shown is error:
            raise
        raise shown from error
    finally:
        stopper.restore()
        for outcome in trackers.finish():
            say("tracker", str(outcome))
        if together:
            with contextlib.suppress(RuntimeError):  # a rank that is gone must not hide why this one ends
                ranks.meet(launched)
    if launched.is_main:
        folder.write_exit(ExitCode.OK, "finished", step, facts)
    return facts


def _resume_point(checked: Checked) -> tuple[str | None, list[str]]:
    """The checkpoint to continue from, and why newer ones were passed over."""
    if not checked.continuing:
        return None, []
    newest, passed_over = checked.folder.newest_checkpoint()
    return (str(newest) if newest else None), passed_over


def _begin(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: Feed,
    built: Built,
    derived: dict[str, Any],
    hardware: Hardware,
    launched: World,
    resume: str | None,
) -> None:
    """Write the first files of the run folder.

    Raises:
        RefusedError: another run has begun there since this one looked, or the run that is continued had other rows
            or another base.
        DiskError: too little space.
    """
    from finetune.run.folder import claim, need_space
    from finetune.run.record import base_hashes, refuse_changed, this_process

    recipe, folder = loaded.recipe, checked.folder
    checkpoints = recipe.training.save_total_limit if recipe.training.save_steps else 1
    need_space(folder, built.trained, checkpoints)
    validation = data.validation
    record = {
        **this_process(),
        "recipe": str(loaded.path),
        "recipe_hash": loaded.hash(),
        "base": {
            "name": recipe.model.name_or_path,
            "folder": str(base.folder.absolute()) if base.folder else None,
            "revision": recipe.model.revision,
            "model_type": base.model_type,
            "sha256": base_hashes(base.weights, base.folder),
        },
        "method": recipe.training.method,
        "adapter": recipe.adapter.method,
        "trained_parameters": built.trained,
        "seed": recipe.training.seed,
        "data": {
            "train": data.train.facts(),
            "validation": validation.facts() if validation else None,
            **data.encoding,
            "stops": data.stops.facts() if data.stops else None,
        },
        "world_size": launched.size,
        "hardware": hardware.facts(),
    }
    step = int(resume.rsplit("-", 1)[-1]) if resume else (0 if checked.continuing else None)
    if resume:
        refuse_changed(folder, record)
    with folder.claimed_alone():
        _, continuing = claim(folder.root, loaded.hash(), checked.overwrite, _needed(loaded))
        if continuing != checked.continuing:
            raise RefusedError(f"output_dir: another run has begun in {folder.root} meanwhile; choose another folder")
        folder.begin(recipe_yaml(loaded, derived), record, data.probe(), step)
        folder.keep_quarantine(data.quarantines())


def _finish(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: Feed,
    built: Built,
    trainer: Trainer,
    launched: World,
    seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measure, save, prove; empty on ranks other than 0."""
    figures: dict[str, Any] = {"steps": trainer.state.global_step}
    if data.validation is not None:
        figures["validation_loss"] = round(trainer.last_validation_loss(), 4)
    if not launched.is_main:
        return {}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in history)
    figures |= {
        "final_loss": round(history[-1]["loss"], 4),
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": round(seconds, 1),
    }
    product, proof = _save(loaded, checked, base, data, built, trainer, figures)
    say("saved", f"{product}: {proof['tensors']} tensors, reopened from disk and equal to the trained ones")
    adapter = loaded.recipe.adapter.method
    return {"run": str(checked.folder.root), "product": str(product), "adapter": adapter, **figures, "proof": proof}


def _save(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: Feed,
    built: Built,
    trainer: Trainer,
    figures: dict[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Write the product with its card; gives its folder and what was proved of it."""
    from finetune.exports import adapter as adapter_export
    from finetune.exports import weights as weights_export
    from finetune.run.card import trained_card
    from finetune.run.folder import read_json
    from finetune.run.record import base_hashes

    recipe, folder = loaded.recipe, checked.folder
    text = trained_card(
        folder.root, base.folder, recipe.model, recipe.data, recipe.training, built.trains,
        data.counts(), figures, "peft" if built.targets else "transformers",
    )  # fmt: skip
    tokenizer = trainer.processing_class
    if recipe.data.chat_template:
        tokenizer.chat_template = Path(recipe.data.chat_template).expanduser().read_text(encoding="utf-8")
    if not built.targets:
        stops = data.stops.ends if data.stops else ()
        return folder.model, weights_export.write(trainer.model, tokenizer, folder.model, text, stops)
    quantization = {
        "kind": recipe.model.quantization,
        "compute_dtype": "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32",
        "modules": list(built.quantized),
    }
    hashes = read_json(folder.record).get("base", {}).get("sha256")  # taken when the run began
    facts = {
        "base": {"name": recipe.model.name_or_path, "sha256": hashes or base_hashes(base.weights, base.folder)},
        "quantization": quantization if built.quantized else None,
        "stops": data.stops.facts() if data.stops else None,
    }
    with_tokenizer = tokenizer if recipe.data.chat_template else None
    return folder.adapter, adapter_export.write(trainer.model, folder.adapter, text, facts, with_tokenizer)


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
