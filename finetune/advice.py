"""What to change in a recipe whose run takes too much memory: only what the checks before a launch would accept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.preflight import Checked, fits
from finetune.ready import Process
from finetune.recipe.check import Check
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.origin import Origin
from finetune.recipe.shipped import configs_folder

if TYPE_CHECKING:
    from finetune.model.folder import Base
    from finetune.run.modes import Mode
    from finetune.supply import Supplies

# Variables that only accelerate's launcher sets, from a configuration other than DDP's.
_GIVEN = ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "FSDP_STATE_DICT_TYPE")


def advice(loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies) -> list[str]:
    """A line for each thing that would take less memory, with its key, its new value and its present one.

    Args:
        loaded: the recipe of the run.
        checked: what was found before it.
        process: this one.
        supplies: its base and rows.
    """
    from finetune.run.launch import is_launched
    from finetune.run.modes import config_file, machines_of
    from finetune.run.shortage import Situation, remedies

    recipe, device = loaded.recipe, process.hardware.device
    recomputes, config = recipe.training.activation_checkpointing, recipe.launch.config
    now = Situation(
        shape=process.shape,
        mode=checked.mode,
        device=device,
        devices=process.hardware.count,
        machines=machines_of(config_file(config, configs_folder())) if config is not None else 1,
        given=not is_launched() and any(name in os.environ for name in _GIVEN),
        longest=supplies.data.longest,
        recomputes=device != "cpu" if recomputes == "auto" else recomputes,
        validates=supplies.data.validation is not None,
        trains_all=checked.adapter.method == "none",
    )
    told = remedies(recipe.model, recipe.data, recipe.training, recipe.launch, now)
    return [
        remedy.text
        for remedy in told
        if accepted(remedy.changes, loaded, supplies.base, now.mode, now.shape.processes, device)
    ]


def accepted(
    changes: Mapping[str, Any], loaded: LoadedRecipe, base: Base, mode: Mode, processes: int, device: str
) -> bool:
    """Whether a run of the recipe with these changes would be allowed to start.

    Args:
        changes: dotted key to value.
        loaded: the recipe.
        base: its base, fetched.
        mode: how its run is laid over its processes, unless `launch.config` is changed.
        processes: how many there are, unless `launch.num_processes` is changed.
        device: torch device type.
    """
    from finetune.run.batch import batch_shape
    from finetune.run.builds import refuse_missing_tools
    from finetune.run.modes import compiles, mode_of, refuse
    from finetune.run.ranks import World, check_asked

    plain = loaded.resolved(changes)
    recipe = Check(plain, {}, {}, set(), Origin("file", str(loaded.path))).run()
    if recipe is None:
        return False
    processes = int(changes.get("launch.num_processes", processes))
    try:
        if "launch.config" in changes:
            mode = mode_of(recipe.launch, configs_folder(), {})
        fits(recipe, plain, mode, base)
        check_asked(recipe.launch, World(0, 0, processes))
        refuse(mode, recipe.model, recipe.training, batch_shape(recipe.training, processes), device)
        if compiles(mode):
            refuse_missing_tools()
    except FinetuneError:
        return False
    return True
