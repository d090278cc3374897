"""`finetune rehearse`: a whole recipe, played on a tiny twin of its model, before machines are booked.

    finetune rehearse RECIPE [KEY=VALUE]... [--processes N] [--steps N] [--keep DIR] [--json]

The twin has the recipe's architecture, with every kind of block, in small. On a CPU, in about a minute, the real
stories are told of it one after another: what is trained, the data with their masks, training with all processes, the
saved adapter, evaluation, the merge and its proof. What that shows is said line by line, and so is what it cannot show.
A fault ends it as it would end the story that met it, with the same message and the same exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import RecipeError, RefusedError
from finetune.recipe.load import load_recipe
from finetune.stage import Told, cores, find_model, read_figures, set_stage

if TYPE_CHECKING:
    from finetune.recipe.loaded import LoadedRecipe
    from finetune.recipe.sections import Recipe
    from finetune.run.rehearsal import Changes
    from finetune.stage import Model, Stage

STEPS = 4
FEWEST_STEPS = 2  # after which training knows whether every adapter gets a gradient
MOST_PROCESSES = 8  # unless asked for more: each takes a gigabyte


def run(
    recipe_path: str,
    overrides: Sequence[str],
    *,
    processes: int | None = None,
    steps: int = STEPS,
    keep: str | None = None,
    own_process: bool = False,
) -> dict[str, Any]:
    """Rehearse a recipe.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.
        processes: how many train together; by default as many as the recipe names, up to this machine's cores.
        steps: optimizer steps.
        keep: a folder to leave everything in; by default it is removed.
        own_process: this process does nothing else, so that it may be set up for a quick start.

    Returns:
        `recipe`, `base`, `model_type`, `family`, `twin`, `processes`, `steps`, `seconds`, `folder` (None when it is
        removed), and `covered` and `not_covered`: lists of `part`, `text` and `figures`.

    Raises:
        FinetuneError: as the story that failed.
    """
    if "WORLD_SIZE" in os.environ:
        raise RecipeError("a rehearsal starts its processes itself; run it without a launcher, with --processes N")
    started = time.monotonic()
    loaded = load_recipe(recipe_path, overrides)
    _check_unplayed(loaded.recipe)
    model = find_model(loaded.recipe)
    if own_process:
        _start_lean(loaded.recipe, model)
    with _folder(keep) as folder:
        from finetune.run.rehearsal import changes

        stage = set_stage(loaded.recipe, model, folder)
        count = processes or min(loaded.recipe.launch.num_processes or 1, cores(), MOST_PROCESSES)
        changed = changes(loaded.recipe, folder, stage.base, stage.sources, count, steps, stage.stood_in)
        _say(f"{loaded.recipe.model.name_or_path}: {stage.twin}, in {folder}")
        covered = list(_play(loaded, changed, folder))
    return {
        "recipe": str(loaded.path),
        "base": loaded.recipe.model.name_or_path,
        "model_type": model.model_type,
        "family": model.family.name if model.family is not None else None,
        "twin": stage.twin,
        "processes": count,
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(folder) if keep is not None else None,
        "covered": [vars(line) for line in covered],
        "not_covered": [vars(line) for line in _open(loaded.recipe, stage, changed)],
    }


def _check_unplayed(recipe: Recipe) -> None:
    """Look for faults in what a rehearsal leaves out, as training does.

    Raises:
        FinetuneError: a tracker that cannot start, or an earlier adapter that cannot be continued.
    """
    from finetune.model.earlier import read_earlier
    from finetune.run.track import check_trackers

    if faults := check_trackers(recipe.tracking):
        raise RecipeError("\n".join(faults))
    read_earlier(recipe.adapter, recipe.model.name_or_path, recipe.model.quantization)


def _say(text: str) -> None:
    print(f"rehearse {text}", file=sys.stderr, flush=True)


def _start_lean(recipe: Recipe, model: Model) -> None:
    """Import what all parts need, and no optional package that this recipe does not use."""
    from finetune.lean import hide, import_all, pause_collector
    from finetune.run.needs import needed
    from finetune.train import STACK

    pause_collector()
    config = model.base.config if model.base is not None else {"model_type": model.model_type}
    hide(unless=needed(recipe.model.model_dump(), recipe.data.model_dump(), recipe.training.model_dump(), config))

    from finetune.run.say import quieten

    quieten("cpu")
    import_all(STACK)


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """Where everything is written: a folder that is removed, or the one to keep, which must be new.

    Raises:
        RefusedError: the folder to keep exists.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="finetune-rehearsal-") as place:
            yield Path(place)
        return
    folder = Path(keep).expanduser()
    if os.path.lexists(folder):
        raise RefusedError(f"--keep: {folder} exists already; remove it, or name a new folder")
    folder.mkdir(parents=True)
    yield folder


def _play(loaded: LoadedRecipe, changed: Changes, folder: Path) -> Iterator[Told]:
    """Tell the real stories, one after another, and of each what it showed.

    Args:
        loaded: the recipe.
        changed: what is changed in it.
        folder: where the stage is set.
    """
    from finetune import evaluate, inspect, merge, targets, train

    recipe, path = loaded.recipe, str(loaded.path)
    words = [*loaded.overrides, *changed.overrides]
    count = len(loaded.set_keys())
    yield Told("recipe", f"{count} keys set, each known and of its type", {"keys": count, "hash": loaded.hash()})
    _say("targets")
    yield from _of_targets(targets.run(path, words))
    if not recipe.data.streaming:
        _say("data")
        found = inspect.audit(path, words, False, lambda line: None)
        inspect.refuse_violations(found)
        yield from _of_data(found)
    _say("train")
    facts = train.run(path, words, as_json=True)
    yield from _of_training(facts, folder, changed)
    if recipe.evaluate.data:
        _say("evaluate")
        scored = evaluate.run(facts["run"], as_json=True)
        yield Told(
            "evaluate",
            f"{scored['rows']} rows answered and scored by {recipe.evaluate.scorer}",
            _only(scored, "rows", "scores"),
        )
    if facts["adapter"] != "none":
        _say("merge")
        yield from _of_merge(merge.run(facts["run"], as_json=True))


def _only(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: facts[name] for name in names}


def _of_targets(facts: dict[str, Any]) -> Iterator[Told]:
    """What is trained, by kind of block."""
    if facts["method"] == "none":
        yield Told("targets", "every weight is trained")
        return
    adapted = [block for block in facts["blocks"] if block["trainable"]]
    parts = [
        f"{block['kind']} {block['adapted'] / block['parameters']:.0%} ({', '.join(block['leaves'])})"
        for block in adapted
    ]
    frozen = ", ".join(block["kind"] for block in facts["blocks"] if not block["trainable"])
    yield Told("targets", f"adapted: {'; '.join(parts)}; frozen: {frozen or 'nothing'}", {"blocks": facts["blocks"]})
    for told in filter(None, (facts["assumed"], facts["loses"])):
        yield Told("targets", told)


def _of_data(found: Any) -> Iterator[Told]:
    """What the rows are, and whether what is trained is what is served."""
    share = found.trained_tokens / found.tokens if found.tokens else 0.0
    yield Told(
        "data",
        f"{found.rows:,} rows, {found.tokens:,} tokens, {share:.0%} of them trained",
        {"rows": found.rows, "tokens": found.tokens, "trained_tokens": found.trained_tokens},
    )
    answers = sum(one.served.answers for one in found.sources)
    alike = answers - sum(one.served.unlike for one in found.sources)
    if answers:
        yield Told(
            "masks",
            f"{alike:,} of {answers:,} trained answers stand behind exactly what a server sends",
            {"answers": answers, "as_served": alike},
        )
    ranges = sum(one.ranges for one in found.sources)
    stopped = sum(one.ranges_stopped for one in found.sources)
    yield Told(
        "stops",
        f"{stopped:,} of {ranges:,} trained ranges end with a stop token",
        {"ranges": ranges, "stopped": stopped},
    )
    if found.packing.used:
        packed = found.packing
        yield Told(
            "packing",
            f"{packed.sequences:,} sequences, {packed.density:.0%} full; a probe showed that rows in one sequence do "
            "not see each other",
            {"sequences": packed.sequences, "density": packed.density},
        )


def _of_training(facts: dict[str, Any], folder: Path, changed: Changes) -> Iterator[Told]:
    """What the run did and what it saved."""
    losses = [line["loss"] for line in read_figures(folder / "run" / "metrics.jsonl") if "loss" in line]
    alone = changed.shape.processes == 1
    how = "gloo" if changed.mode.kind == "ddp" else f"gloo, {changed.mode}"
    together = "" if alone else f", all with the same data and weights ({how})"
    moved = "" if facts["adapter"] == "none" else "; every adapter received a gradient"
    yield Told(
        "train",
        f"{facts['steps']} steps of {changed.shape}{together}: loss {losses[0]:.3f} to {losses[-1]:.3f}{moved}",
        {"steps": facts["steps"], "processes": changed.shape.processes, "mode": str(changed.mode), "losses": losses},
    )
    if "validation_loss" in facts:
        yield Told(
            "validate", f"loss {facts['validation_loss']} on the validation rows", _only(facts, "validation_loss")
        )
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").glob("checkpoint-*"))
    yield Told(
        "save",
        f"{', '.join(kept)}; {facts['proof']['tensors']} tensors reopened from disk, equal to the trained",
        {"checkpoints": kept, "tensors": facts["proof"]["tensors"]},
    )


def _of_merge(facts: dict[str, Any]) -> Iterator[Told]:
    """What the merge proved."""
    yield Told(
        "merge",
        f"{facts['merged_tensors']} tensors merged, {facts['copied_tensors']} copied",
        _only(facts, "merged_tensors", "copied_tensors", "kept_of_update"),
    )
    effect, gap = facts["proof"]["effect"], facts["proof"]["gap"]
    yield Told(
        "proof",
        f"reloaded from disk: mean divergence from base + adapter {gap['mean_kl']:.2e} nats, where the adapter moves "
        f"the base by {effect['mean_kl']:.2e}",
        facts["proof"],
    )


def _open(recipe: Recipe, stage: Stage, changed: Changes) -> Iterator[Told]:
    """What was not played."""
    yield Told("hardware", "memory, speed, and the kernels and links of accelerators: everything ran on this CPU")
    yield Told("weights", "the real weights: whether they are whole is found when training looks at them")
    yield Told("resume", "a run that is stopped and goes on")
    yield from stage.open
    yield from (Told(*pair) for pair in changed.open)
    if recipe.data.streaming:
        yield Told("masks", "the comparison with what a server sends, since rows are streamed")
    if recipe.adapter.method == "none":
        yield Told("merge", "nothing: every weight was trained, so there is no adapter to merge")
