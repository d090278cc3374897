"""What one process of a run has at hand when training begins, and the first files of the run folder."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import RefusedError
from finetune.preflight import Checked, needed
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.show import recipe_yaml

if TYPE_CHECKING:
    from finetune.data.feed import Feed
    from finetune.model.build import Built
    from finetune.model.folder import Base
    from finetune.model.load import Precision
    from finetune.plan.hardware import Hardware
    from finetune.recipe.sections import Recipe
    from finetune.run.batch import BatchShape
    from finetune.run.callbacks import MetricsFile, StopSignal
    from finetune.run.modes import Mode
    from finetune.run.ranks import World
    from finetune.run.resume import ResumePoint
    from finetune.run.say import Say
    from finetune.run.trainer import Trainer
    from finetune.run.watch import Watch


@dataclass(frozen=True)
class Process:
    """What one process of a run knows of itself before it has read anything.

    Attributes:
        hardware: what it runs on.
        launched: its place among the processes of the run.
        kept: in which precision weights are kept and multiplied.
        shape: the global batch as the processes split it.
        say: lines for the user.
    """

    hardware: Hardware
    launched: World
    kept: Precision
    shape: BatchShape
    say: Say


def process_of(recipe: Recipe, mode: Mode, hardware: Hardware) -> Process:
    """This process, after comparing what was launched with what the recipe asks for.

    Raises:
        HardwareError: another number of processes was launched, or more than this host has devices.
        RecipeError: the recipe and the launcher's configuration contradict each other.
        EnvironmentFault: this host lacks a compiler that the mode needs.
    """
    from finetune.model.load import precision
    from finetune.plan.hardware import compute_dtype
    from finetune.run import ranks
    from finetune.run.batch import batch_shape
    from finetune.run.builds import refuse_missing_tools
    from finetune.run.launch import check_devices
    from finetune.run.modes import compiles, refuse
    from finetune.run.say import Say

    launched = ranks.world()
    say = Say(launched.is_main)
    ranks.check_asked(recipe.launch, launched)
    check_devices(launched.local_rank + 1, hardware.device, hardware.count)
    kept = precision(recipe.model, recipe.adapter.method, compute_dtype(recipe.model.dtype, hardware))
    shape = batch_shape(recipe.training, launched.size)
    refuse(mode, recipe.model, recipe.training, shape, hardware.device)
    if compiles(mode):
        refuse_missing_tools()
    return Process(hardware, launched, kept, shape, say)


@dataclass(frozen=True)
class Ready:
    """Everything that training begins with.

    Attributes:
        base: the fetched base.
        hashes: SHA-256 of its files, by name.
        trainer: with its callbacks.
        stopper, watch: the callbacks that end a run.
        metrics: the one that writes metrics.jsonl.
        derived: what `auto` and unset keys became, from `derived_of`.
        packing: how full packed sequences are; None where nothing is packed beforehand.
    """

    loaded: LoadedRecipe
    checked: Checked
    base: Base
    hashes: dict[str, str]
    data: Feed
    built: Built
    trainer: Trainer
    stopper: StopSignal
    watch: Watch
    metrics: MetricsFile
    derived: dict[str, Any]
    packing: dict[str, Any] | None
    hardware: Hardware
    launched: World
    say: Say


def derived_of(
    loaded: LoadedRecipe, checked: Checked, built: Built, kept: Precision, attn: str, arguments: Any, launched: World
) -> dict[str, Any]:
    """What `auto` and unset keys became; the last ones are no recipe keys and stand as comments in recipe.yaml."""
    adapter = loaded.recipe.adapter
    named = adapter.target_modules != "auto" or not built.targets or checked.earlier is not None
    targets = {} if named else {"adapter.target_modules": list(built.targets)}
    return {
        "model.dtype": kept.compute,
        "model.attn_implementation": attn,
        "launch.num_processes": launched.size,
        "training.per_device_train_batch_size": arguments.per_device_train_batch_size,
        "training.activation_checkpointing": bool(arguments.activation_checkpointing),
        **targets,
        **(checked.earlier.decided() if checked.earlier is not None else {}),
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        **kept.facts(),
    }


def made_of(ready: Ready) -> dict[str, Any]:
    """What a resume must find unchanged, as rank 0 sees it: the keys that count, and what they led to."""
    from finetune.run.record import versions
    from finetune.run.resume import counting_keys

    checked, data = ready.checked, ready.data
    if not ready.launched.is_main:
        return {}
    weights = {name: digest for name, digest in ready.hashes.items() if not name.startswith("tokenizer")}
    plain = ready.loaded.resolved()
    became = {
        key: ready.derived.get(key) for key in ("model.dtype", "model.attn_implementation", "adapter.target_modules")
    }
    return {
        "recipe": counting_keys(plain),
        "found": {
            "data.rows": data.train.fingerprint,
            **data.train.states(),
            "data.validation_rows": data.validation.fingerprint if data.validation else None,
            "template": data.encoding.get("template_sha256"),
            "tokenizer": data.encoding.get("tokenizer_sha256"),
            "continued_from": checked.earlier.facts().get("sha256") if checked.earlier else None,
            **{f"base.{name}": digest for name, digest in weights.items()},
            **{f"versions.{name}": version for name, version in versions().items()},
            **{f"derived.{key}": value for key, value in became.items() if value is not None},
            "world_size": ready.launched.size,
            "parallelism": ready.trainer.parallelism,
            "device": ready.hardware.device,
        },
    }


def begin(ready: Ready, made: dict[str, Any], point: ResumePoint) -> None:
    """Write the first files of the run folder.

    Args:
        ready: what training begins with.
        made: from `made_of`.
        point: where the run goes on.

    Raises:
        RefusedError: another run has begun there since this one looked.
        DiskError: too little space.
    """
    from finetune.data import date
    from finetune.run.folder import claim, read_json
    from finetune.run.record import this_process
    from finetune.run.restart import launcher_of
    from finetune.run.space import most_checkpoints, need_space

    loaded, checked, base, data = ready.loaded, ready.checked, ready.base, ready.data
    recipe, folder = loaded.recipe, checked.folder
    training = recipe.training
    validated = data.validation is not None and bool(training.save_steps and training.eval_steps)
    most = most_checkpoints(training.save_total_limit if training.save_steps else 1, validated)
    need_space(folder, ready.built.trained, most, goes=not checked.continuing)
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
            "sha256": ready.hashes,
        },
        "method": recipe.training.method,
        "adapter": checked.adapter.method,
        **({"continued_from": checked.earlier.facts()} if checked.earlier is not None else {}),
        "trained_parameters": ready.built.trained,
        "seed": recipe.training.seed,
        "date": date.today().isoformat(),
        "data": {
            "train": data.train.facts(),
            "validation": validation.facts() if validation else None,
            **data.encoding,
            "packing": ready.packing,
            "stops": data.stops.facts() if data.stops else None,
        },
        "world_size": ready.launched.size,
        "hardware": ready.hardware.facts(),
        "made_of": made,
    }
    if launcher := launcher_of(os.environ):
        record["launcher"] = launcher
    if checked.continuing:
        went_on = {"step": point.step, "at": record["created"], "accepted": [asdict(drift) for drift in point.accepted]}
        record["resumed"] = [*read_json(folder.record).get("resumed", []), went_on]
    with folder.claimed_alone():
        # What the run is made of has been compared.
        _, continuing = claim(folder.root, loaded.hash(), checked.overwrite, needed(loaded), lambda found: None)
        if continuing != checked.continuing:
            raise RefusedError(f"output_dir: another run has begun in {folder.root} meanwhile; choose another folder")
        for line in folder.set_aside(point.step) if checked.continuing else ():
            ready.say("resume", line)
        folder.begin(
            recipe_yaml(loaded, ready.derived), record, data.probe(), point.step if checked.continuing else None
        )
        folder.keep_quarantine(data.quarantines())
