"""The model of a run, the trainer around it, and everything that watches both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.preflight import Checked
from finetune.ready import Process, Ready, derived_of
from finetune.recipe.loaded import LoadedRecipe
from finetune.supply import Supplies

if TYPE_CHECKING:
    from finetune.model.build import Built
    from finetune.model.earlier import Earlier
    from finetune.model.folder import Base
    from finetune.model.load import Attention
    from finetune.run.trainer import Trainer
    from finetune.run.watch import Watch


def assemble(loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies, watch: Watch) -> Ready:
    """Load the base, attach the adapter, and build the trainer; all processes of the run call it at once.

    Raises:
        ModelError: the base is another than that of the adapter that is continued, or cannot be trained so.
    """
    from transformers import set_seed

    from finetune.model.load import attention
    from finetune.run.arguments import trainer_arguments
    from finetune.run.callbacks import MetricsFile, Progress, StopSignal
    from finetune.run.ranks import prove_world

    recipe, launched, data = loaded.recipe, process.launched, supplies.data
    arguments = trainer_arguments(
        recipe.training, recipe.launch, process.shape, checked.folder.checkpoints, process.kept.compute,
        process.hardware.device, data.validation is not None, checked.mode,
    )  # fmt: skip
    prove_world(launched, arguments)
    set_seed(recipe.training.seed)
    attn = attention(recipe.model, process.hardware.device, data.longest)
    hashes = _hashes(process, supplies, recipe.model.trust_remote_code)
    if other := _other_base(checked.earlier, supplies.base, hashes):
        raise ModelError(other)
    built = _model(loaded, checked, process, supplies, arguments, attn)
    watch.wait_for_all("loaded")
    watch.note("build")
    stopper = StopSignal(watch.hurry)
    metrics = MetricsFile(checked.folder, recipe.training.on_save_error, partial(process.say, "warning"))
    guards = [watch, metrics, Progress(), stopper]
    trainer, packing = _trainer(loaded, checked, process, supplies, arguments, attn, built, guards)
    trainer.saver.note = partial(watch.note, "waiting for a checkpoint to be written")
    derived = derived_of(loaded, checked, built, process.kept, attn.own, arguments, launched)
    units = "sequences" if recipe.data.packing else "rows"
    process.say("steps", f"{process.shape.told(units)}; run folder {checked.folder.root}")
    return Ready(
        loaded, checked, supplies.base, hashes, data, built, trainer, stopper, watch, metrics, derived,
        packing, process.hardware, launched, process.say,
    )  # fmt: skip


def _model(
    loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies, arguments: Any, attn: Attention
) -> Built:
    """The base with its adapter, where it is to be trained, and what is to be known about it said."""
    from finetune.model.build import build
    from finetune.model.tokenizer import new_ids
    from finetune.run import ranks
    from finetune.run.spread import name_layers, whole_weights_loaded

    options, mode, base = loaded.recipe.model, checked.mode, supplies.base
    device = ranks.device_of(process.launched, process.hardware.device)
    ids = new_ids(options, supplies.tokenizer)
    # What is to be spread stays in the host's memory until it is, except 4-bit weights, which a device makes.
    place = None if mode.spreads and options.quantization == "none" else device
    with whole_weights_loaded(arguments):
        built = build(
            options, checked.adapter, base, checked.family, process.kept, attn.own, place, checked.earlier,
            tuple(ids.values()), sharded=mode.kind == "fsdp", spread=mode.spreads,
        )  # fmt: skip
    name_layers(built.model, checked.family, arguments)
    for topic, line in (
        ("base", built.base),
        ("weights", built.weights),
        ("tokens", ", ".join(f"{text} is new, number {number}" for text, number in ids.items())),
        ("trains", built.trains),
        ("note", built.note),
    ):
        process.say(topic, line if line else "")
    return built


def _hashes(process: Process, supplies: Supplies, code: bool) -> dict[str, str]:
    """SHA-256 of the base's files, and of its code where that is run, which rank 0 reads once and remembers beside the
    prepared rows.
    """
    from finetune.run.record import base_hashes
    from finetune.run.wait import from_main_in_time

    base, known = supplies.base, supplies.cache.file_hashes
    size = sum(path.stat().st_size for path in base.weights) / 1e9

    def long() -> None:
        process.say("base", f"its {size:.1f} GB are read once for their hashes, which later starts remember")

    hashes: dict[str, str] = from_main_in_time(
        process.launched, lambda: base_hashes(base.weights, base.folder, known, code), long
    )
    return hashes


def _other_base(earlier: Earlier | None, base: Base, hashes: dict[str, str]) -> str:
    """How the base differs from that of the adapter that is trained further; empty where it does not."""
    from finetune.run.product import differing

    if earlier is None or not earlier.base_hashes:
        return ""
    changed = differing(earlier.base_hashes, hashes)
    if not changed:
        return ""
    return (
        f"adapter.continue_from: {base.name} is not the base that the adapter in {earlier.folder} was trained on: "
        f"{', '.join(changed)} changed since; name that base"
    )


def _trainer(
    loaded: LoadedRecipe,
    checked: Checked,
    process: Process,
    supplies: Supplies,
    arguments: Any,
    attn: Attention,
    built: Built,
    guards: list[Any],
) -> tuple[Trainer, dict[str, Any] | None]:
    """The method's trainer with everything that watches a run, and how full packed sequences are."""
    from finetune.data.collate import FlatCollator
    from finetune.data.feed import collator, packed, packing_facts
    from finetune.model.attention import attention_width, isolate
    from finetune.run.callbacks import AdapterMoves, BeforeFirstStep
    from finetune.run.micro_batches import RowCollator
    from finetune.run.ranks import SameWeights

    data, say, options = supplies.data, process.say, loaded.recipe.data
    isolated = isolate(built.model, attn.inside, data.longest)
    proved = partial(
        collator, options, supplies.tokenizer.pad_token_id, built.model, data.train.rows, attn.own, isolated
    )
    spreads = checked.mode.spreads  # such a model can be asked only once the trainer has wrapped it
    collate, padded = (FlatCollator(), "") if spreads else proved()
    say("note", padded)
    rows, validation = data.schedules(attention_width(built.model), alike=bool(padded))
    packing = packing_facts(rows, options)
    say("packing", packed(packing, options.max_length))
    batches = RowCollator(collate)
    watchers = [*guards]
    if built.targets:
        watchers.append(AdapterMoves(partial(_untrained, built.first)))
    trainer: Trainer = checked.method.trainer(
        model=built.model,
        tokenizer=supplies.tokenizer,
        arguments=arguments,
        train=rows,
        validation=validation,
        collate=batches,
        folder=checked.folder,
        callbacks=watchers,
    )
    if (ratio := checked.adapter.loraplus_lr_ratio) is not None:
        trainer.use_loraplus(ratio)
    trainer.add_callback(SameWeights(process.launched, lambda: trainer.model_wrapped, checked.mode))

    def prove() -> None:
        batches.collate, reason = proved(trainer.model_wrapped)
        rows.alike = bool(reason)
        say("note", reason)

    if spreads:
        trainer.add_callback(BeforeFirstStep(prove))
    return trainer, packing


def _untrained(first: Any, model: Any) -> list[str]:
    """Modules whose adapter has not moved."""
    from finetune.model.adapt import untrained_modules
    from finetune.run.spread import together

    with together([one for one in model.parameters() if one.requires_grad]):
        return untrained_modules(model, first=first)
