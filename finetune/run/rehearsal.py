"""What a rehearsal changes in a recipe so that a twin runs it on a CPU in a minute, and what it therefore leaves open.

Everything else of the recipe is run as it stands. Each change is an override, as one would type it, and each is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.recipe.sections import AdapterOptions, Recipe, Source, TrackingOptions, TrainingOptions
from finetune.recipe.shipped import configs_folder
from finetune.run.batch import BatchShape, batch_shape
from finetune.run.builds import missing_tools
from finetune.run.modes import Mode, compiles, config_file, machines_of, read_mode, refuse

# So few steps move weights by more than the rounding of 16 bits only at such a rate; the recipe's own is not tried.
LEARNING_RATE = 0.01
MICRO_BATCH = 2  # rows on one process at once
ACCUMULATED = 2  # micro-batches a step, where the recipe accumulates at all
ANSWERS, ANSWER = 4, 8  # rows that are answered, and tokens of each
ROOM = 2  # how much longer than with the real tokenizer a row may be with one that stands in for it
RANK = 8  # of an adapter that starts from a decomposition of the base: the least layer of a twin has 16 dimensions
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd")
_LAYER = re.compile(r"layers?\\?\.\(?\[?(\d+)")


@dataclass(frozen=True)
class Changes:
    """The changes to a recipe.

    Attributes:
        overrides: `section.key=value` each.
        shape: rows of a step.
        mode: how weights and state lie over the processes that rehearse.
        open: what the changes leave untried, as (topic, sentence).
    """

    overrides: tuple[str, ...]
    shape: BatchShape
    mode: Mode
    open: tuple[tuple[str, str], ...]


def changes(
    recipe: Recipe,
    folder: Path,
    base: Path,
    sources: Mapping[str, Sequence[Source]],
    processes: int,
    steps: int,
    stood_in: bool,
) -> Changes:
    """What must differ from the recipe.

    Args:
        recipe: the recipe.
        folder: everything is written below it.
        base: the twin.
        sources: what is read in place of the recipe's sources, by key.
        processes: of the rehearsal.
        steps: optimizer steps.
        stood_in: whether the tokenizer is a stand-in.

    Raises:
        RecipeError: the recipe's own rows a step cannot be shared by the processes that it names, or its launch
            configuration contradicts it.
    """
    shape = _smaller(recipe, processes)
    played, mode, told = _launch(recipe, processes)
    found = [
        ("launch.config", played, "launch", told),
        *_training(recipe.training, shape, steps),
        *_adapter(recipe.adapter),
        *_elsewhere(recipe, processes),
        *_data(recipe, sources, stood_in),
    ]
    overrides = [
        _override("model.name_or_path", str(base)),
        _override("output_dir", str(folder / "run")),
        _override("data.cache_dir", str(folder / "cache")),
        _override("launch.device", "cpu"),
        *(_override(key, value) for key, value, _, _ in found),
    ]
    left = tuple((topic, sentence) for _, _, topic, sentence in found if sentence)
    return Changes(tuple(overrides), shape, mode, left)


# An override's key, its value, and the topic and sentence of what it leaves untried.
_Change = tuple[str, Any, str, str]


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _smaller(recipe: Recipe, processes: int) -> BatchShape:
    """A step of few rows with the recipe's kind of split."""
    own = batch_shape(recipe.training, recipe.launch.num_processes or 1)
    return BatchShape(min(own.per_device, MICRO_BATCH), min(own.accumulation, ACCUMULATED), processes)


def _launch(recipe: Recipe, processes: int) -> tuple[str | None, Mode, str]:
    """The launch configuration of the rehearsal with its mode, and what of the recipe's own it leaves untried.

    DeepSpeed runs on a CPU as it does elsewhere; FSDP2 does not, what is laid over several machines runs on one, and
    what must be compiled is left out where this machine has no compiler.

    Raises:
        RecipeError: the recipe's configuration cannot be read, or contradicts the recipe.
    """
    name = recipe.launch.config
    if name is None:
        return None, Mode(), ""
    file, configs = config_file(name, configs_folder()), configs_folder()
    own = read_mode(file, configs)
    shape = batch_shape(recipe.training, recipe.launch.num_processes or 1)
    refuse(own, recipe.model, recipe.training, shape, "cuda")
    if own.kind == "ddp":
        return None, own, f"{name}, as written; processes were started as on a CPU"
    if own.kind == "fsdp" or processes == 1:
        need = "accelerators" if own.kind == "fsdp" else "more than one process (--processes 2)"
        return None, Mode(), f"{own} of {name}, which needs {need}; each process held the whole model"
    compiled = compiles(own) and missing_tools()  # of the machine that rehearses, not of the one that trains
    if machines_of(file) == 1 and not compiled:
        return name, own, ""
    alone = f"zero{own.stage}"
    left = f"DeepSpeed's optimizer for CPUs of {name}, which needs {' and '.join(missing_tools())} here"
    told = left if compiled else f"several machines, as {name} has them"
    return alone, read_mode(config_file(alone, configs), configs), f"{told}; {alone} ran"


def _training(options: TrainingOptions, shape: BatchShape, steps: int) -> Iterator[_Change]:
    rows = shape.per_device * shape.accumulation * shape.processes
    told = f"steps of {options.global_batch_size} rows; these had {rows}" if rows != options.global_batch_size else ""
    yield "training.global_batch_size", rows, "batch", told
    yield "training.per_device_train_batch_size", shape.per_device, "", ""
    told = f"the recipe's learning rate ({options.learning_rate:g}) and warm-up; so few steps need {LEARNING_RATE:g}"
    yield "training.learning_rate", LEARNING_RATE, "learning", told
    yield "training.warmup_steps", 0, "", ""
    yield "training.max_steps", steps, "", ""
    yield "training.logging_steps", 1, "", ""
    yield "training.save_steps", max(1, steps // 2), "", ""
    if options.eval_steps is not None:
        yield "training.eval_steps", max(1, steps // 2), "", ""
    if options.activation_checkpointing == "auto":  # off on a CPU, on where the recipe is meant to run
        yield "training.activation_checkpointing", True, "", ""
    if options.optim not in PLAIN_OPTIMIZERS:
        yield "training.optim", "adamw_torch", "optimizer", f"{options.optim}, which adamw_torch stood in for"


def _adapter(options: AdapterOptions) -> Iterator[_Change]:
    if options.continue_from is not None:
        told = f"{options.continue_from}, an adapter of the real base; a fresh one took its place"
        yield "adapter.continue_from", None, "adapter", told
    decomposes = isinstance(options.init_lora_weights, str) and options.init_lora_weights != "gaussian"
    largest = max(options.r, *options.rank_pattern.values(), 0)
    if decomposes and largest > RANK:  # a start from singular values cannot have more of them than the twin's layers
        yield "adapter.r", min(options.r, RANK), "adapter", f"ranks above {RANK}, which the twin's layers cannot have"
        yield "adapter.rank_pattern", {key: min(value, RANK) for key, value in options.rank_pattern.items()}, "", ""


def _elsewhere(recipe: Recipe, processes: int) -> Iterator[_Change]:
    stated = recipe.launch.num_processes
    told = f"{stated} processes; {processes} ran" if stated not in (None, processes) else ""
    yield "launch.num_processes", processes, "launch", told
    if recipe.model.revision is not None:
        yield "model.revision", None, "", ""
    kernel = recipe.model.attn_implementation
    if kernel not in ("auto", "eager", "sdpa"):
        yield "model.attn_implementation", "auto", "attention", f"{kernel}, which needs an accelerator"
    if recipe.tracking.trackers:
        yield "tracking.trackers", [], "tracking", f"the trackers {', '.join(recipe.tracking.trackers)}"
        for name, field in TrackingOptions.model_fields.items():
            if name != "trackers":  # the others are refused without one
                yield f"tracking.{name}", field.default, "", ""


def _data(recipe: Recipe, sources: Mapping[str, Sequence[Source]], stood_in: bool) -> Iterator[_Change]:
    for key, several in sources.items():
        yield key, [_written(source) for source in several], "", ""
    if recipe.evaluate.data:
        yield "evaluate.max_new_tokens", ANSWER, "", ""
        yield "evaluate.batch_size", ANSWERS, "", ""
        yield "evaluate.limit", ANSWERS, "", ""
    if stood_in:
        longest = recipe.data.max_length
        told = f"whether rows fit data.max_length ({longest:,} tokens); they had room for {ROOM * longest:,}"
        yield "data.max_length", ROOM * longest, "lengths", told


def _written(source: Source) -> dict[str, Any]:
    """A source as a recipe writes it: what it says beyond the defaults."""
    said = source.model_dump(mode="json")
    defaults = {name: field.default for name, field in Source.model_fields.items()}
    return {key: value for key, value in said.items() if key == "path" or (value and value != defaults[key])}


def depth_named(options: AdapterOptions) -> int:
    """How many layers a model must have so that every layer that the adapter section names by number is there; or 0."""
    numbers = [int(part) for entry in options.layers_to_transform for part in str(entry).split("-")]
    words = options.target_modules if isinstance(options.target_modules, tuple) else ()
    for pattern in (*words, *options.rank_pattern, *options.alpha_pattern, *options.modules_to_save):
        numbers += [int(number) for number in _LAYER.findall(pattern)]
    return 1 + max(numbers) if numbers else 0
