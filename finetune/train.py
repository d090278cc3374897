"""`finetune train`: a recipe becomes an adapter.

    finetune train RECIPE [KEY=VALUE]...                         one process, or as many as the recipe asks for
    accelerate launch … -m finetune.train RECIPE [KEY=VALUE]...  what that starts when there are several

The story, in order: check everything that needs no model, prepare the data, form the group of processes, load the base
and attach the adapter, train, save and prove what was saved. Until the first step nothing is written.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import (
    DiskError,
    ExitCode,
    FinetuneError,
    HardwareError,
    ModelError,
    RecipeError,
    RefusedError,
    StoppedError,
)
from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.shipped import configs_folder
from finetune.recipe.show import recipe_yaml

if TYPE_CHECKING:
    from finetune.data.prepare import Prepared
    from finetune.families.family import Family
    from finetune.methods.method import Method
    from finetune.model.folder import Base
    from finetune.model.load import Precision
    from finetune.plan.hardware import Hardware
    from finetune.run.folder import RunFolder
    from finetune.run.ranks import World
    from finetune.run.trainer import Trainer

# Sections that training reads; `evaluate` and `export` belong to other verbs.
READ_HERE = ("model", "adapter", "data", "training", "launch", "tracking", "output_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """The door that launchers use: `python -m finetune.train RECIPE [KEY=VALUE]...`; returns the exit code."""
    from finetune.cli.main import main as command_line

    return command_line(["train", *(sys.argv[1:] if argv is None else argv)])


def run(recipe_path: str, overrides: list[str], *, overwrite: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Train as a recipe says, in this process or in those it starts.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.
        overwrite: replace what an earlier run left in output_dir.
        as_json: the caller prints the returned facts, so no closing lines are drawn.

    Returns:
        `run`, `product`, `steps`, `loss`, `tokens_per_second`, `seconds`, `proof`.

    Raises:
        FinetuneError: whatever the user can mend, with its exit code.
    """
    loaded = load_recipe(recipe_path, overrides)
    checked = check(loaded, overwrite)
    if "WORLD_SIZE" not in os.environ:
        from finetune.plan.hardware import detect

        hardware = detect(loaded.recipe.launch.device)
        count = loaded.recipe.launch.num_processes or hardware.count
        if count > 1:
            return _launch(loaded, count, hardware.device, recipe_path, overrides, overwrite)
    facts = _train(loaded, checked, overwrite)
    if not as_json and facts:
        _say_done(facts)
    return facts


# -- before anything heavy ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What was found before torch was imported."""

    base: Base
    family: Family | None
    method: Method
    folder: RunFolder
    continuing: bool


def check(loaded: LoadedRecipe, overwrite: bool) -> Checked:
    """Find everything that can be found without torch: base, data, trackers, method, folder.

    Raises:
        FinetuneError: the first kind of fault found, with all of its kind.
    """
    from finetune.data.examples import check_sources, refuse
    from finetune.families import match
    from finetune.methods import METHODS
    from finetune.model.folder import find
    from finetune.registry import resolve
    from finetune.run.folder import claim

    recipe = loaded.recipe
    method: Method = resolve("method", recipe.training.method, METHODS)
    base = find(recipe.model.name_or_path)
    family = match(recipe.model.family, base.model_type)
    _check_trackers(loaded)
    is_main = os.environ.get("RANK", "0") == "0"
    root = Path(recipe.output_dir)
    # Other ranks take rank 0's word for the folder: it writes there while they still look.
    folder, continuing = claim(root, loaded.hash(), overwrite) if is_main else (_folder(root), False)
    refuse(check_sources(recipe.data))
    return Checked(base, family, method, folder, continuing)


def _folder(root: Path) -> RunFolder:
    from finetune.run.folder import RunFolder

    return RunFolder(root)


def _check_trackers(loaded: LoadedRecipe) -> None:
    from finetune.run.track import check_trackers

    if faults := check_trackers(loaded.recipe.tracking):
        raise RecipeError("\n".join(faults))


# -- several processes ----------------------------------------------------------------------------------------------


def _launch(
    loaded: LoadedRecipe, count: int, device: str, recipe_path: str, overrides: list[str], overwrite: bool
) -> dict[str, Any]:
    """Start the launcher, pass signals on to it, and read from the run folder how it ended."""
    from finetune.run.folder import RunFolder, read_json
    from finetune.run.launch import follow, plan_launch

    asked = [] if loaded.recipe.launch.num_processes else [f"launch.num_processes={count}"]
    words = [recipe_path, *overrides, *asked, *(["--overwrite"] if overwrite else [])]
    plan = plan_launch(loaded.recipe.launch, count, device, configs_folder(), words)
    folder = RunFolder(Path(loaded.recipe.output_dir))
    before = read_json(folder.exit)
    print(f"+ {plan}", file=sys.stderr, flush=True)
    code = follow(plan)
    ended = read_json(folder.exit)
    if code == 0:
        return dict(ended.get("facts") or {})
    if ended and ended != before:
        error = FinetuneError(str(ended.get("reason")))
        error.exit_code = int(ended.get("exit_code") or ExitCode.FAILURE)
        raise error
    raise HardwareError(f"the launcher ended with {code} before the run began; its messages stand above")


# -- the run --------------------------------------------------------------------------------------------------------


def _train(loaded: LoadedRecipe, checked: Checked, overwrite: bool) -> dict[str, Any]:
    """One process of the run, from the data to the saved adapter."""
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    from finetune.model.fetch import fetch
    from finetune.model.load import precision
    from finetune.plan.hardware import compute_dtype, detect
    from finetune.run import ranks
    from finetune.run.arguments import batch_shape, trainer_arguments

    transformers_logging.disable_progress_bar()
    recipe = loaded.recipe
    launched = ranks.world()
    say = _Say(launched.is_main)
    ranks.check_asked(recipe.launch.num_processes, launched)
    hardware = detect(recipe.launch.device)
    compute = compute_dtype(recipe.model.dtype, hardware)
    kept = precision(recipe.model, recipe.adapter.method, compute)
    shape = batch_shape(recipe.training, launched.size)
    base = fetch(checked.base, recipe.model.revision, recipe.model.trust_remote_code)
    prepared = _prepare(loaded, checked.method, base, say)
    ranks.start(launched, hardware.device, recipe.launch.timeout)
    try:
        ranks.agree(launched, {"recipe": loaded.hash(), "data": prepared.train.fingerprint, "base": _config_hash(base)})
        checkpoints = checked.folder.checkpoints
        arguments = trainer_arguments(
            recipe.training, recipe.launch, shape, checkpoints, compute, hardware.device, bool(recipe.data.validation)
        )
        ranks.prove_world(launched, arguments)
        set_seed(recipe.training.seed)
        built = _build(loaded, checked, base, prepared, kept, hardware, arguments, launched, say)
        return _run(loaded, checked, base, prepared, built, launched, overwrite, say, str(shape))
    finally:
        ranks.stop()


class _Say:
    """Lines for the user, from rank 0 alone."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main

    def __call__(self, topic: str, text: str) -> None:
        if self.is_main:
            print(f"{topic:<9}{text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Data:
    """Prepared rows, and what read them."""

    tokenizer: Any
    train: Prepared
    validation: Prepared | None
    longest: int
    stops: frozenset[int]


def _prepare(loaded: LoadedRecipe, method: Method, base: Base, say: _Say) -> _Data:
    """Token rows, before any group of processes exists."""
    from finetune.data.prepare import prepare, shared_rows
    from finetune.model.load import load_tokenizer, stop_ids

    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.model, base)
    stops = stop_ids(tokenizer, base)
    train = prepare(recipe.data, recipe.data.train, tokenizer, stops, recipe.training.seed)
    for line in train.report.lines():
        say("data", line)
    validation = None
    if recipe.data.validation:
        validation = prepare(recipe.data, recipe.data.validation, tokenizer, stops, recipe.training.seed)
        for line in validation.report.lines():
            say("", f"validation: {line}")
        if shared := shared_rows(train, validation):
            source, row = shared[0]
            say("", f"warning: {len(shared)} validation rows are trained on too, the first is {source}:{row}")
    longest = recipe.data.max_length if recipe.data.packing else max(map(len, train.rows["input_ids"]))
    return _Data(tokenizer, train, validation, longest, stops)


def _config_hash(base: Base) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(base.config, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Built:
    """A trainer ready to go, and what was decided on the way."""

    trainer: Trainer
    stopper: Any
    progress: Any
    derived: dict[str, Any]
    quantized: tuple[str, ...]
    trained_parameters: int
    adapter: str


def _build(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: _Data,
    kept: Precision,
    hardware: Hardware,
    arguments: Any,
    launched: World,
    say: _Say,
) -> _Built:
    """Load the base, attach the adapter, and put the trainer around them."""
    import torch

    from finetune.model.adapt import attach, resolve_targets, untrained_modules
    from finetune.model.load import attention, load_base, quantized_modules
    from finetune.run.callbacks import AdapterMoves, MetricsFile, Progress, StopSignal
    from finetune.run.ranks import SameWeights

    recipe = loaded.recipe
    attn = attention(recipe.model, hardware.device, data.longest)
    device = None if hardware.device == "cpu" else torch.device(hardware.device, launched.local_rank)
    model: Any = load_base(recipe.model, base, kept, attn, device)
    quantized = quantized_modules(model)
    size = sum(p.numel() for p in model.parameters()) if not quantized else 0
    say("base", f"{recipe.model.name_or_path}: {base.model_type}, {_count(size)}{kept.base}, attention {attn}")
    leaves: list[str] = []
    if recipe.adapter.method != "none":
        targets = resolve_targets(model, recipe.adapter, checked.family)
        if targets.assumed:
            say("", f"note: {targets.assumed}")
        model = attach(model, recipe.adapter, targets, recipe.model.name_or_path, recipe.model.revision)
        leaves = sorted({name.rsplit(".", 1)[-1] for name in targets.modules})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"{recipe.adapter.method} r={recipe.adapter.r} on {', '.join(leaves)}" if leaves else "every weight"
    say("adapter" if leaves else "trains", f"{what}: {_count(trained)}{kept.trained}, optimizer {kept.optimizer}")
    collate = _collator(loaded, data, attn, kept.compute)
    rows, validation = _trainer_rows(loaded, data)
    if recipe.data.packing:
        _refuse_leak(model, collate, rows)
    stopper, progress = StopSignal(), Progress()
    callbacks = [MetricsFile(checked.folder), progress, stopper]
    if leaves:
        callbacks.append(AdapterMoves(untrained_modules))
    trainer = checked.method.trainer(model, data.tokenizer, arguments, rows, validation, collate, checked.folder, callbacks)
    trainer.add_callback(
        SameWeights(
            launched, lambda: trainer.model_wrapped, lambda: trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        )
    )
    derived = {
        "model.dtype": kept.compute,
        "model.attn_implementation": attn,
        "launch.num_processes": launched.size,
        "training.per_device_train_batch_size": arguments.per_device_train_batch_size,
        "training.per_device_eval_batch_size": arguments.per_device_eval_batch_size,
        "training.activation_checkpointing": bool(arguments.activation_checkpointing),
        **({"adapter.target_modules": leaves} if recipe.adapter.target_modules == "auto" and leaves else {}),
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "base dtype": kept.base,
        "trained dtype": kept.trained,
        "optimizer state dtype": kept.optimizer,
        "compute dtype": kept.compute,
    }
    return _Built(trainer, stopper, progress, derived, quantized, trained, what)


def _count(parameters: int) -> str:
    """A number of parameters for a reader; empty for 0, which is what a quantised base reports wrongly."""
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit} parameters, "
    return f"{parameters} parameters, " if parameters else ""


def _collator(loaded: LoadedRecipe, data: _Data, attn: str, compute: str) -> Any:
    import torch

    from finetune.data.collate import Collator, PackedCollator, mask_kind
    from finetune.run.trainer import RowCollator

    pad = data.tokenizer.pad_token_id
    if not loaded.recipe.data.packing:
        return RowCollator(Collator(pad))
    return RowCollator(PackedCollator(pad, mask_kind(attn), getattr(torch, compute)))


def _trainer_rows(loaded: LoadedRecipe, data: _Data) -> tuple[Any, Any]:
    validation = data.validation.rows if data.validation else None
    if not loaded.recipe.data.packing:
        return data.train.rows, validation
    from finetune.data.pack import packed

    length, seed = loaded.recipe.data.max_length, loaded.recipe.training.seed
    return packed(data.train.rows, length, seed), packed(validation, length, seed) if validation else None


def _refuse_leak(model: Any, collate: Any, rows: Any) -> None:
    """Packed rows must not see each other on this very model, kernel and collator."""
    from finetune.data.collate import leak

    row = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    seen = leak(model, collate.collate, row)
    if seen > 0:
        raise ModelError(
            f"data.packing: rows packed together see each other on this model (logits move by {seen:.2g}); set "
            "data.packing: false, or model.attn_implementation to eager or sdpa"
        )


def _run(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: _Data,
    built: _Built,
    launched: World,
    overwrite: bool,
    say: _Say,
    shape: str,
) -> dict[str, Any]:
    """Train, save, prove; whatever happens, exit.json says how it ended."""
    from finetune.run import ranks
    from finetune.run.track import Trackers

    folder, trainer = checked.folder, built.trainer
    resume, passed_over = ranks.from_main(launched, lambda: _resume_point(checked))
    for line in passed_over:
        say("resume", f"passed over {line}")
    if resume:
        say("resume", f"from {resume}")
    unread = loaded.unread(READ_HERE)
    assert not unread, f"nothing reads {', '.join(unread)}, though the recipe sets them"
    say("steps", f"{shape}; run folder {folder.root}")
    trackers = None
    if launched.is_main:
        _need_space(folder, built.trained_parameters, loaded.recipe.training.save_total_limit)
        record = _record(loaded, base, data, launched)
        folder.begin(
            recipe_yaml(loaded, built.derived),
            record,
            [row[:256] for row in data.train.rows[:8]["input_ids"]],
            int(Path(resume).name.split("-")[-1]) if resume else (0 if checked.continuing else None),
        )
        trackers = Trackers.start(loaded.recipe.tracking, folder.root)
    built.stopper.listen()
    started = time.monotonic()
    facts: dict[str, Any] = {}
    try:
        try:
            trainer.train(resume_from_checkpoint=resume)
            if built.stopper.stopped:
                step = trainer.state.global_step
                raise StoppedError(
                    f"stopped on request after step {step} of {trainer.state.max_steps}; the same command continues "
                    f"from checkpoint-{step} in {folder.root}"
                )
            facts = _finish(loaded, checked, base, data, built, launched, time.monotonic() - started, say)
        finally:
            built.stopper.restore()
            if trackers is not None:
                for outcome in trackers.finish():
                    say("tracker", str(outcome))
    except BaseException as error:
        code, reason, raised = _ending(error, built)
        if launched.is_main:
            folder.write_exit(code, reason, trainer.state.global_step)
        if raised is error:
            raise
        raise raised from error
    if launched.is_main:
        folder.write_exit(ExitCode.OK, "finished", trainer.state.global_step, facts)
    return facts


def _resume_point(checked: Checked) -> tuple[str | None, list[str]]:
    if not checked.continuing:
        return None, []
    newest, passed_over = checked.folder.newest_checkpoint()
    return (str(newest) if newest else None), passed_over


def _ending(error: BaseException, built: _Built) -> tuple[int, str, BaseException]:
    """Exit code, reason and the error to raise for whatever ended the training."""
    import torch

    if isinstance(error, KeyboardInterrupt):
        error = StoppedError("stopped at once on the second signal; the same command continues from the last checkpoint")
    elif isinstance(error, torch.OutOfMemoryError):
        error = HardwareError(
            "out of memory; halve training.per_device_train_batch_size (global_batch_size stays), set "
            "training.activation_checkpointing: true, lower data.max_length, or set model.quantization: nf4. "
            f"({str(error).splitlines()[0]})"
        )
    if isinstance(error, FinetuneError):
        return error.exit_code, str(error), error
    return ExitCode.FAILURE, f"{type(error).__name__}: {error}", error


def _need_space(folder: RunFolder, trained_parameters: int, checkpoints: int) -> None:
    """Refuse a run whose checkpoints will not fit: weights and two moments in float32 each, and the product."""
    import shutil

    from finetune.files import existing_parent

    each = 12 * trained_parameters
    needed = each * (checkpoints + 1) + 4 * trained_parameters
    free = shutil.disk_usage(existing_parent(folder.root)).free
    if free < needed:
        raise DiskError(
            f"output_dir: {folder.root} needs {needed / 2**20:,.0f} MiB for {checkpoints + 1} checkpoints and the "
            f"result, and the disk has {free / 2**20:,.0f} MiB free; free some space, choose another output_dir, or "
            "lower training.save_total_limit"
        )


def _record(loaded: LoadedRecipe, base: Base, data: _Data, launched: World) -> dict[str, Any]:
    """run.json: what this run is made of."""
    from finetune.plan.hardware import detect
    from finetune.run.folder import now
    from finetune.run.record import base_hashes, command_line, git_state, versions

    recipe = loaded.recipe
    return {
        "created": now(),
        "recipe": str(loaded.path),
        "recipe_hash": loaded.hash(),
        "command": command_line(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "base": {
            "name": recipe.model.name_or_path,
            "revision": recipe.model.revision,
            "model_type": base.model_type,
            "sha256": base_hashes(base.weights, base.folder),
        },
        "method": recipe.training.method,
        "adapter": recipe.adapter.method,
        "seed": recipe.training.seed,
        "data": {
            "train": {"fingerprint": data.train.fingerprint, **data.train.report.as_dict()},
            "validation": data.validation
            and {"fingerprint": data.validation.fingerprint, **data.validation.report.as_dict()},
        },
        "world_size": launched.size,
        "versions": versions(),
        "git": git_state(),
        "hardware": detect(recipe.launch.device).facts(),
    }


def _finish(
    loaded: LoadedRecipe,
    checked: Checked,
    base: Base,
    data: _Data,
    built: _Built,
    launched: World,
    seconds: float,
    say: _Say,
) -> dict[str, Any]:
    """Measure, save, prove."""
    trainer, folder, recipe = built.trainer, checked.folder, loaded.recipe
    figures: dict[str, Any] = {}
    if data.validation is not None:
        figures["validation_loss"] = round(trainer.evaluate()["eval_loss"], 4)
    if not launched.is_main:
        return {}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry)
    figures = {
        "steps": trainer.state.global_step,
        "final_loss": round(history[-1]["loss"], 4),
        **figures,
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": round(seconds, 1),
    }
    product, proof = _save(loaded, checked, base, data, built, figures)
    say("saved", f"{product}: {proof['tensors']} tensors, reopened from disk and equal to the trained ones")
    return {"run": str(folder.root), "product": str(product), "adapter": recipe.adapter.method, **figures, "proof": proof}


def _save(
    loaded: LoadedRecipe, checked: Checked, base: Base, data: _Data, built: _Built, figures: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    from finetune.exports import adapter as adapter_export
    from finetune.exports import weights as weights_export
    from finetune.run.card import CardFacts, base_facts, card
    from finetune.run.record import base_hashes, versions

    recipe, folder = loaded.recipe, checked.folder
    name, licence = base_facts(recipe.model.name_or_path)
    whole = recipe.adapter.method == "none"
    text = card(
        CardFacts(
            title=folder.root.resolve().name,
            base=name,
            licence=licence,
            method=f"Supervised fine-tuning ({built.adapter})",
            data=tuple(Path(source.name or source.path).name for source in recipe.data.train),
            figures={
                "rows": data.train.report.rows_kept,
                "trained tokens": data.train.report.trained_tokens,
                "learning rate": recipe.training.learning_rate,
                "rows a step": recipe.training.global_batch_size,
                "seed": recipe.training.seed,
                **{key.replace("_", " "): value for key, value in figures.items()},
            },
            versions={k: v for k, v in versions().items() if k in ("finetune", "transformers", "peft", "trl", "torch")},
            library="transformers" if whole else "peft",
        )
    )
    if whole:
        return folder.model, weights_export.write(built.trainer.model, data.tokenizer, folder.model, text)
    facts = {
        "base": {"name": recipe.model.name_or_path, "sha256": base_hashes(base.weights, base.folder)},
        "quantization": {
            "kind": recipe.model.quantization,
            "compute_dtype": built.derived["compute dtype"],
            "modules": list(built.quantized),
        }
        if built.quantized
        else None,
    }
    tokenizer = data.tokenizer if recipe.data.chat_template else None
    return folder.adapter, adapter_export.write(built.trainer.model, folder.adapter, text, facts, tokenizer)


def _say_done(facts: dict[str, Any]) -> None:
    loss = f"loss {facts['final_loss']}"
    if "validation_loss" in facts:
        loss += f", validation loss {facts['validation_loss']}"
    print(f"\n{facts['steps']} steps in {facts['seconds']:.0f} s, {facts['tokens_per_second']:.0f} tokens/s, {loss}")
    print(f"next: finetune evaluate {facts['run']}")
    if facts["adapter"] != "none":
        print(f"      finetune merge {facts['run']}")


if __name__ == "__main__":
    sys.exit(main())
